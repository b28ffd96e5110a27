"""The learner of the demo: collect batches, train and publish until the environment is solved."""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from rlbroker.backend.text import counted
from rlbroker.control.drain_signals import DrainSignals
from rlbroker.demo import check_output
from rlbroker.demo.checkpoint import Checkpoint
from rlbroker.demo.dashboard import View
from rlbroker.demo.plot import plot
from rlbroker.demo.policy import HIDDEN, ActorCritic
from rlbroker.demo.ppo import PPO
from rlbroker.demo.retries import Result, retry_during_outage
from rlbroker.demo.rollout import RolloutBatch, make_envs
from rlbroker.demo.training_progress import DemoWorkerStatus, Outcome, Progress, Summary
from rlbroker.errors import ConnectionFailed, InvalidArgument, RunLost
from rlbroker.learner.communicator import WorkerCommunicator
from rlbroker.types import Batch

#: Environment steps per update, at least. With fewer steps the normalised advantages are too noisy.
STEPS_PER_UPDATE = 1024
#: Batches per worker queue: enough that workers do not wait for the learner, and few enough to limit staleness.
MAX_QUEUE_SIZE = 2
#: An environment is solved when the mean return of this many episodes reaches its target.
EPISODES = 100
REPORT_SECONDS = 0.25
#: How long the learner waits for the workers to leave when the run ends.
STOP_SECONDS = 2.0
#: About how much training is lost when the learner dies.
CHECKPOINT_SECONDS = 10.0


class _Statistics:
    """Totals over all collected batches, and what is new since the last report."""

    def __init__(self) -> None:
        self.steps = self.episodes = 0
        self.returns: deque[float] = deque(maxlen=EPISODES)
        self.staleness: Counter[int] = Counter()
        self.newest_batches: dict[int, Batch] = {}
        self._new_returns: list[tuple[int, float]] = []
        self._new_batches: list[tuple[float, int, int]] = []

    @property
    def mean_return(self) -> float | None:
        """The mean return of the last `EPISODES` episodes; None before the end of the first."""
        return sum(self.returns) / len(self.returns) if self.returns else None

    @property
    def mean_staleness(self) -> float:
        """The mean staleness of all batches."""
        total = sum(staleness * count for staleness, count in self.staleness.items())
        return total / max(self.staleness.total(), 1)

    def is_solved(self, target: float | None) -> bool:
        """Return whether the mean return over `EPISODES` episodes has reached the target."""
        mean = self.mean_return
        return target is not None and mean is not None and len(self.returns) == EPISODES and mean >= target

    def add(self, worker_id: int, batch: Batch, seconds: float) -> None:
        """Count a batch that was collected after so many seconds of training."""
        rollout = cast(RolloutBatch, batch)
        returns = rollout["episode_returns"].tolist()
        self.steps += int(rollout["mask"].sum())
        self.episodes += len(returns)
        self.returns += returns
        self.staleness[batch.staleness] += 1
        self.newest_batches[worker_id] = batch
        self._new_returns += [(self.steps, value) for value in returns]
        self._new_batches.append((seconds, worker_id, batch.staleness))

    def new_since_report(self) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[float, int, int], ...]]:
        """Return the new `returns` and `batches` of a `Progress`."""
        return tuple(self._new_returns), tuple(self._new_batches)

    def clear_new(self) -> None:
        """Forget what is new, once it was reported."""
        self._new_returns, self._new_batches = [], []


