"""`rlbroker experiences`: a look into the batches that wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.ops.cli.formatting import age, counted, plain, size
from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from rlbroker.ops.inspect.batch_shapes import Content
    from rlbroker.ops.inspect.queues import WaitingBatch

#: Workers that are looked at, unless they are named: batches may be large.
WORKERS_SHOWN = 16

experiences = typer.Typer(
    name="experiences", no_args_is_help=True, help="The batches that wait for the learner."
)


@experiences.callback()
def _group() -> None:
    """Have a group, although there is only one command."""


@experiences.command("peek")
@with_session
def peek(
    session: Session,
    worker: Annotated[int | None, typer.Option(min=0, help="Only this worker's.")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Batches of each worker.")] = 1,
    newest: Annotated[bool, typer.Option("--newest", help="The newest instead of the oldest.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help=f"Of all workers, not only of the first {WORKERS_SHOWN}.")
    ] = False,
) -> None:
    """Show what waiting batches hold, without taking them: facts, and the dtype and shape of each array.

    The batches that are shown travel to this machine. One that does not decode is shown with the reason.
    Exit code: 0; 1 if there is no such worker; 2 if the server or the run is not there.

    Example: rlbroker experiences peek --run pong --worker 3 --count 2
    """
    from rlbroker.ops.inspect.queues import peek as look
    from rlbroker.ops.inspect.runs import worker_ids

    with session.in_time():
        owners = worker_ids(session.connection, session.keys)
    if worker is not None and worker not in owners:
        there = ", ".join(map(str, owners)) or "none"
        session.fail(f"there is no worker {worker} in the run {session.run!r}; workers there are: {there}")
    chosen = [worker] if worker is not None else owners if every else owners[:WORKERS_SHOWN]
    queues = []
    for one in chosen:
        # Each by itself: together they may be too large for our memory, or for the time.
        with session.in_time():
            queues.append(look(session.connection, session.keys, one, count=count, newest=newest))
    if session.as_json:
        session.show_json(
            {
                "run": session.run,
                "workers": [
                    {
                        "worker": queue.worker_id,
                        "waiting": queue.waiting,
                        "in_hand": queue.in_hand,
                        "batches": [_batch_json(one) for one in queue.batches],
                    }
                    for queue in queues
                ],
                "not_shown": len(owners) - len(chosen) if worker is None else 0,
            }
        )
        return
    if not any(queue.waiting or queue.in_hand for queue in queues):
        session.say("no batches wait")
    for queue in queues:
        if queue.waiting or queue.in_hand:
            session.console.print(
                f"worker {queue.worker_id}: {queue.waiting:,} waiting, {queue.in_hand:,} in the learner's hands"
            )
        for batch in queue.batches:
            _show(session, batch)
    if worker is None and len(chosen) < len(owners):
        session.say(f"{counted(len(owners) - len(chosen), 'more worker')}: --worker N, or --all")


def _show(session: Session, one: WaitingBatch) -> None:
    facts = [
        f"batch {one.worker_id}/{one.batch_id}" + (", tried again" if one.retried else ""),
        "version unknown" if one.version is None else f"version {one.version:,}, {one.staleness:,} behind",
        counted(one.rows, "row") if one.rows is not None else "",
        (f"{size(one.raw_bytes)} of arrays in " if one.raw_bytes is not None else "")
        + size(one.stored_bytes),
        f"sent {age(one.age_seconds)} ago" if one.age_seconds is not None else "",
        f"in the hands of {plain(one.held_by)}, delivery {one.deliveries:,}" if one.held_by else "",
    ]
    session.console.print("  " + "; ".join(filter(None, facts)))
    if one.problem:
        session.console.print(f"    does not decode: {plain(one.problem)}", style="red")
    show_contents(session, one.contents)


def show_contents(session: Session, contents: Sequence[Content]) -> None:
    """Print what a batch holds, one line for each leaf and plain value."""
    width = max((len(plain(one.name)) for one in contents), default=0)
    for one in contents:
        what = plain(repr(one.value))
        if one.leaf is not None:
            what = f"{one.kind} {one.dtype} {' × '.join(map(str, one.shape)) or 'scalar'}"
        session.console.print(f"    {plain(one.name):{width}}  {what}")


def contents_json(contents: Sequence[Content]) -> list[dict[str, Any]]:
    """Give what a batch holds as JSON can."""
    return [
        {
            "name": one.name,
            "kind": one.kind,
            "dtype": one.dtype or None,
            "shape": list(one.shape) if one.leaf is not None else None,
            "bytes": one.nbytes if one.leaf is not None else None,
        }
        for one in contents
    ]


def _batch_json(one: WaitingBatch) -> dict[str, Any]:
    return {
        "id": f"{one.worker_id}/{one.batch_id}",
        "retried": one.retried,
        "in_hand": bool(one.held_by),
        "held_by": one.held_by or None,
        "deliveries": one.deliveries,
        "version": one.version,
        "staleness": one.staleness,
        "rows": one.rows,
        "raw_bytes": one.raw_bytes,
        "stored_bytes": one.stored_bytes,
        "age_seconds": one.age_seconds,
        "problem": one.problem or None,
        "contents": contents_json(one.contents),
    }
