"""The marks of a training checkpoint: which batches of a run it covers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlbroker.backend.replies import entry_id
from rlbroker.config import check_count, check_worker_id, shown
from rlbroker.errors import InvalidArgument


def parse_marks(marks: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Return marks from outside, such as from a file, with every value checked and converted.

    Args:
        marks: what `WorkerCommunicator.marks` returned; other entries are dropped.
        run: the run that they must belong to.

    Raises:
        InvalidArgument: an entry is missing or has a wrong value, or the marks belong to another run.
    """
    if not isinstance(marks, Mapping):
        raise InvalidArgument(f"invalid marks, pass what marks() returned; got {shown(marks)}")
    problem = ""
    try:
        parsed = {
            "run": str(marks["run"]),
            **{name: check_count(name, marks[name]) for name in ("version", "inserts", "samples")},
            "batches": {
                str(name): _parse_mark(mark)
                for name, mark in marks["batches"].items()
                if check_worker_id(int(str(name).removeprefix("again:"))) >= 0
            },
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = repr(error)
    if problem:  # outside of the handler: the first error may show more than this one
        raise InvalidArgument(f"invalid marks, pass what marks() returned: {problem}")
    if parsed["run"] != run:
        raise InvalidArgument(
            f"these marks belong to the run {shown(parsed['run'])}; this is the run {run!r}"
        )
    return parsed


def _parse_mark(mark: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "through": entry_id(mark["through"]),
        "except": [*map(entry_id, mark["except"])],
        "passed_over": [[entry_id(first), entry_id(last)] for first, last in mark["passed_over"]],
        "taken_over": [*map(entry_id, mark["taken_over"])],
    }