class Learner:
    """Trains one policy with the batches of a run's workers."""

    def __init__(
        self,
        comm: WorkerCommunicator,
        ppo: PPO,
        *,
        env_id: str,
        target: float | None,
        seconds: float,
        report: Callable[[Progress], None],
        started: float | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Prepare a training run, or continue the one in the checkpoint.

        Args:
            comm: the run's communicator, with a small `max_queue_size`.
            ppo: the policy and its training.
            env_id: the environment that the workers must use.
            target: mean return of 100 episodes at which training ends; None to train for all of `seconds`.
            seconds: limit of the training time, counted from `started`; includes the time before the checkpoint.
            report: receives the progress about four times a second; must return quickly.
            started: `time.monotonic()` of the start; None for now.
            checkpoint: the file for the state; None to start from scratch each time.

        Raises:
            InvalidArgument: the checkpoint belongs to another environment or run.
        """
        self._comm, self._ppo, self._report = comm, ppo, report
        self._env_id, self._target, self._seconds = env_id, target, seconds
        self._started = time.monotonic() if started is None else started
        self._version = self._first_version = 0
        self._statistics = _Statistics()
        self._report_due = 0.0
        self._move_requested = False
        self._checkpoint = checkpoint
        self._checkpoint_due = time.monotonic() + CHECKPOINT_SECONDS
        self._restore(checkpoint.load() if checkpoint else None)

    def run(self) -> Summary:
        """Train, stop the workers, and return the summary. Ctrl-C ends training early.

        After `request_move` the workers are not stopped: they wait until the learner is restarted.
        """
        try:
            outcome = self._train()
        except KeyboardInterrupt:
            outcome = "interrupted"
        except (ConnectionFailed, RunLost):
            if not self._move_requested:
                raise
            outcome = "moved"
        self._seconds = self._elapsed_seconds  # the training time, without the steps below
        self._save()
        if outcome == "moved":
            summary = self._summarize(outcome, ())
            self._comm.cleanup(stop_workers=False)
            return summary
        return self._summarize(outcome, self._stop_workers())

    def request_move(self) -> None:
        """End training soon, so that another process can continue it. Signal handlers may call this method."""
        self._move_requested = True

    def _train(self) -> Outcome:
        self._publish()
        self._first_version = self._version
        batches: list[RolloutBatch] = []
        while not self._move_requested:
            batches += self._collect(timeout=min(REPORT_SECONDS, max(self._seconds_left, 0.0)))
            solved = self._statistics.is_solved(self._target)
            over = solved or self._seconds_left <= 0.0
            if over or time.monotonic() >= self._report_due:
                self._report(self._retry(self._read_progress))
                self._report_due = time.monotonic() + REPORT_SECONDS
            if over:
                return "solved" if solved else "trained" if self._target is None else "not solved in time"
            if sum(int(batch["mask"].sum()) for batch in batches) >= STEPS_PER_UPDATE:
                self._ppo.update(batches)
                self._publish()
                batches = []
                if time.monotonic() >= self._checkpoint_due:
                    self._save()
        if batches:  # they are already acknowledged, so train on them before the checkpoint is saved
            self._ppo.update(batches)
        return "moved"

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        if state["env_id"] != self._env_id:
            raise InvalidArgument(
                f"the checkpoint is of {state['env_id']}, and this learner trains {self._env_id}: name another file"
            )
        self._comm.restore(state["marks"])
        self._ppo.policy.load_state_dict(state["policy"])
        self._ppo.optimizer.load_state_dict(state["optimizer"])
        statistics, progress = self._statistics, state["progress"]
        statistics.steps, statistics.episodes = progress["steps"], progress["episodes"]
        statistics.returns += progress["returns"]
        # The time limit covers all restarts together.
        self._started -= progress.get("seconds", 0.0)

    def _save(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(
                {
                    "env_id": self._env_id,
                    "policy": self._ppo.policy.state_dict(),
                    "optimizer": self._ppo.optimizer.state_dict(),
                    "progress": {
                        "steps": self._statistics.steps,
                        "episodes": self._statistics.episodes,
                        "returns": list(self._statistics.returns),
                        "seconds": self._elapsed_seconds,
                    },
                    "marks": self._comm.marks(),
                }
            )
            self._checkpoint_due = time.monotonic() + CHECKPOINT_SECONDS

    def _retry(self, call: Callable[[], Result]) -> Result:
        return retry_during_outage(call, give_up=lambda: self._move_requested)

    def _publish(self) -> None:
        weights = self._ppo.policy.state_dict()
        self._version = self._retry(lambda: self._comm.send_model_weights(weights).version)

    def _collect(self, timeout: float) -> list[RolloutBatch]:
        batches = []
        for worker_id, batch in self._retry(lambda: self._comm.collect_experiences(timeout=timeout)):
            if batch["env_id"] != self._env_id:
                raise InvalidArgument(
                    f"worker {worker_id} steps {batch['env_id']}, and this learner trains {self._env_id}: "
                    f"start the worker with --env {self._env_id}"
                )
            self._statistics.add(worker_id, batch, self._elapsed_seconds)
            batches.append(cast(RolloutBatch, batch))
        return batches

    @property
    def _elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def _seconds_left(self) -> float:
        return self._seconds - self._elapsed_seconds

    def _read_progress(self) -> Progress:
        queue_sizes = self._comm.get_queue_info()["experience_queue_sizes"]
        statistics = self._statistics
        new_returns, new_batches = statistics.new_since_report()
        progress = Progress(
            seconds=self._elapsed_seconds,
            seconds_left=max(self._seconds_left, 0.0),
            steps=statistics.steps,
            version=self._version,
            episodes=statistics.episodes,
            mean_return=statistics.mean_return,
            target=self._target,
            returns=new_returns,
            batches=new_batches,
            queued=sum(queue_sizes),
            missed=sum(missed.total for missed in self._comm.missed_updates().values()),
            workers=tuple(self._read_workers()),
        )
        statistics.clear_new()  # not before: after a connection error the next report needs it
        return progress

    def _read_workers(self) -> list[DemoWorkerStatus]:
        """Return the status of each worker, with the version of its newest batch.

        The roster's version comes from the heartbeat, which can be a second old.
        """
        statuses = []
        for info in self._comm.workers():
            newest = self._statistics.newest_batches.get(info.worker_id)
            source = info if newest is None else newest
            statuses.append(
                DemoWorkerStatus(
                    info.worker_id, info.host, info.pid, info.state, source.version, source.staleness
                )
            )
        return statuses

    def _stop_workers(self) -> tuple[int, ...]:
        """End the run; return the workers that have not left after `STOP_SECONDS`."""
        deadline = time.monotonic() + STOP_SECONDS
        self._comm.stop_workers(STOP_SECONDS)
        while True:
            # Until a call returns nothing: it acknowledges the batches of the call before.
            while self._comm.collect_experiences():
                pass
            left = tuple(info.worker_id for info in self._comm.workers() if info.state == "alive")
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(0.02)

    def _summarize(self, outcome: Outcome, workers_left: tuple[int, ...]) -> Summary:
        counts = self._comm.get_queue_info()["counts"].values()
        lost: Counter[str] = Counter()
        missed: Counter[str] = Counter()
        for worker_counts in counts:
            lost.update(worker_counts.lost)
            lost["left in the queue"] += worker_counts.waiting + worker_counts.in_hand
        for updates in self._comm.missed_updates().values():
            missed.update(updates.by_reason)
        statistics = self._statistics
        return Summary(
            env_id=self._env_id,
            outcome=outcome,
            seconds=self._seconds,
            steps=statistics.steps,
            episodes=statistics.episodes,
            versions=self._version - self._first_version + 1 if self._version else 0,
            mean_return=statistics.mean_return,
            target=self._target,
            mean_staleness=statistics.mean_staleness,
            max_staleness=max(statistics.staleness, default=0),
            batches_produced=sum(worker_counts.produced for worker_counts in counts),
            batches_delivered=sum(worker_counts.delivered for worker_counts in counts),
            batches_lost=dict(+lost),
            missed=dict(+missed),
            workers_left=workers_left,
        )


@dataclass(frozen=True)
class LearnerSettings:
    """The options of `rlbroker learner`."""

    run: str
    env_id: str = "CartPole-v1"
    workers: int = 2
    seed: int | None = None
    seconds: float = 180.0
    target: float | None = None  #: None for the environment's own target, if it has one
    output: Path | None = None
    checkpoint: Path | None = None
    url: str | None = None
    hidden: int = HIDDEN


def learn(settings: LearnerSettings, view: View, started: float | None = None) -> Summary:
    """Connect, train and draw the picture; return the summary.

    Raises:
        InvalidArgument: the environment is unknown, or the demo cannot train on it.
        PeerError: the server refused the learner, or could not be reached in time.
    """
    check_output(settings.output)
    checkpoint = Checkpoint(settings.checkpoint) if settings.checkpoint else None
    torch.set_num_threads(1)  # networks of this size are slower with more threads
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    envs = make_envs(settings.env_id, 1)
    policy = ActorCritic(envs.single_observation_space, envs.single_action_space, settings.hidden)
    target = settings.target
    if target is None and envs.spec is not None:
        target = envs.spec.reward_threshold
    envs.close()
    history: list[Progress] = []

    def report(progress: Progress) -> None:
        history.append(progress)
        view.update(progress)

    with (
        WorkerCommunicator(
            settings.workers, MAX_QUEUE_SIZE, 10.0, redis_url=settings.url, run=settings.run
        ) as comm,
        view,
    ):
        learner = Learner(
            comm,
            PPO(policy),
            env_id=settings.env_id,
            target=target,
            seconds=settings.seconds,
            report=report,
            started=started,
            checkpoint=checkpoint,
        )
        signals = DrainSignals(learner.request_move)
        signals.watch(signal.SIGTERM, signal.SIGUSR1)
        try:
            summary = learner.run()
        finally:
            signals.restore()
    if settings.output is not None and summary.outcome not in ("interrupted", "moved"):
        plot(
            settings.output,
            history,
            f"PPO on {settings.env_id}, {counted(settings.workers, 'worker')}, through rlbroker",
        )
    return summary
