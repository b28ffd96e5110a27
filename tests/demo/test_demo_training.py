"""Tests of the demo's learner and workers, in threads of one process, with a server."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self
from unittest import mock

import pytest
import torch
from conftest import Server

from rlbroker import (
    ConnectionFailed,
    InvalidArgument,
    RunLost,
    SendReceipt,
    Unconfirmed,
    WeightsMismatch,
    WorkerClient,
    WorkerCommunicator,
)
from rlbroker.demo.checkpoint import Checkpoint
from rlbroker.demo.policy import ActorCritic
from rlbroker.demo.ppo import PPO
from rlbroker.demo.ppo_learner import MAX_QUEUE_SIZE, Learner
from rlbroker.demo.rollout import make_envs
from rlbroker.demo.rollout_worker import WorkerSettings, join, run_worker
from rlbroker.demo.training_progress import Progress

ENV = "CartPole-v1"


@pytest.fixture(autouse=True)
def quick_threads() -> Iterator[None]:
    """Switch threads often: torch releases the GIL at each operation, and would wait 5 ms to get it back."""
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(0.0002)
    yield
    torch.set_num_threads(before[0])
    sys.setswitchinterval(before[1])


class WorkerThreads:
    """Workers in threads. Leaving the context joins the threads and raises their exceptions."""

    def __init__(self, connect: Callable[[], dict[str, Any]], run: str, count: int) -> None:
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._work, args=(connect(), run, number), daemon=True)
            for number in range(count)
        ]

    def _work(self, endpoint: dict[str, Any], run: str, number: int) -> None:
        envs = make_envs(ENV, 4)
        try:
            with WorkerClient(run=run, worker_id=number, timeout=5.0, **endpoint) as worker:
                run_worker(worker, envs, env_id=ENV, seed=1, timeout=10.0)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._errors.append(error)
        finally:
            envs.close()

    @property
    def running(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(10.0)
            assert not thread.is_alive(), "a worker did not stop"
        for error in self._errors:
            raise error


def make_ppo(env_id: str = ENV) -> PPO:
    torch.manual_seed(1)
    return PPO(ActorCritic(*_spaces(env_id)))


def make_learner(
    comm: WorkerCommunicator, env_id: str = ENV, *, ppo: PPO | None = None, **given: Any
) -> Learner:
    settings: dict[str, Any] = {"env_id": env_id, "target": None, "seconds": 10.0, "report": lambda _: None}
    return Learner(comm, ppo or make_ppo(env_id), **{**settings, **given})


def test_training_ends_when_solved_and_accounts_for_every_batch(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator]
) -> None:
    reports: list[Progress] = []
    with learner(2, max_queue_size=MAX_QUEUE_SIZE) as comm, WorkerThreads(server.connection_settings, run, 2):
        # 100 episodes reach this target. They take about 2000 steps, so at least two versions.
        summary = make_learner(comm, target=1.0, seconds=60.0, report=reports.append).run()
    assert summary.outcome == "solved"
    assert summary.mean_return is not None
    assert summary.mean_return >= 1.0
    assert summary.versions >= 2
    assert summary.episodes >= 100
    assert summary.workers_left == ()
    assert summary.batches_produced == summary.batches_delivered + sum(summary.batches_lost.values())
    assert summary.batches_delivered >= 4
    assert "left in the queue" not in summary.batches_lost
    assert sum(len(report.returns) for report in reports) == summary.episodes
    assert {worker for report in reports for _, worker, _ in report.batches} == {0, 1}
    assert {worker.worker_id for worker in reports[-1].workers} == {0, 1}


def test_training_ends_at_its_time_limit_without_any_worker(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator]
) -> None:
    with learner() as comm:
        summary = make_learner(comm, target=475.0, seconds=0.2).run()
    assert summary.outcome == "not solved in time"
    assert summary.steps == summary.batches_produced == 0
    assert summary.mean_return is None


def test_ctrl_c_ends_training_and_stops_the_workers(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator]
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.steps:
            raise KeyboardInterrupt

    with learner() as comm, WorkerThreads(server.connection_settings, run, 1):
        summary = make_learner(comm, report=interrupt).run()
    assert summary.outcome == "interrupted"
    assert summary.steps > 0
    assert summary.workers_left == ()


def test_a_worker_with_another_environment_is_refused_with_its_name(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], worker: Callable[..., WorkerClient]
) -> None:
    comm, other = learner(), worker(7)
    other.send_experiences({"env_id": "Acrobot-v1"})
    with pytest.raises(InvalidArgument, match=r"worker 7 steps Acrobot-v1.*--env CartPole-v1"):
        make_learner(comm).run()


def test_weights_for_another_environment_are_an_error_in_the_worker(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], worker: Callable[..., WorkerClient]
) -> None:
    comm = learner()
    other = worker(0)
    envs = make_envs("Acrobot-v1", 1)
    comm.send_model_weights(ActorCritic(*_spaces(ENV)).state_dict())
    with pytest.raises(WeightsMismatch):
        run_worker(other, envs, env_id="Acrobot-v1", seed=None, timeout=10.0)
    envs.close()


def test_a_worker_survives_an_outage_longer_than_its_timeout_and_sends_each_batch_once(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], worker: Callable[..., WorkerClient]
) -> None:
    comm, other, envs = learner(1), worker(0), make_envs(ENV, 1)
    comm.send_model_weights(ActorCritic(*_spaces(ENV)).state_dict())
    send, tried = other.send_experiences, []
    outage = ["", "unconfirmed", "unreachable", "lost"]

    def send_through_outage(batch: dict[str, Any]) -> SendReceipt:
        tried.append(batch)
        state = outage.pop(0) if outage else ""
        if state == "unreachable":
            raise ConnectionFailed("the server is unreachable")
        if state == "lost":
            raise RunLost("the server restarted without data")
        receipt = send(batch)
        if state == "unconfirmed":
            raise Unconfirmed("the reply was lost", receipt)
        if not outage:
            comm.send_control_command("stop")
        return receipt

    with closing(envs), mock.patch.object(other, "send_experiences", send_through_outage):
        sent = run_worker(other, envs, env_id=ENV, seed=1, timeout=10.0)

    assert len(tried) == 5 + (sent - 3)  # one more batch may be sent before the stop command arrives
    assert tried[0] is not tried[1] is not tried[2]
    assert tried[2] is tried[3] is tried[4]
    assert len(comm.collect_experiences(timeout=5.0)) == sent


def test_a_learner_survives_an_outage_longer_than_its_timeout(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator]
) -> None:
    with learner() as comm, WorkerThreads(server.connection_settings, run, 1), ExitStack() as faults:
        for name in ("send_model_weights", "collect_experiences", "get_queue_info"):
            outage = [ConnectionFailed("away"), RunLost("restarted without data"), *[mock.DEFAULT] * 10_000]
            away = mock.Mock(side_effect=outage, wraps=getattr(comm, name))
            faults.enter_context(mock.patch.object(comm, name, away))
        summary = make_learner(comm, target=1.0, seconds=60.0).run()
    assert summary.outcome == "solved"
    assert summary.batches_produced == summary.batches_delivered + sum(summary.batches_lost.values())


def test_a_worker_gives_up_after_the_longest_outage(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], worker: Callable[..., WorkerClient]
) -> None:
    comm, other, envs = learner(1), worker(0), make_envs(ENV, 1)
    comm.send_model_weights(ActorCritic(*_spaces(ENV)).state_dict())
    away = mock.Mock(side_effect=ConnectionFailed("away"))
    with (
        closing(envs),
        mock.patch.object(other, "send_experiences", away),
        mock.patch("rlbroker.demo.retries.OUTAGE_SECONDS", 0.05),
        pytest.raises(ConnectionFailed),
    ):
        run_worker(other, envs, env_id=ENV, seed=1, timeout=10.0)


def _spaces(env_id: str) -> tuple[Any, Any]:
    envs = make_envs(env_id, 1)
    envs.close()
    return envs.single_observation_space, envs.single_action_space


def test_a_restarted_learner_continues_from_its_checkpoint(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "state.pt")
    with learner() as comm, WorkerThreads(server.connection_settings, run, 1) as workers:

        def request_move(progress: Progress) -> None:
            if progress.version > 2:
                first.request_move()

        first_ppo, second_ppo = make_ppo(), make_ppo()
        reports: list[Progress] = []
        first = make_learner(comm, ppo=first_ppo, checkpoint=checkpoint, report=request_move)
        before = first.run()
        assert before.outcome == "moved"
        assert workers.running
        with learner() as again:
            second = make_learner(
                again, ppo=second_ppo, checkpoint=checkpoint, seconds=0.0, report=reports.append
            )
            trained, loaded = (ppo.policy.state_dict() for ppo in (first_ppo, second_ppo))
            assert all(torch.equal(trained[name], loaded[name]) for name in trained)
            after = second.run()
    assert after.outcome == "trained"
    assert after.episodes >= before.episodes > 0
    assert after.steps >= before.steps > 1024
    assert after.seconds > before.seconds, "the training time before the checkpoint was forgotten"
    assert reports[-1].version > before.versions


def test_a_checkpoint_of_another_kind_or_environment_is_refused(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"something else")
    comm = learner()
    with pytest.raises(InvalidArgument, match=r"state\.pt is not a checkpoint"):
        make_learner(comm, checkpoint=Checkpoint(path))
    with pytest.raises(InvalidArgument, match="is not a writable directory"):
        Checkpoint(tmp_path / "nowhere" / "state.pt")
    path.unlink()
    make_learner(comm, checkpoint=Checkpoint(path), seconds=0.0).run()
    with pytest.raises(
        InvalidArgument, match="checkpoint is of CartPole-v1, and this learner trains Acrobot-v1"
    ):
        make_learner(comm, "Acrobot-v1", checkpoint=Checkpoint(path))


def test_a_worker_waits_for_the_learner_that_loads_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def client(**_: Any) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise RunLost("the server does not have rlbroker's scripts")
        return "joined"

    monkeypatch.setattr("rlbroker.demo.rollout_worker.WorkerClient", client)
    assert join(WorkerSettings("pong", timeout_seconds=600.0)) == "joined"  # type: ignore[comparison-overlap]  # a fake client
    tries.clear()
    with pytest.raises(RunLost):
        join(WorkerSettings("pong", timeout_seconds=0.0))
