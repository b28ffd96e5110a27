"""Clients whose process died: they left nothing of theirs behind here, and told the server nothing."""

from __future__ import annotations

from rlbroker import WorkerClient, WorkerCommunicator


def end_at_once(client: WorkerCommunicator | WorkerClient) -> None:
    """Close a client without asking the server, and end its threads, as the end of its process does."""
    life = client._life
    threads = life._threads
    for thread in threads:
        thread.request_stop()
    life._close_all()
    for thread in threads:
        assert thread.stop(10.0)
    life._finalizer.detach()
