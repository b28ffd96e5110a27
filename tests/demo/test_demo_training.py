"""The demo's learner and workers, in threads of one process, through a server."""

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
    """Let threads share two cores: torch gives the GIL away at each operation, to get it back 5 ms later."""
    before = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(0.0002)
    yield
    torch.set_num_threads(before[0])
    sys.setswitchinterval(before[1])


class Team:
    """Workers in threads; leaving the block waits for them and raises what they raised."""

    def __init__(self, connection_settings: Callable[[], dict[str, Any]], run: str, count: int) -> None:
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._work, args=(connection_settings(), run, number), daemon=True)
            for number in range(count)
        ]

    def _work(self, connection_settings: dict[str, Any], run: str, number: int) -> None:
        envs = make_envs(ENV, 4)
        try:
            with WorkerClient(run=run, worker_id=number, timeout=5.0, **connection_settings) as worker:
                run_worker(worker, envs, env_id=ENV, seed=1, timeout=10.0)
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            self._errors.append(error)
        finally:
            envs.close()

    @property
    def working(self) -> bool:
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


def make_learner(comm: WorkerCommunicator, env_id: str = ENV, **given: Any) -> Learner:
    torch.manual_seed(1)
    envs = make_envs(env_id, 1)
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space)
    envs.close()
    settings: dict[str, Any] = {"env_id": env_id, "target": None, "seconds": 10.0, "report": lambda _: None}
    return Learner(comm, PPO(policy), **{**settings, **given})


def test_training_ends_when_solved_and_accounts_for_every_batch(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator]
) -> None:
    reports: list[Progress] = []
    with learner(2, max_queue_size=MAX_QUEUE_SIZE) as comm, Team(server.connection_settings, run, 2):
        # Whoever plays 100 episodes has solved this: about 2000 steps, and so two versions.
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


def test_training_ends_when_the_time_is_up_though_no_worker_came(
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

    with learner() as comm, Team(server.connection_settings, run, 1):
        summary = make_learner(comm, report=interrupt).run()
    assert summary.outcome == "interrupted"
    assert summary.steps > 0
    assert summary.workers_left == ()


def test_a_worker_in_another_environment_is_refused_by_name(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], worker: Callable[..., WorkerClient]
) -> None:
    comm, other = learner(), worker(7)
    other.send_experiences({"env_id": "Acrobot-v1"})
    with pytest.raises(InvalidArgument, match=r"worker 7 steps Acrobot-v1.*--env CartPole-v1"):
        make_learner(comm).run()


def test_a_worker_whose_environment_does_not_fit_gets_an_error(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], worker: Callable[..., WorkerClient]
) -> None:
    comm = learner()
    other = worker(0)
    envs = make_envs("Acrobot-v1", 1)
    comm.send_model_weights(ActorCritic(*_spaces(ENV)).state_dict())
    with pytest.raises(WeightsMismatch):
        run_worker(other, envs, env_id="Acrobot-v1", seed=None, timeout=10.0)
    envs.close()


def test_a_worker_outlasts_an_outage_longer_than_its_timeout_and_sends_each_batch_once(
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
            raise ConnectionFailed("no way to the server")
        if state == "lost":
            raise RunLost("the server came back empty")
        receipt = send(batch)
        if state == "unconfirmed":
            raise Unconfirmed("the answer was lost", receipt)
        if not outage:
            comm.send_control_command("stop")
        return receipt

    with closing(envs), mock.patch.object(other, "send_experiences", send_through_outage):
        sent = run_worker(other, envs, env_id=ENV, seed=1, timeout=10.0)

    assert len(tried) == 5 + (sent - 3)  # one more may go out before the stop has arrived
    assert tried[0] is not tried[1] is not tried[2]
    assert tried[2] is tried[3] is tried[4]
    assert len(comm.collect_experiences(timeout=5.0)) == sent


def test_a_learner_outlasts_an_outage_longer_than_its_timeout(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator]
) -> None:
    with learner() as comm, Team(server.connection_settings, run, 1), ExitStack() as faults:
        for name in ("send_model_weights", "collect_experiences", "get_queue_info"):
            outage = [ConnectionFailed("away"), RunLost("came back empty"), *[mock.DEFAULT] * 10_000]
            away = mock.Mock(side_effect=outage, wraps=getattr(comm, name))
            faults.enter_context(mock.patch.object(comm, name, away))
        summary = make_learner(comm, target=1.0, seconds=60.0).run()
    assert summary.outcome == "solved"
    assert summary.batches_produced == summary.batches_delivered + sum(summary.batches_lost.values())


def test_a_worker_gives_up_on_a_server_that_is_away_for_too_long(
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


def test_a_learner_goes_on_from_its_checkpoint(
    server: Server, run: str, opened: ExitStack, learner: Callable[..., WorkerCommunicator], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "state.pt")
    with learner() as comm, Team(server.connection_settings, run, 1) as team:

        def move(progress: Progress) -> None:
            if progress.version > 2:
                first.move()

        first = make_learner(comm, checkpoint=checkpoint, report=move)
        before = first.run()
        assert before.outcome == "moved"
        assert team.working
        with learner() as again:
            second = make_learner(again, checkpoint=checkpoint, seconds=0.0)
            trained, loaded = (one._ppo.policy.state_dict() for one in (first, second))
            assert all(torch.equal(trained[name], loaded[name]) for name in trained)
            after = second.run()
    assert after.outcome == "trained"
    assert after.episodes >= before.episodes > 0
    assert after.steps >= before.steps > 1024
    assert after.seconds > before.seconds, "the time that was used is forgotten"
    assert second._first_version > before.versions


def test_a_checkpoint_of_something_else_is_refused(
    opened: ExitStack, learner: Callable[..., WorkerCommunicator], tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"something else")
    comm = learner()
    with pytest.raises(InvalidArgument, match=r"state\.pt is no checkpoint"):
        make_learner(comm, checkpoint=Checkpoint(path))
    with pytest.raises(InvalidArgument, match="no writable directory"):
        Checkpoint(tmp_path / "nowhere" / "state.pt")
    path.unlink()
    make_learner(comm, checkpoint=Checkpoint(path), seconds=0.0).run()
    with pytest.raises(
        InvalidArgument, match="checkpoint is of CartPole-v1, and this learner trains Acrobot-v1"
    ):
        make_learner(comm, "Acrobot-v1", checkpoint=Checkpoint(path))


def test_a_worker_waits_for_the_learner_that_brings_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
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
