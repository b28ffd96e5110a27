"""`rlbroker experiences`: the contents of waiting batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.backend.text import age, counted
from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session
from rlbroker.ops.formatting import format_bytes, sanitize

if TYPE_CHECKING:
    from rlbroker.codec.describe import Content
    from rlbroker.ops.inspect.queues import QueuedBatch

#: How many workers are shown by default: their batches are downloaded, and may be large.
WORKERS_SHOWN = 16

experiences = typer.Typer(
    name="experiences", no_args_is_help=True, help="The batches that wait for the learner."
)


@experiences.callback()
def _group() -> None:
    """Keep `experiences` a group: typer makes a group of a single command that command itself."""


@experiences.command("peek")
@with_session
def peek(
    session: Session,
    worker: Annotated[int | None, typer.Option(min=0, help="Only batches of this worker.")] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many batches of each worker.")] = 1,
    newest: Annotated[bool, typer.Option("--newest", help="The newest instead of the oldest.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help=f"All workers, not only the first {WORKERS_SHOWN}.")
    ] = False,
) -> None:
    """Show the contents of waiting batches without taking them: metadata, and dtype and shape of each array.

    The batches are downloaded to this machine. One that does not decode is shown with the reason.
    Exit code: 0; 1 if there is no such worker; 2 if the server or the run cannot be read.

    Example: rlbroker experiences peek --run pong --worker 3 --count 2
    """
    from rlbroker.ops.inspect.queues import peek_queue
    from rlbroker.ops.inspect.runs import read_worker_ids

    with session.time_limit():
        existing = read_worker_ids(session.connection, session.keys)
    session.check_worker(worker, existing)
    selected = [worker] if worker is not None else existing if every else existing[:WORKERS_SHOWN]
    queues = []
    for worker_id in selected:
        # One queue at a time: all together may exceed the memory or the timeout.
        with session.time_limit():
            queues.append(peek_queue(session.connection, session.keys, worker_id, count=count, newest=newest))
    if session.as_json:
        session.print_json(
            {
                "run": session.run,
                "workers": [
                    {
                        "worker": queue.worker_id,
                        "waiting": queue.waiting,
                        "in_hand": queue.in_hand,
                        "batches": [_batch_json(batch) for batch in queue.batches],
                    }
                    for queue in queues
                ],
                "not_shown": len(existing) - len(selected) if worker is None else 0,
            }
        )
        return
    if not any(queue.waiting or queue.in_hand for queue in queues):
        session.note("no batches are waiting")
    for queue in queues:
        if queue.waiting or queue.in_hand:
            session.console.print(
                f"worker {queue.worker_id}: {queue.waiting:,} waiting, {queue.in_hand:,} in hand"
            )
        for batch in queue.batches:
            _print_batch(session, batch)
    if worker is None and len(selected) < len(existing):
        more = counted(len(existing) - len(selected), "more worker")
        session.note(f"{more} not shown; use --worker N or --all")


def _print_batch(session: Session, batch: QueuedBatch) -> None:
    facts = [
        f"batch {batch.worker_id}/{batch.batch_id}" + (", retried" if batch.retried else ""),
        (
            "version unknown"
            if batch.version is None
            else f"version {batch.version:,}, {batch.staleness:,} behind"
        ),
        counted(batch.rows, "row") if batch.rows is not None else "",
        (f"{format_bytes(batch.raw_bytes)} of arrays in " if batch.raw_bytes is not None else "")
        + format_bytes(batch.stored_bytes),
        f"sent {age(batch.age_seconds)} ago" if batch.age_seconds is not None else "",
        f"pending at {sanitize(batch.held_by)}, delivery {batch.deliveries:,}" if batch.held_by else "",
    ]
    session.console.print("  " + "; ".join(filter(None, facts)))
    if batch.problem:
        session.console.print(f"    does not decode: {sanitize(batch.problem)}", style="red")
    print_contents(session, batch.contents)


def print_contents(session: Session, contents: Sequence[Content]) -> None:
    """Print the contents of a batch, one line for each array, tensor and plain value."""
    width = max((len(sanitize(content.name)) for content in contents), default=0)
    for content in contents:
        value = sanitize(repr(content.value))
        if content.leaf is not None:
            value = f"{content.kind} {content.dtype} {' × '.join(map(str, content.shape)) or 'scalar'}"
        session.console.print(f"    {sanitize(content.name):{width}}  {value}")


def contents_json(contents: Sequence[Content]) -> list[dict[str, Any]]:
    """Return the contents of a batch for JSON."""
    return [
        {
            "name": content.name,
            "kind": content.kind,
            "dtype": content.dtype or None,
            "shape": list(content.shape) if content.leaf is not None else None,
            "bytes": content.nbytes if content.leaf is not None else None,
        }
        for content in contents
    ]


def _batch_json(batch: QueuedBatch) -> dict[str, Any]:
    names = ("version", "staleness", "rows", "raw_bytes", "stored_bytes", "age_seconds")
    return {
        "id": f"{batch.worker_id}/{batch.batch_id}",
        "retried": batch.retried,
        "in_hand": bool(batch.held_by),
        "held_by": batch.held_by or None,
        "deliveries": batch.deliveries,
        **{name: getattr(batch, name) for name in names},
        "problem": batch.problem or None,
        "contents": contents_json(batch.contents),
    }
