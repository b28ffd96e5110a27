"""Sending a command in the place of a run's learner, and watching the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import server_seconds, text_fields
from rlbroker.codec.signing import SigningKey
from rlbroker.control.commands import Command as Command
from rlbroker.control.commands import CommandSender
from rlbroker.errors import Fenced, InvalidArgument
from rlbroker.ops.inspect.control_records import add_unsettled_answers
from rlbroker.ops.inspect.liveness import learner_silent_seconds, learner_state
from rlbroker.types import Outcome

#: Learners that may come in between while a command is sent.
_TRIES = 3


def send_command(
    connection: Connection,
    keys: Keys,
    name: str,
    data: Any,
    worker_ids: Sequence[int] | None,
    *,
    expires_seconds: float | None,
    also_without_learner: bool = False,
    key: SigningKey | None = None,
) -> Command:
    """Send a command as the run's present learner would.

    That learner does not know of it: it settles the answers, but does not send the command again to a server that
    lost it.

    Args:
        connection: way to the server.
        keys: names of the run's keys.
        name: what is asked for.
        data: what the handler gets; anything that a batch may contain.
        worker_ids: whom to ask; None for all members.
        expires_seconds: a worker that reads it later than this does not do it.
        also_without_learner: whether to send it although nobody settles the answers: the learner has ended, or is
            away. Workers that live obey all the same.
        key: signs it; workers that have a key obey nothing else.

    Raises:
        InvalidArgument: the name or the expiry cannot work, or there is no learner.
        UnknownWorker: one of the ids is not a member of the run.
        PeerError: the server refused, or could not be reached in time.
    """
    for tried in range(_TRIES):
        clock, fields = connection.execute_all([("TIME",), ("HGETALL", keys.meta)])
        meta = text_fields(fields)
        state = learner_state(meta, learner_silent_seconds(meta, server_seconds(clock)))
        if int(meta.get("epoch", 0)) == 0:
            raise InvalidArgument(
                f"no learner has opened the run {keys.run!r} yet, and only then can its workers be sent commands"
            )
        if state != "alive" and not also_without_learner:
            why = "has ended" if state == "ended" else "is away: it died, or is cut off"
            raise InvalidArgument(
                f"the learner of {keys.run!r} {why}, and nobody would settle the workers' answers; --force sends the "
                "command all the same, and workers that live obey it"
            )
        commander = CommandSender(connection, keys, epoch=int(meta["epoch"]), key=key)
        try:
            return commander.send(name, data, worker_ids, expires_seconds=expires_seconds)
        except Fenced:  # another learner has come since we looked
            if tried == _TRIES - 1:
                raise
    raise AssertionError("each try returns or raises")


def read_outcomes(connection: Connection, keys: Keys, command: Command) -> dict[int, Outcome]:
    """Give what became of a command at each worker: what is settled, and else what the worker answered.

    Raises:
        PeerError: the server refused, or could not be reached in time.
    """
    outcomes = {command.id: command.outcomes()}
    add_unsettled_answers(connection, keys, outcomes)
    return outcomes[command.id]
