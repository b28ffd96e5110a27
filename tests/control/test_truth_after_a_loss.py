"""After a loss, while workers answer, the record says what each worker really ran: nothing more and nothing less."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from conftest import Server, wait_until

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.control.ledger_reader import read_outcomes
from rlbroker.errors import PeerError

Learner = Callable[..., WorkerCommunicator]
Worker = Callable[..., WorkerClient]


class HeldSettling:
    """Keeps a learner from settling acknowledgements until `release`."""

    def __init__(self, comm: WorkerCommunicator) -> None:
        self._ledger, self._settle = comm._ledger, comm._ledger.settle
        comm._ledger.settle = lambda workers, deadline: None  # type: ignore[method-assign]

    def release(self) -> None:
        self._ledger.settle = self._settle  # type: ignore[method-assign]


def versions_run(client: WorkerClient, model: dict[str, Any], until: int) -> None:
    """Let a worker apply versions until it runs this one."""
    wait_until(f"version {until} is applied", lambda: client.poll(model) and client.version == until)


def check_record(
    comm: WorkerCommunicator, client: WorkerClient, model: dict[str, Any], missed: list[Any]
) -> None:
    """Check that the learner's record is final, and that it consists of what the worker ran and of these records.

    After a loss the learner may publish more than once.
    """

    def is_settled() -> bool:
        client.poll(model)
        return read_outcomes(comm._connection, comm._keys, [0])[0].settled == comm.version == client.version

    wait_until("all is settled", is_settled)
    wait_until("the worker is known", lambda: 0 in comm.missed_updates())
    assert missed_versions(comm) == missed
    assert applied_total(comm) == comm.version - sum(last - first + 1 for first, last, _ in missed)


def missed_versions(comm: WorkerCommunicator, worker: int = 0) -> list[tuple[int, int, str]]:
    return [
        (one.first, one.last, one.why)
        for one in comm.missed_updates()[worker].records
        if one.what == "weights"
    ]


def applied_total(comm: WorkerCommunicator, worker: int = 0) -> int:
    return read_outcomes(comm._connection, comm._keys, [worker])[worker].applied_total


def test_a_version_acknowledged_before_a_loss_is_not_recorded_as_superseded(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, client, model = learner(), worker(), dict[str, Any]()
    comm.send_model_weights({"x": 1})
    versions_run(client, model, 1)
    wait_until("version 1 is settled", lambda: applied_total(comm) == 1)
    settling = HeldSettling(comm)
    comm.send_model_weights({"x": 2})
    versions_run(client, model, 2)
    # Another part of the worker notices the loss first and rejoins. Before the inbox is told, the worker applies the
    # next version and acknowledges it.
    rejoined, told = threading.Event(), threading.Event()
    maintain = client._heartbeat._maintain

    def maintain_late(returned: bool) -> None:
        if returned:
            rejoined.set()
            told.wait(10.0)
        maintain(returned)

    client._heartbeat._maintain = maintain_late
    server.client.flushall()
    assert rejoined.wait(10.0)
    wait_until("the learner publishes again", lambda: comm.version == 3)
    versions_run(client, model, 3)
    told.set()
    wait_until(
        "all is acknowledged",
        lambda: not client._inbox.acknowledgements.unsent and not client._inbox.acknowledgements.stale,
    )
    settling.release()
    check_record(comm, client, model, [])


def test_versions_run_before_a_loss_are_not_recorded_as_missed_by_the_process_before(
    server: Server, learner: Learner, worker: Worker
) -> None:
    comm, earlier, model = learner(), worker(0), dict[str, Any]()
    comm.send_model_weights({"x": 1})
    versions_run(earlier, model, 1)
    wait_until("version 1 is settled", lambda: applied_total(comm) == 1)
    settling = HeldSettling(comm)
    client = worker(0)
    for version in (2, 3):
        comm.send_model_weights({"x": version})
        versions_run(client, model, version)
    server.client.flushall()  # what the new process wrote is lost, and it writes that again
    with suppress(PeerError):  # the earlier process does not know yet that it was replaced, and returns first
        earlier._inbox.mark_stale()
        earlier._inbox.acknowledgements.send()
    versions_run(client, model, 4)
    settling.release()
    check_record(comm, client, model, [])


def test_a_version_that_is_acknowledged_before_its_publication_has_returned_counts_as_applied(
    server: Server, learner: Learner, worker: Worker, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, client, model = learner(), worker(), dict[str, Any]()
    comm.send_model_weights({"x": 1})
    versions_run(client, model, 1)
    wait_until("version 1 is settled", lambda: applied_total(comm) == 1)
    # The server has committed version 2, and the learner's thread has not read the reply yet when the server loses it.
    committer = comm._publisher._committer
    run, committed, read_reply = committer._channel.run, threading.Event(), threading.Event()

    def run_late(*arguments: Any) -> Any:
        reply = run(*arguments)
        committed.set()
        read_reply.wait(10.0)
        return reply

    monkeypatch.setattr(committer._channel, "run", run_late)
    publishing = threading.Thread(target=comm.send_model_weights, args=({"x": 2},))
    settling = HeldSettling(comm)
    publishing.start()
    assert committed.wait(10.0)
    versions_run(client, model, 2)
    server.client.flushall()
    wait_until("it is acknowledged again", lambda: server.client.exists(keys.acknowledgements(0)))
    wait_until("all is acknowledged", lambda: server.client.xlen(keys.acknowledgements(0)) >= 1)
    settling.release()
    wait_until("version 2 is settled", lambda: server.client.xlen(keys.acknowledgements(0)) == 0)
    read_reply.set()
    publishing.join()
    versions_run(client, model, 3)
    check_record(comm, client, model, [])


def test_a_failed_command_is_not_waited_for_again(learner: Learner, worker: Worker, server: Server) -> None:
    """What the learner remembers counts until it has written that back to a server that lost everything."""
    comm, client = learner(), worker()
    command = comm.send_control_command("unheard")
    wait_until("it is settled", lambda: client.poll() or command.outcomes()[0].state == "unknown")
    comm._thread.stop(5.0)
    server.client.flushall()
    assert command.outcomes()[0].state == "unknown"
    comm._maintenance.restore()
