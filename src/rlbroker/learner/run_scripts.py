"""The Lua scripts that a run needs, gathered from the rooms that own them."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from rlbroker.backend.scripts import Script
from rlbroker.control import commands, ledger
from rlbroker.experience import dead_letters, pending, send_queue
from rlbroker.membership import heartbeat, registration, roster
from rlbroker.weights import commit

_OWNERS: Final[tuple[ModuleType, ...]] = (
    roster,
    registration,
    heartbeat,
    commit,
    commands,
    ledger,
    send_queue,
    pending,
    dead_letters,
)

#: The scripts of the learner and of the workers. The learner loads them all: a worker may lack the right to.
SCRIPTS: Final[tuple[Script, ...]] = tuple(
    dict.fromkeys(value for owner in _OWNERS for value in vars(owner).values() if isinstance(value, Script))
)
