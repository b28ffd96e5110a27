"""The learner's side of the demo: collect, train, publish, until the environment is solved."""

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
from rlbroker.demo.retries import Result, outlast
from rlbroker.demo.rollout import RolloutBatch, make_envs
from rlbroker.demo.training_progress import DemoWorkerStatus, Outcome, Progress, Summary
from rlbroker.errors import ConnectionFailed, InvalidArgument, RunLost
from rlbroker.learner.communicator import WorkerCommunicator
from rlbroker.types import Batch

#: Environment steps in one update, at least; PPO needs enough for advantages that are worth normalising.
STEPS_PER_UPDATE = 1024
#: A few batches per worker: enough that nobody waits for the learner's round trips, and few enough that what
#: waits is not stale.
MAX_QUEUE_SIZE = 2
#: An environment is solved when the mean return of so many episodes reaches its target.
EPISODES = 100
REPORT_SECONDS = 0.25
#: How long the workers get to obey "stop" and to leave the run.
STOP_SECONDS = 2.0
#: How much training a learner that dies loses, about.
CHECKPOINT_SECONDS = 10.0


class Learner:
    """Trains one policy with what the workers of a run send."""

    def __init__(
        self,
        comm: WorkerCommunicator,
        ppo: PPO,
        *,
        env_id: str,
        target: float | None,
        seconds: float,
        report: Callable[[Progress], None],
        began: float | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Prepare a training run, or go on with the one in the checkpoint.

        Args:
            comm: the run's communicator, with a small `max_queue_size`.
            ppo: the policy and how to train it.
            env_id: the environment that the workers should step.
            target: mean return of 100 episodes at which training ends; None to train until the time is up.
            seconds: when training ends anyway, counted from `began`, and what was used before the checkpoint counts.
            report: gets the state about four times a second; must be quick.
            began: `time.monotonic()` of the beginning; now, if None.
            checkpoint: where the state is kept; None to begin anew each time.

        Raises:
            InvalidArgument: the checkpoint is of another environment, or run.
        """
        self._comm, self._ppo, self._report = comm, ppo, report
        self._env_id, self._target, self._seconds = env_id, target, seconds
        self._began = time.monotonic() if began is None else began
        self._version = self._first_version = 0
        self._steps = self._episodes = 0
        self._returns: deque[float] = deque(maxlen=EPISODES)
        self._staleness: Counter[int] = Counter()
        self._newest: dict[int, Batch] = {}
        # What the next report tells.
        self._new_returns: list[tuple[int, float]] = []
        self._new_batches: list[tuple[float, int, int]] = []
        self._report_due = 0.0
        self._moving = False
        self._checkpoint = checkpoint
        self._checkpoint_due = time.monotonic() + CHECKPOINT_SECONDS
        self._resume(checkpoint.load() if checkpoint else None)

    def run(self) -> Summary:
        """Train, stop the workers, and return what came of it. Ctrl-C ends training early.

        After `move` the workers are not stopped: they wait for this learner to come back.
        """
        try:
            outcome = self._train()
        except KeyboardInterrupt:
            outcome = "interrupted"
        except (ConnectionFailed, RunLost):
            if not self._moving:
                raise
            outcome = "moved"
        self._seconds = time.monotonic() - self._began  # what follows is no training
        self._save()
        if outcome == "moved":
            summary = self._summary(outcome, ())
            self._comm.cleanup(over=False)
            return summary
        return self._summary(outcome, self._stop_workers())

    def move(self) -> None:
        """End training soon, to go on with it in another process. Signal handlers may call it."""
        self._moving = True

    def _train(self) -> Outcome:
        self._publish()
        self._first_version = self._version
        batches: list[RolloutBatch] = []
        while not self._moving:
            batches += self._collect(timeout=min(REPORT_SECONDS, max(self._seconds_left, 0.0)))
            solved = (
                self._target is not None and len(self._returns) == EPISODES and self._mean >= self._target
            )
            over = solved or self._seconds_left <= 0.0
            if over or time.monotonic() >= self._report_due:
                self._report(self._outlast(self._progress))
                self._report_due = time.monotonic() + REPORT_SECONDS
            if over:
                return "solved" if solved else "trained" if self._target is None else "not solved in time"
            if sum(int(batch["mask"].sum()) for batch in batches) >= STEPS_PER_UPDATE:
                self._ppo.update(batches)
                self._publish()
                batches = []
                if time.monotonic() >= self._checkpoint_due:
                    self._save()
        if batches:  # they count as collected, so they are not to be lost
            self._ppo.update(batches)
        return "moved"

    def _resume(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        if state["env_id"] != self._env_id:
            raise InvalidArgument(
                f"the checkpoint is of {state['env_id']}, and this learner trains {self._env_id}: name another file"
            )
        self._comm.restore(state["marks"])
        self._ppo.policy.load_state_dict(state["policy"])
        self._ppo.optimizer.load_state_dict(state["optimizer"])
        self._steps, self._episodes = state["progress"]["steps"], state["progress"]["episodes"]
        self._returns += state["progress"]["returns"]
        # Else each start would have all of the time again.
        self._began -= state["progress"].get("seconds", 0.0)

    def _save(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(
                {
                    "env_id": self._env_id,
                    "policy": self._ppo.policy.state_dict(),
                    "optimizer": self._ppo.optimizer.state_dict(),
                    "progress": {
                        "steps": self._steps,
                        "episodes": self._episodes,
                        "returns": list(self._returns),
                        "seconds": time.monotonic() - self._began,
                    },
                    "marks": self._comm.marks(),
                }
            )
            self._checkpoint_due = time.monotonic() + CHECKPOINT_SECONDS

    def _outlast(self, call: Callable[[], Result]) -> Result:
        return outlast(call, leaving=lambda: self._moving)

    def _publish(self) -> None:
        weights = self._ppo.policy.state_dict()
        self._version = self._outlast(lambda: self._comm.send_model_weights(weights).version)

    def _collect(self, timeout: float) -> list[RolloutBatch]:
        batches = []
        for worker_id, batch in self._outlast(lambda: self._comm.collect_experiences(timeout=timeout)):
            if batch["env_id"] != self._env_id:
                raise InvalidArgument(
                    f"worker {worker_id} steps {batch['env_id']}, and this learner trains {self._env_id}: "
                    f"start the worker with --env {self._env_id}"
                )
            rollout = cast(RolloutBatch, batch)
            batches.append(rollout)
            returns = rollout["episode_returns"].tolist()
            self._steps += int(rollout["mask"].sum())
            self._episodes += len(returns)
            self._returns += returns
            self._new_returns += [(self._steps, one) for one in returns]
            self._staleness[batch.staleness] += 1
            self._new_batches.append((self._seconds - self._seconds_left, worker_id, batch.staleness))
            self._newest[worker_id] = batch
        return batches

    @property
    def _seconds_left(self) -> float:
        return self._began + self._seconds - time.monotonic()

    @property
    def _mean(self) -> float:
        return sum(self._returns) / len(self._returns)

    def _progress(self) -> Progress:
        counts = self._comm.get_queue_info()["experience_queue_sizes"]
        progress = Progress(
            seconds=self._seconds - self._seconds_left,
            seconds_left=max(self._seconds_left, 0.0),
            steps=self._steps,
            version=self._version,
            episodes=self._episodes,
            mean_return=self._mean if self._returns else None,
            target=self._target,
            returns=tuple(self._new_returns),
            batches=tuple(self._new_batches),
            queued=sum(counts),
            missed=sum(one.total for one in self._comm.missed_updates().values()),
            workers=tuple(self._workers()),
        )
        self._new_returns, self._new_batches = [], []
        return progress

    def _workers(self) -> list[DemoWorkerStatus]:
        """Return the roster. A heartbeat's version is a second old; that of the newest batch is not."""
        found = []
        for info in self._comm.workers():
            newest = self._newest.get(info.worker_id)
            seen = info if newest is None else newest
            found.append(
                DemoWorkerStatus(
                    info.worker_id, info.host, info.pid, info.state, seen.version, seen.staleness
                )
            )
        return found

    def _stop_workers(self) -> tuple[int, ...]:
        """Tell the workers to stop; return those that have not left a few seconds later."""
        self._comm.send_control_command("stop")
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            # Until the call that finds nothing, which acknowledges what came before.
            while self._comm.collect_experiences():
                pass
            left = tuple(info.worker_id for info in self._comm.workers() if info.state == "alive")
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(0.02)

    def _summary(self, outcome: Outcome, workers_left: tuple[int, ...]) -> Summary:
        counts = self._comm.get_queue_info()["counts"].values()
        lost: Counter[str] = Counter()
        missed: Counter[str] = Counter()
        for one in counts:
            lost.update(one.lost)
            lost["left in the queue"] += one.waiting + one.in_hand
        for updates in self._comm.missed_updates().values():
            missed.update(updates.by_reason)
        batches = self._staleness.total()
        return Summary(
            env_id=self._env_id,
            outcome=outcome,
            seconds=self._seconds,
            steps=self._steps,
            episodes=self._episodes,
            versions=self._version - self._first_version + 1 if self._version else 0,
            mean_return=self._mean if self._returns else None,
            target=self._target,
            mean_staleness=sum(n * count for n, count in self._staleness.items()) / max(batches, 1),
            max_staleness=max(self._staleness, default=0),
            batches_produced=sum(one.produced for one in counts),
            batches_delivered=sum(one.delivered for one in counts),
            batches_lost=dict(+lost),
            missed=dict(+missed),
            workers_left=workers_left,
        )


@dataclass(frozen=True)
class LearnerSettings:
    """What `rlbroker learner` was asked to do."""

    run: str
    env_id: str = "CartPole-v1"
    workers: int = 2
    seed: int | None = None
    seconds: float = 180.0
    target: float | None = None  #: None for the environment's own, if it has one
    output: Path | None = None
    checkpoint: Path | None = None
    url: str | None = None
    hidden: int = HIDDEN


def learn(settings: LearnerSettings, view: View, began: float | None = None) -> Summary:
    """Connect, train, and draw the picture; return what came of it.

    Raises:
        InvalidArgument: the environment is unknown, or none that the demo can train on.
        PeerError: the server refused, or could not be reached in time.
    """
    check_output(settings.output)
    checkpoint = Checkpoint(settings.checkpoint) if settings.checkpoint else None
    torch.set_num_threads(1)  # networks this small are slower with more
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
            began=began,
            checkpoint=checkpoint,
        )
        signals = DrainSignals(learner.move)
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
