"""The learner's progress reports and its summary, as values and as lines of JSON.

In `rlbroker demo` the learner is a child process: it writes these lines, and the parent reads and shows them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final, Literal

Outcome = Literal["solved", "not solved in time", "trained", "interrupted", "moved"]

#: The exit code of a learner that was asked to leave during training: EX_TEMPFAIL of sysexits.h, try again later.
MOVED: Final = 75


@dataclass(frozen=True)
class DemoWorkerStatus:
    """The state of one worker, from the learner's roster."""

    worker_id: int
    host: str
    pid: int
    state: str
    version: int  #: of the weights that it applied last; 0 before the first ones
    staleness: int  #: latest version minus `version`


@dataclass(frozen=True)
class Progress:
    """The state of a training run. `returns` and `batches` hold only what is new since the previous report."""

    seconds: float
    seconds_left: float
    steps: int
    version: int
    episodes: int
    mean_return: float | None  #: of the last 100 episodes; None before the end of the first
    target: float | None  #: the mean return at which the environment counts as solved
    returns: tuple[tuple[int, float], ...] = ()  #: for each episode: environment steps at its end, return
    batches: tuple[tuple[float, int, int], ...] = ()  #: for each batch: seconds, worker id, staleness
    queued: int = 0  #: batches waiting in Redis
    missed: int = 0  #: missed versions, summed over workers
    workers: tuple[DemoWorkerStatus, ...] = ()

    def to_json(self) -> str:
        """Return the report as one line, without a line end."""
        return json.dumps({"progress": asdict(self)})


@dataclass(frozen=True)
class Summary:
    """The result of a training run."""

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
    batches_produced: int  #: by all workers, including batches that could not be sent
    batches_delivered: int  #: returned to the learner by `collect_experiences`
    batches_lost: dict[str, int]  #: by reason; produced = delivered + lost
    missed: dict[str, int]  #: versions that workers did not apply, by reason
    workers_left: tuple[int, ...] = ()  #: ids of workers that did not leave after the "stop" command

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 0, 1 if not solved in time, 130 after Ctrl-C, 75 if it is to be restarted."""
        codes = {"solved": 0, "trained": 0, "not solved in time": 1, "interrupted": 130, "moved": MOVED}
        return codes[self.outcome]

    def to_json(self) -> str:
        """Return the report as one line, without a line end."""
        return json.dumps({"summary": asdict(self)})


def parse_report(line: str) -> Progress | Summary | None:
    """Return the report in a line of a learner's output, or None if the line is not a report.

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
