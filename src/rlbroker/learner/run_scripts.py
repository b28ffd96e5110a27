"""The Lua scripts that a run needs, gathered from the rooms that own them."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from rlbroker.backend.scripts import Script
from rlbroker.control import acknowledgements, commands, ledger
from rlbroker.experience import dead_letters, pending, stream_writer
from rlbroker.membership import heartbeat, roster, worker_ids
from rlbroker.weights import commit

_OWNERS: Final[tuple[ModuleType, ...]] = (
    roster,
    worker_ids,
    heartbeat,
    commit,
    acknowledgements,
    commands,
    ledger,
    stream_writer,
    pending,
    dead_letters,
)

#: The scripts of the learner and of the workers. The learner loads all of them, because workers may lack the right.
SCRIPTS: Final[tuple[Script, ...]] = tuple(
    dict.fromkeys(value for owner in _OWNERS for value in vars(owner).values() if isinstance(value, Script))
)
