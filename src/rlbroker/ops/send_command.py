"""Sends a command in place of a run's learner, and reads the answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import parsing, server_seconds, text_fields
from rlbroker.codec.signing import SigningKey
from rlbroker.control.commands import Command, CommandSender, ends_run
from rlbroker.errors import Fenced, InvalidArgument
from rlbroker.membership.roster import end_run
from rlbroker.ops.inspect.control_records import add_unsettled_acknowledgements
from rlbroker.ops.inspect.liveness import parse_learner
from rlbroker.types import Outcome

#: Attempts to send a command: a new learner that opens the run meanwhile fences the one that was read.
_TRIES = 3


def send_command(
    connection: Connection,
    keys: Keys,
    name: str,
    data: Any,
    worker_ids: Iterable[int] | None,
    *,
    expires_seconds: float | None,
    also_without_learner: bool = False,
    key: SigningKey | None = None,
) -> Command:
    """Send a command with the epoch of the run's latest learner.

    That learner records the answers, but does not send the command again to a server that lost it. A `stop` to all
    workers ends the run, as the learner's own would.

    Args:
        data: the argument of the handler; anything that a batch may contain.
        worker_ids: the workers; None for all members.
        expires_seconds: workers that read it later than this do not apply it.
        also_without_learner: whether to send it even if the learner has ended or is away. Live workers apply it, but no
            process records their answers.
        key: the key that signs it; workers with a key apply only signed commands.

    Raises:
        InvalidArgument: the name or the expiry is not valid, there is no learner, or the run is signed with another
            key than the `stop` that is to end it.
        UnknownWorker: one of the ids is not a member of the run.
    """
    for tried in range(_TRIES):
        clock, fields = connection.execute_all([("TIME",), ("HGETALL", keys.meta)])
        meta, ends = text_fields(fields), ends_run(name, worker_ids, expires_seconds)
        with parsing(keys.meta):
            learner = parse_learner(meta, server_seconds(clock))
        if learner.epoch == 0:
            raise InvalidArgument(
                f"no learner has opened the run {keys.run!r} yet; start its learner before you send commands"
            )
        if learner.state != "alive" and not also_without_learner:
            why = "has ended" if learner.state == "ended" else "is away: it died, or lost its connection"
            raise InvalidArgument(
                f"the learner of {keys.run!r} {why}, so no process records the workers' answers; --force sends "
                "the command, and live workers apply it"
            )
        signed_with = meta.get("signed_with")
        if ends and signed_with and (key is None or key.id != signed_with):
            raise InvalidArgument(
                f"the run {keys.run!r} is signed, so only a stop with its key (id {signed_with:.8}) ends it; set "
                "RLBROKER_SIGNING_KEY_FILE to the file of that key"
            )
        sender = CommandSender(connection, keys, epoch=learner.epoch, key=key)
        try:
            if ends:
                end_run(connection, keys, learner.epoch, key, by="command")
            return sender.send(name, data, worker_ids, expires_seconds=expires_seconds)
        except Fenced:  # another learner has opened the run meanwhile
            if tried == _TRIES - 1:
                raise
    raise AssertionError("each try returns or raises")


def read_outcomes(connection: Connection, keys: Keys, command: Command) -> dict[int, Outcome]:
    """Return the outcome of a command at each worker: the recorded one, or else the worker's answer."""
    outcomes = {command.id: command.outcomes()}
    add_unsettled_acknowledgements(connection, keys, outcomes)
    return outcomes[command.id]
