"""`WorkerCommunicator`: the learner's side of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import redis

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.lifetime import Lifetime, is_exiting
from rlbroker.codec.foreign import has_method, is_mapping
from rlbroker.codec.refusals import type_name
from rlbroker.codec.signing import SigningKey
from rlbroker.config import (
    DEFAULT_RUN,
    Acknowledge,
    HostCacheSetting,
    RunSettings,
    SamplesPerInsert,
    SigningKeySetting,
    WhenFull,
    check_positive_int,
    check_timeout_seconds,
    check_worker_id,
    host_cache_place,
    signing_secret,
)
from rlbroker.control.commands import Command, ends_run
from rlbroker.errors import InvalidArgument, RoundIncomplete, UnsupportedType
from rlbroker.experience.counts import read_counts
from rlbroker.experience.marks import parse_marks
from rlbroker.experience.rounds import Round
from rlbroker.learner.cleanup import Cleanup
from rlbroker.learner.maintenance import Maintenance
from rlbroker.learner.options import LearnerOptions
from rlbroker.learner.parts import LearnerParts
from rlbroker.learner.run_end import RunEnd
from rlbroker.learner.run_scripts import SCRIPTS
from rlbroker.metrics.tensorboard import ScalarLog, ScalarTarget, SummaryWriter
from rlbroker.receipts import PublishReceipt
from rlbroker.types import (
    Batch,
    CleanupReport,
    DeadLetter,
    MissedUpdates,
    Outcome,
    QueueInfo,
    WorkerInfo,
)
from rlbroker.weights.host_cache import ImageStore

if TYPE_CHECKING:
    import torch


class WorkerCommunicator:
    """The learner's client: it sends weights and commands to the workers of a run, and collects their experiences.

    Use it as a context manager, so that `cleanup` is called at the end. All methods may be called from several threads
    of one process. ::

        with WorkerCommunicator(num_workers=8, redis_url="redis://host:6379/0", run="pong") as comm:
            comm.send_model_weights(model.state_dict())
            while training:
                for worker_id, batch in comm.collect_experiences(timeout=1.0):
                    learn(batch)
                comm.send_model_weights(model.state_dict())

    Leaving the block normally ends the run: its workers stop, also those that join later. After an exception they
    continue, and wait for the learner to be started again.

    A newer communicator with the same `learner_name` takes the run over, and the older one raises `Fenced` from then
    on. Learners with different names share the experiences; only the newest of those that publish may send weights
    and commands.

    The learner keeps what it needs to restore the run. If the server loses its data, the run is written back in the
    background, and the latest weights are published again under a new version.
    """

    def __init__(
        self,
        num_workers: int,
        max_queue_size: int = 1000,
        timeout: float = 10.0,
        *,
        redis_url: str | None = None,
        run: str = DEFAULT_RUN,
        redis_client: redis.Redis | redis.RedisCluster | None = None,
        acknowledge: Acknowledge = "next",
        when_full: WhenFull = "block",
        max_queue_bytes: int = RunSettings.max_queue_bytes,
        max_staleness: int | None = None,
        max_deliveries: int | None = 10,
        samples_per_insert: SamplesPerInsert | None = None,
        learner_name: str = "learner",
        publishes: bool = True,
        take_over_seconds: float = 60.0,
        lease_seconds: float = RunSettings.lease_seconds,
        forget_seconds: float = RunSettings.forget_seconds,
        allow_eviction: bool = False,
        host_cache: HostCacheSetting = True,
        signing_key: SigningKeySetting | None = None,
        shards: int | None = None,
    ) -> None:
        """Open a run as its learner, or continue an existing one.

        Args:
            num_workers: how many workers are expected. More or fewer may join.
            max_queue_size: the most batches that wait in one worker's queue.
            timeout: the most seconds that one operation takes, `cleanup` included.
            redis_url: `redis://`, `rediss://` or `unix://`; for a Cluster `redis+cluster://host:port,host:port`; for
                Sentinels `redis+sentinel://host:port,host:port/service`. By default the environment's
                RLBROKER_REDIS_URL, then REDIS_URL, then `redis://localhost:6379/0`.
            run: name of the training job, `"default"` by default: 1 to 100 letters, digits, `.`, `_` and `-`.
            redis_client: a redis-py or fakeredis client to use instead of a URL.
            acknowledge: when a returned batch counts as done: `"next"`, at the following `collect_experiences`;
                `"manual"`, when `acknowledge` is called. After a restart, batches that are not done are delivered
                again.
            when_full: what workers do at a full queue, unless they choose for themselves: `"block"`,
                `"drop_oldest"` or `"drop_newest"`.
            max_queue_bytes: the most bytes in one worker's queue, including batches that the learner has not
                acknowledged. 256 MiB by default.
            max_staleness: batches from weights that are more versions old than this are counted as `stale` and not
                returned. None for no limit.
            max_deliveries: a batch that was delivered this often, each time to a learner that died, becomes a dead
                letter. None for no limit.
            samples_per_insert: how often each batch is sampled; collecting and sampling then wait for each other (see
                `may_sample`). None for no limit.
            learner_name: name of this learner, if several share the experiences. Letters, digits, `.`, `_` and `-`.
            publishes: whether this learner may send weights and commands.
            take_over_seconds: batches that another learner has read, and neither acknowledged nor renewed for this
                long, are taken over by this one. At least 0.5.
            lease_seconds: a worker without a heartbeat for this long is `away`. 5 by default, at least 0.1.
            forget_seconds: a worker without a heartbeat for this long no longer belongs to the run. 600 by default, at
                least `lease_seconds`.
            allow_eviction: whether to accept a server whose memory policy evicts keys, and so loses data.
            host_cache: whether workers on this machine read weights from shared memory. True for /dev/shm or what
                RLBROKER_HOST_CACHE names; a directory to use that one.
            signing_key: the key that signs weights and commands, so that workers with the same key refuse those from
                anyone else who can write to the server. Text or bytes of at least 32 bytes, or a `Path` of a file
                with it. By default the file that RLBROKER_SIGNING_KEY_FILE names, if it is set.
            shards: the number of shards of a new run on a Cluster; by default one for each master. An existing run
                keeps its shards.

        Raises:
            InvalidArgument: an argument has a value that cannot work.
            ConnectionFailed: the server could not be reached within the timeout.
            AccessDenied: the password is wrong, or the user lacks a right.
            TlsFailed: no secure connection to the server is possible.
            ServerUnsuitable: the server is too old, or would evict keys.
            IncompatibleFormat: the run was written by a release with another wire format.
        """
        options = LearnerOptions(
            num_workers=num_workers,
            run_settings=RunSettings(
                max_queue_size=max_queue_size,
                max_queue_bytes=max_queue_bytes,
                when_full=when_full,
                lease_seconds=lease_seconds,
                forget_seconds=forget_seconds,
            ),
            acknowledge=acknowledge,
            max_staleness=max_staleness,
            max_deliveries=max_deliveries,
            samples_per_insert=samples_per_insert,
            learner_name=learner_name,
            publishes=publishes,
            take_over_seconds=take_over_seconds,
            shards=shards,
        )
        secret = signing_secret(signing_key)
        self._keys = Keys(run)
        self._scalar_targets: list[ScalarTarget] = []
        self._num_workers, self._publishes = options.num_workers, options.publishes
        self._connection = connection = Connection(
            redis_url, client=redis_client, timeout_seconds=timeout, reads_batches=True
        )
        images = ImageStore(run, host_cache_place(host_cache))
        self._cleanup = Cleanup(connection, self._keys, images)
        self._life = life = Lifetime(
            self,
            f"WorkerCommunicator of the run {run!r}",
            connection,
            close_call="cleanup()",
            leave=self._cleanup.leave,
            release=self._cleanup.release,
        )
        try:
            connection.check_server(allow_eviction=allow_eviction)
            connection.load(SCRIPTS)
            self._cleanup.parts = parts = LearnerParts.open(
                connection,
                self._keys,
                options,
                images=images,
                signing_key=SigningKey(secret) if secret else None,
                check=life.check,
            )
            self._cleanup.maintenance = self._maintenance = Maintenance(
                connection, self._keys, parts, forget_seconds=forget_seconds
            )
            self._cleanup.run_end = self._run_end = RunEnd(parts, life.check)
            self._thread = self._maintenance.thread
            life.add_threads(self._thread)
            self._thread.start()
        except BaseException:
            life.end(Deadline(timeout))
            raise
        self._roster, self._publisher = parts.roster, parts.publisher
        self._commands, self._ledger, self._applied = parts.commands, parts.ledger, parts.applied
        self._collector, self._pending = parts.collector, parts.pending
        self._dead_letters, self._rate_limiter = parts.dead_letters, parts.rate_limiter
        self._recorder = parts.recorder
        connection.errors.joined = True
        life.begin()

    def __enter__(self) -> Self:
        """Return the communicator; leaving the block calls `cleanup`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Clean up. After an exception, no worker is stopped, and no batch that was returned last is acknowledged."""
        failed = kind is not None and not self._life.ended
        self.cleanup(acknowledge=kind is None, stop_workers=kind is None)
        if failed and kind is not None:
            self._cleanup.log_run_goes_on(kind)

    @property
    def run(self) -> str:
        """The run's name."""
        return self._keys.run

    @property
    def num_workers(self) -> int:
        """The expected number of workers, as it was given."""
        return self._num_workers

    @property
    def timeout(self) -> float:
        """The most seconds that one operation takes, as it was given."""
        return self._connection.timeout_seconds

    @property
    def epoch(self) -> int:
        """This learner's incarnation: the server's time in milliseconds when it opened the run. It only grows."""
        return self._roster.epoch

    @property
    def version(self) -> int:
        """The latest published version; 0 before the first."""
        return self._publisher.latest_version

    # Weights

    def send_model_weights(
        self,
        model_state_dict: Mapping[str, Any],
        compression_enabled: bool = True,
        *,
        dtype: str | torch.dtype | None = None,
        wait: bool = True,
    ) -> PublishReceipt:
        """Publish weights as the run's next version. They are encoded and stored once, for all workers.

        Args:
            model_state_dict: `model.state_dict()`, or any mapping, nested or not, of tensors, arrays and plain values.
            compression_enabled: whether to compress losslessly with blosc2, and to store only the difference to the
                version before if that is smaller. Without it publishing is faster on a fast network.
            dtype: the dtype to which floating-point tensors and arrays are cast before they are stored, such as
                `"bfloat16"`; rounds to nearest even. The workers' models keep their own dtypes. None for no cast.
            wait: whether to return only once the version is published. With False the weights are copied before the
                call returns, so training may continue; the next call waits until this version is published.

        Returns:
            A receipt with `version`, `kind`, `raw_bytes`, `stored_bytes`, `ratio` and `seconds`. After `wait=False`
            these wait for the publication, and raise its error.

        Raises:
            UnsupportedType: a value cannot be encoded; the message names its path.
            InvalidArgument: `dtype` is not a floating-point dtype, or this learner was created with
                `publishes=False`.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check_publishes()
        if not is_mapping(model_state_dict):
            if has_method(model_state_dict, "state_dict"):
                raise UnsupportedType("got a model; send its weights: send_model_weights(model.state_dict())")
            raise UnsupportedType(
                f"weights are a dictionary, such as model.state_dict(); got {type_name(model_state_dict)}; "
                'send {"params": …} of a tree of another kind'
            )
        return self._publisher.publish(
            model_state_dict,
            compression=compression_enabled,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            wait=wait,
            applied=self._applied,
        )

    # Experiences

    def collect_experiences(
        self, timeout: float = 0.0, max_batches: int | None = None
    ) -> list[tuple[int, Batch]]:
        """Return batches that workers sent, each worker's in the order in which it sent them.

        With `acknowledge="next"`, the default, this also acknowledges the batches that the previous call returned.

        Args:
            timeout: seconds to wait for a first batch, from any worker. 0 to return only what has arrived. None is
                refused, because every wait has a deadline: give a large number to wait long.
            max_batches: the most batches to return. None for all that have arrived, up to about 256 MiB.

        Returns:
            Pairs `(worker_id, batch)`. A `Batch` is the dictionary that the worker sent, with `version`, `staleness`,
            `rows`, `sequence` and more as attributes.

        Raises:
            InvalidArgument: an argument is negative or not a number.
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check()
        if max_batches is not None:
            max_batches = check_positive_int("max_batches", max_batches)
        return self._collector.collect(
            timeout_seconds=check_timeout_seconds("timeout", timeout), max_batches=max_batches
        )

    def collect_round(
        self,
        timeout: float | None = None,
        *,
        version: int | None = None,
        workers: Iterable[int] | None = None,
        per_worker: int = 1,
        partial: bool = False,
    ) -> list[tuple[int, Batch]]:
        """Return one batch of one version from each worker: what synchronous, on-policy training needs. ::

            comm.send_model_weights(model.state_dict())
            for worker_id, batch in comm.collect_round():
                learn(batch)

        Older batches of these workers are counted as `stale`, whatever `max_staleness` is. Newer and further ones stay
        for later calls. As with `collect_experiences`, this acknowledges what the previous call returned, and with
        `acknowledge="manual"` you acknowledge.

        Without `workers`, the round waits for those that were alive when it began, and first for one if there is none.
        A worker that joins later is in the next round; one that has just joined may be, too. One that dies, leaves or
        is away is not waited for any longer (the log names it), but what it has sent belongs to the round.

        Args:
            timeout: the most seconds to wait; the communicator's timeout by default.
            version: the version that produced the batches; the latest by default, also one that
                `send_model_weights(wait=False)` is still publishing, for which this waits.
            workers: ids of the workers that must be in the round, whether or not they have joined.
            per_worker: how many batches of each.
            partial: whether to return what there is, perhaps nothing, instead of raising `RoundIncomplete`.

        Returns:
            Pairs `(worker_id, batch)` by worker id, each worker's in the order in which it sent them.

        Raises:
            RoundIncomplete: batches are missing at the timeout, or cannot come any more because their workers run newer
                versions. `missing` says why, by worker id. What was gathered comes with the next call for the same
                version, or with `collect_experiences`.
            InvalidArgument: an argument cannot work, the version is not published, or this learner has
                `samples_per_insert`, which cannot limit whole rounds.
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time. Or the last `send_model_weights(wait=False)`
                has failed: until the next one succeeds, name the `version` for a round of an older one.
        """
        self._check()
        seconds = self._connection.timeout_seconds if timeout is None else timeout
        deadline = Deadline(check_timeout_seconds("timeout", seconds))
        if self._rate_limiter.is_active:
            raise InvalidArgument(
                "collect_round returns whole rounds, which samples_per_insert cannot limit; create the "
                "WorkerCommunicator without it, or use collect_experiences"
            )
        if version is None:
            if not self._publishes:
                raise InvalidArgument("this learner does not publish; name the version of the round")
            if not self._publisher.finish(deadline.remaining):
                raise RoundIncomplete(f"the weights are still being published after {deadline.seconds:g} s")
            self._publisher.check()
        latest = self.version if self._publishes else None
        asked = Round.parse(
            self.version if version is None else version, per_worker, workers, latest=latest, partial=partial
        )
        return self._collector.collect_round(asked, deadline)

    def acknowledge(self, done: Sequence[tuple[int, Batch]] | Mapping[str, Any]) -> int:
        """Delete batches from the server because the learner has used them. Needed with `acknowledge="manual"` only.

        Args:
            done: pairs that `collect_experiences` returned; or marks, for all batches that they cover.

        Returns:
            How many of the batches were deleted now. Batches that were acknowledged before, or that another learner
            has taken over, do not count.

        Raises:
            UnsupportedType: `done` is neither pairs nor marks.
            InvalidArgument: the marks are invalid, or belong to another run.
            Fenced: a newer learner of this name has taken over.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check()
        if isinstance(done, Mapping):
            return self._collector.acknowledge_marks(parse_marks(done, self.run)["batches"])
        if not isinstance(done, Sequence) or not all(map(_is_pair, done)):
            raise UnsupportedType(
                "acknowledge takes (worker_id, batch) pairs from collect_experiences, or marks from marks()"
            )
        return self._collector.acknowledge(done)

    def marks(self) -> dict[str, Any]:
        """Return marks of the batches that were collected so far, to save in a training checkpoint.

        They consist of plain values, for JSON, pickle or `torch.save`. Save them together with the replay buffer or
        the weights that came from these batches, then pass them to `acknowledge`; after a restart, to `restore`.
        """
        self._check()
        return {
            "run": self.run,
            "version": self.version,
            "batches": self._collector.marks(),
            "inserts": self._rate_limiter.inserts,
            "samples": self._rate_limiter.samples,
        }

    def restore(self, marks: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: batches that its marks cover are not collected again, all later ones are.

        The next version is higher than the checkpoint's, even if the server has lost that one. Call this before
        anything is collected.

        Args:
            marks: what `marks` returned.

        Raises:
            InvalidArgument: the marks are invalid or belong to another run, or batches were already collected.
        """
        self._check()
        parsed = parse_marks(marks, self.run)
        if not self._collector.restore(parsed["batches"]):
            raise InvalidArgument(
                "restore(marks) must come before the first collect_experiences; make a new WorkerCommunicator for it"
            )
        self._publisher.mark_used(parsed["version"])
        self._rate_limiter.restore(parsed["inserts"], parsed["samples"])

    def may_sample(self, count: int = 1) -> bool:
        """Return whether this many samples may be drawn now under `samples_per_insert`, and count them if so.

        A learner with a replay buffer alternates: it collects, then trains while this returns True. If sampling is
        too far ahead, this returns False; if it is too far behind, `collect_experiences` returns nothing. ::

            for _, batch in comm.collect_experiences(timeout=1.0):
                buffer.insert(batch)
            while comm.may_sample():
                train(buffer.sample())

        Raises:
            InvalidArgument: this many samples can never be drawn at once.
        """
        self._check()
        return self._rate_limiter.may_sample(count)

    def dead_letters(self, worker_id: int | None = None) -> list[DeadLetter]:
        """Return the batches that no learner could use, with the reason; of one worker, or of all.

        Raises:
            InvalidArgument: `worker_id` is not an integer from 0 to 65535.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            workers = self._roster.ids() if worker_id is None else [check_worker_id(worker_id)]
            return self._dead_letters.list(workers)

    def retry_dead_letters(self, letters: Sequence[DeadLetter]) -> int:
        """Put dead letters back into their queues, to be collected again within seconds.

        Args:
            letters: some of what `dead_letters` returned.

        Returns:
            How many were still there.

        Raises:
            UnsupportedType: `letters` is not a list of dead letters.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            return self._dead_letters.retry(_check_letters("retry_dead_letters", letters))

    def purge_dead_letters(self, letters: Sequence[DeadLetter] | None = None) -> int:
        """Delete dead letters. They stay in the counts of `get_queue_info`.

        Args:
            letters: some of what `dead_letters` returned; None for all.

        Returns:
            How many were still there.

        Raises:
            UnsupportedType: `letters` is not a list of dead letters.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            found = self.dead_letters() if letters is None else _check_letters("purge_dead_letters", letters)
            return self._dead_letters.purge(found)

    # Commands, and the state of the run

    def send_control_command(
        self,
        command: str,
        data: Any = None,
        worker_ids: Iterable[SupportsIndex] | None = None,
        *,
        expires: float | None = None,
    ) -> Command:
        """Send a command to workers. Each of them obeys it once, in order, when it next calls `poll`.

        Args:
            command: `"stop"`, `"pause"`, `"resume"`, `"reset"`, or a name for which the workers registered a handler
                with `on_command`. `"pause"` takes `{"duration": seconds}`, or None until `"resume"`; `{}` is 1 s. A
                `"stop"` to all workers, without `expires`, ends the run like `stop_workers`.
            data: the handler's argument: anything that a batch may contain.
            worker_ids: the workers that get it; None for all members of the run. The outcome of those that are not
                members is `unknown`, with the detail `unknown worker`.
            expires: seconds after which a worker that reads the command ignores it. None for never.

        Returns:
            A handle: `command.wait(timeout=5.0)` returns `{worker_id: outcome}`.

        Raises:
            InvalidArgument: the name or the expiry cannot work, or this learner was created with `publishes=False`.
            UnknownWorker: none of the ids is a member of the run.
            UnsupportedType: something in `data` cannot be encoded; the message names its path.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check_publishes()
        with self._operation():
            if ends_run(command, worker_ids, expires):
                return self._run_end.send(data)
            return self._commands.send(command, data, worker_ids, expires_seconds=expires)

    def stop_workers(self, timeout: float | None = None) -> dict[int, Outcome]:
        """End the run: stop its workers, also those that join later, and wait for the answers of the present ones.

        Meanwhile batches are read from the queues, up to about 256 MiB. The following `collect_experiences` returns
        them, and what is still in the queues. Workers that are away, and those that die, are not waited for beyond
        their lease. The run is open again as soon as another learner opens it.

        Args:
            timeout: seconds to wait at most; the communicator's timeout by default.

        Returns:
            The outcome of the `stop` by worker id; `waiting` for a worker that is away, or has not polled in time. It
            stops when it polls next, or returns. A repeated call sends no second `stop`.

        Raises:
            InvalidArgument: the timeout is invalid, or this learner was created with `publishes=False`.
            Fenced: a newer learner has taken over the run; no worker was stopped.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check_publishes()
        seconds = self._connection.timeout_seconds
        if timeout is not None:
            seconds = check_timeout_seconds("timeout", timeout)
        deadline = Deadline(seconds)
        with self._operation(), within(deadline):
            self._run_end.send_once()
        return self._run_end.wait(deadline)

    def workers(self) -> list[WorkerInfo]:
        """Return the members of the run, by id: host, pid, state, version, last heartbeat and more.

        Raises:
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            return self._roster.workers()

    def missed_updates(self) -> dict[int, MissedUpdates]:
        """Return which versions and commands each worker missed, why, and since when; by worker id.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation() as deadline:
            workers = self._roster.ids()
            self._maintenance.settle(workers, deadline)
            return self._ledger.missed_updates(
                workers, latest_version=self.version, published=self._publisher.publish_times
            )

    def get_queue_info(self) -> QueueInfo:
        """Return the sizes of all queues, as the server has them.

        Returns:
            A dictionary with three lists by worker id: `experience_queue_sizes`, batches waiting;
            `model_queue_sizes`, versions neither applied nor missed yet; `control_queue_sizes`, commands not
            acknowledged yet. And `counts`, by worker id, the `QueueCounts` of its batches.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation() as deadline:
            workers = self._roster.ids()
            self._maintenance.settle(workers, deadline)
            counts = read_counts(self._connection, self._keys, workers)
            outcomes = self._ledger.read_outcomes(counts)
            commands = self._commands.count_pending()
        ids = range(max(self._num_workers, *(worker + 1 for worker in counts), 0))
        return {
            "experience_queue_sizes": [counts[worker].waiting if worker in counts else 0 for worker in ids],
            "model_queue_sizes": [
                max(0, self.version - outcomes[worker].settled)
                if worker in outcomes and outcomes[worker].member
                else 0
                for worker in ids
            ],
            "control_queue_sizes": [commands.get(worker, 0) if worker in outcomes else 0 for worker in ids],
            "counts": counts,
        }

    def log_to(
        self,
        writer: SummaryWriter,
        *,
        step: Callable[[], int] | None = None,
        every_seconds: float = 10.0,
    ) -> None:
        """Write this learner's metrics to TensorBoard in the background, until `cleanup`.

        `rlbroker.metrics.tensorboard.TAGS` lists the tags; all begin with `rlbroker/`. An error of the writer is
        logged and ends the writing; nothing else is affected.

        Args:
            writer: TensorBoard's `SummaryWriter`, or any object with `add_scalar(tag, value, step)`. It is called
                in a thread of its own, and not after `cleanup`.
            step: returns the training step that the values belong to; called in the same thread. By default the
                rows collected so far.
            every_seconds: seconds between two writes; at least about 1.

        Raises:
            InvalidArgument: the writer has no `add_scalar`, `step` is not callable, or `every_seconds` is not a
                positive number.
        """
        self._check()
        target = ScalarTarget(writer, step)
        log = ScalarLog(target, every_seconds=every_seconds)
        self._scalar_targets.append(target)
        self._recorder.add_log(log)

    # The end

    def cleanup(self, *, acknowledge: bool = True, stop_workers: bool = True) -> CleanupReport:
        """Close this learner within its timeout, and report what it leaves in Redis. Further calls change nothing.

        The order: wait for weights sent with `wait=False`, acknowledge the batches that were returned last, stop the
        workers, wait for their answers during a quarter of the timeout at most, stop the background thread, settle
        acknowledgements, and close all connections. Call `stop_workers` before to wait longer for the answers.

        Args:
            acknowledge: whether batches that were returned last count as done. Ignored with `acknowledge="manual"`.
            stop_workers: whether the run ends: its workers stop, also those that join later. False if the run goes on,
                with a learner that is started again. Only the learner that leads the run stops workers, not one with
                `publishes=False`, or that was replaced.

        Returns:
            Batches and commands that are left, and the workers' answers to the `stop`. It is true if nothing is left,
            and not `complete` if the server could not be asked.
        """
        if not is_exiting() and not self._life.ended:
            self._connection.check_process()
            self._life.closing = True
            deadline = Deadline(self._connection.timeout_seconds)
            self._cleanup.finish_work(deadline, acknowledge=acknowledge, stop_workers=stop_workers)
            self._life.end(deadline)
        return self._cleanup.report

    # Checks

    @contextmanager
    def _operation(self) -> Iterator[Deadline]:
        """Check that this learner is usable, and apply one deadline to everything that the block does."""
        self._check()
        with within(Deadline(self._connection.timeout_seconds)) as deadline:
            yield deadline

    def _check(self) -> None:
        """Raise `Closed`, `ForkedProcess`, or the error that ended the background thread, such as `Fenced`."""
        self._life.check()

    def _check_publishes(self) -> None:
        self._check()
        if not self._publishes:
            raise InvalidArgument(
                "this learner was created with publishes=False; it can only collect experiences"
            )


def _is_pair(pair: Any) -> bool:
    is_two = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    return is_two and isinstance(pair[1], Batch) and hasattr(pair[1], "held_as")


def _check_letters(call: str, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
    if not isinstance(letters, Sequence) or not all(isinstance(one, DeadLetter) for one in letters):
        raise UnsupportedType(f"{call} takes a list of dead letters, as returned by dead_letters()")
    return letters
