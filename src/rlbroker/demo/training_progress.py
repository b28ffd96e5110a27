"""What a learner reports while it trains, as values and as lines of JSON.

`rlbroker demo` shows what another process trains: its learner writes these lines, and the parent reads them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final, Literal

Outcome = Literal["solved", "not solved in time", "trained", "interrupted", "moved"]

#: Exit code of a learner that was told to go while it trained: as sysexits.h has it, try again later.
MOVED: Final = 75


@dataclass(frozen=True)
class DemoWorkerStatus:
    """One line of the learner's roster."""

    worker_id: int
    host: str
    pid: int
    state: str
    version: int  #: of the weights that it applied last; 0 before the first
    staleness: int  #: how many versions that is behind


@dataclass(frozen=True)
class Progress:
    """The state of a training run; `returns` and `batches` hold what is new since the report before."""

    seconds: float
    seconds_left: float
    steps: int
    version: int
    episodes: int
    mean_return: float | None  #: of the last 100 episodes; None before the first ended
    target: float | None  #: the mean return at which the environment counts as solved
    returns: tuple[tuple[int, float], ...] = ()  #: of each episode: environment steps at its end, return
    batches: tuple[tuple[float, int, int], ...] = ()  #: of each: seconds, worker id, staleness
    queued: int = 0  #: batches that wait in Redis
    missed: int = 0  #: versions that some worker never applied, summed over workers
    workers: tuple[DemoWorkerStatus, ...] = ()

    def to_json(self) -> str:
        """Return one line without its end."""
        return json.dumps({"progress": asdict(self)})


@dataclass(frozen=True)
class Summary:
    """What came of a training run."""

    env_id: str
    outcome: Outcome
    seconds: float
    steps: int
    episodes: int
    versions: int
    mean_return: float | None
    target: float | None
    mean_staleness: float
    max_staleness: int
    batches_produced: int  #: sent, or tried to be, by all workers
    batches_delivered: int  #: handed to the learner
    batches_lost: dict[str, int]  #: by reason; with those delivered they make up those produced
    missed: dict[str, int]  #: versions that workers never applied, by reason
    workers_left: tuple[int, ...] = ()  #: ids of those that did not leave when told to stop

    @property
    def exit_code(self) -> int:
        """What a command ends with: 0, 1 if not solved in time, 130 after Ctrl-C, 75 if it is to come back."""
        codes = {"solved": 0, "trained": 0, "not solved in time": 1, "interrupted": 130, "moved": MOVED}
        return codes[self.outcome]

    def to_json(self) -> str:
        """Return one line without its end."""
        return json.dumps({"summary": asdict(self)})


def parse_report(line: str) -> Progress | Summary | None:
    """Return what a line of a learner's output says; None for a line that is no report.

    >>> parse_report(Progress(1.0, 2.0, 3, 4, 5, None, None, returns=((3, 6.0),)).to_json()).returns
    ((3, 6.0),)
    >>> parse_report("some other output") is None
    True
    """
    try:
        document = json.loads(line)
    except ValueError:
        return None
    match document:
        case {"progress": dict(values)}:
            values["workers"] = tuple(DemoWorkerStatus(**worker) for worker in values["workers"])
            for name in ("returns", "batches"):
                values[name] = tuple(map(tuple, values[name]))
            return Progress(**values)
        case {"summary": dict(values)}:
            values["workers_left"] = tuple(values["workers_left"])
            return Summary(**values)
    return None
