"""`WorkerCommunicator`: the learner's side of a run."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, get_args

import redis

from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import BLOCK_SECONDS, Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import entry_id
from rlbroker.backend.text import counted
from rlbroker.backend.threads import BackgroundThread
from rlbroker.codec.signing import SigningKey
from rlbroker.codec.version import FORMAT_VERSION
from rlbroker.config import (
    DEFAULT_RUN,
    MAX_SHARDS,
    MAX_WORKER_ID,
    MIN_TAKE_OVER_SECONDS,
    Acknowledge,
    HostCacheSetting,
    RunSettings,
    SamplesPerInsert,
    SigningKeySetting,
    WhenFull,
    choice,
    host_cache_place,
    positive_int,
    positive_seconds,
    run_name,
    signing_secret,
    waiting_seconds,
    worker_number,
)
from rlbroker.control.commands import RESTORE_COMMAND, SEND, Command, CommandSender
from rlbroker.control.ledger import RESTORE_OUTCOMES, SETTLE, Ledger
from rlbroker.errors import (
    Closed,
    ConnectionFailed,
    Fenced,
    InvalidArgument,
    PeerError,
    RunLost,
    ServerOutOfMemory,
    UnsupportedType,
)
from rlbroker.experience.collector import Collector
from rlbroker.experience.counts import read_counts
from rlbroker.experience.dead_letters import BURY, PURGE, RETRY, DeadLetters
from rlbroker.experience.pending import ACKNOWLEDGE, RESTORE_COUNTS, TAKE_OVER, PendingEntries
from rlbroker.experience.rate_limiter import RateLimiter
from rlbroker.experience.sender import DROP_OLDEST, OPEN_QUEUE, STATE
from rlbroker.experience.takeover import HAND_OUT, RENEW, TAKE_ABANDONED, Takeover
from rlbroker.membership.heartbeat import BEAT, LEAVE, REGISTER, REJOIN
from rlbroker.membership.roster import ALIVE, CLOSE, FORGET, OPEN, RESTORE_RUN, Roster
from rlbroker.metrics.counters import Metrics
from rlbroker.metrics.recorder import Recorder, RunState
from rlbroker.metrics.tensorboard import ScalarLog, SummaryWriter
from rlbroker.types import Batch, CleanupReport, DeadLetter, MissedUpdates, PublishReceipt, WorkerInfo
from rlbroker.weights.image_store import ImageStore
from rlbroker.weights.publisher import COMMIT, Publisher

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("rlbroker")

#: How the shards of a run are written.
_SHARDS = re.compile(rb"\d{1,4}( \d{1,4})*")

#: Every script of both sides: workers may lack the right to load theirs.
SCRIPTS = (
    OPEN,
    CLOSE,
    COMMIT,
    SEND,
    SETTLE,
    RESTORE_OUTCOMES,
    RESTORE_COMMAND,
    ACKNOWLEDGE,
    TAKE_OVER,
    RESTORE_COUNTS,
    RESTORE_RUN,
    ALIVE,
    TAKE_ABANDONED,
    HAND_OUT,
    RENEW,
    BURY,
    RETRY,
    PURGE,
    FORGET,
    REGISTER,
    BEAT,
    REJOIN,
    LEAVE,
    OPEN_QUEUE,
    STATE,
    DROP_OLDEST,
)

#: How often, at least, the learner forgets silent workers and trims the control stream.
HOUSEKEEPING_SECONDS = 10.0

#: For how long it gathers acknowledgements before it settles them, for each worker: a look at all of them costs about a
#: twentieth of that. And at most.
GATHER_SECONDS = 0.0001
LONGEST_GATHER_SECONDS = 0.1

#: How often it says that it lives.
ALIVE_SECONDS = 1.0


class WorkerCommunicator:
    """Sends weights and commands to the workers of a run, and collects their experiences.

    Usable as a context manager, and from several threads of one process. A newer communicator of the same name
    takes the run over: the older one then raises `Fenced`. Those of other names share the experiences, and only
    the newest of those that publish may send weights and commands.

    If the server loses the run, the communicator writes back what it knows of it, and publishes the weights that
    it sent last under a new version; it keeps their stored bytes for that.
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
        """Open a run as its learner.

        Args:
            num_workers: how many workers are expected; more may join, and fewer may come.
            max_queue_size: batches that may wait in each worker's queue.
            timeout: seconds that any one operation may take, and that `cleanup` takes at most.
            redis_url: `redis://`, `rediss://` or `unix://`, or `redis+cluster://host:port,host:port` or
                `redis+sentinel://host:port,host:port/service`; defaults to RLBROKER_REDIS_URL, then REDIS_URL, then
                localhost.
            run: name of the training job; its keys on the server begin with it.
            redis_client: a ready client instead of a URL, a fakeredis one or one of a Cluster too.
            acknowledge: `next` counts batches as done at the following `collect_experiences`, `manual` when
                `acknowledge` is called. What is not done comes again after a restart.
            when_full: what workers do at a full queue, unless they choose for themselves.
            max_queue_bytes: bytes of each worker's queue, what the learner holds unacknowledged included.
            max_staleness: batches from weights older than this many versions are counted, not collected.
            max_deliveries: a batch over which this many learners died goes to the dead letters; None for never.
            samples_per_insert: how often each batch is to be sampled; holds inserting and sampling together (see
                `may_sample`).
            learner_name: of this learner, where several share the experiences. Letters, digits, `.`, `_`, `-`.
            publishes: whether it may send weights and commands; of several, the newest that may does.
            take_over_seconds: what another learner held for longer, without a sign of life, goes to this one.
            lease_seconds: a worker that was silent for longer is `away`.
            forget_seconds: a worker that was silent for longer no longer belongs to the run.
            allow_eviction: take a server whose memory policy deletes keys.
            host_cache: whether workers on this machine get weights through shared memory: in /dev/shm, or in the
                directory that is given instead.
            signing_key: signs weights and commands, so that whoever can write to the server cannot make them up for
                workers with the same key: text or bytes of at least 32, or a Path to a file with them. By default,
                from the file that RLBROKER_SIGNING_KEY_FILE names.
            shards: parts over which a new run is spread on a Cluster: streams of batches, and chunks of weights. By
                default, one for each master. A run keeps its own.

        Raises:
            InvalidArgument: a setting cannot work.
            ServerUnsuitable: the server is too old, or would evict keys.
            AccessDenied: wrong password, or a right is missing.
            TlsFailed: there can be no secure connection to the server.
            IncompatibleFormat: the run was written by a release with another wire format.
            ConnectionFailed: the server cannot be reached within the timeout.
        """
        self._num_workers = positive_int("num_workers", num_workers)
        if num_workers > MAX_WORKER_ID + 1:
            raise InvalidArgument(f"num_workers can be {MAX_WORKER_ID + 1:,} at most; got {num_workers!r}")
        whole = isinstance(max_staleness, int) and not isinstance(max_staleness, bool)
        if max_staleness is not None and not (whole and max_staleness >= 0):
            raise InvalidArgument(
                f"max_staleness must be None or an integer of at least 0; got {max_staleness!r}"
            )
        choice("acknowledge", acknowledge, get_args(Acknowledge))
        if max_deliveries is not None:
            positive_int("max_deliveries", max_deliveries)
        if samples_per_insert is not None and not isinstance(samples_per_insert, SamplesPerInsert):
            raise InvalidArgument(
                f"samples_per_insert must be a SamplesPerInsert; got {type(samples_per_insert).__name__}"
            )
        if positive_seconds("take_over_seconds", take_over_seconds) < MIN_TAKE_OVER_SECONDS:
            raise InvalidArgument(
                f"take_over_seconds must be at least {MIN_TAKE_OVER_SECONDS:g}, as living learners cannot renew what "
                f"they hold more often; got {take_over_seconds!r}"
            )
        settings = RunSettings(
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
            when_full=when_full,
            lease_seconds=lease_seconds,
            forget_seconds=forget_seconds,
        )
        if shards is not None and positive_int("shards", shards) > MAX_SHARDS:
            raise InvalidArgument(f"shards can be {MAX_SHARDS} at most; got {shards!r}")
        secret = signing_secret(signing_key)
        key = SigningKey(secret) if secret else None
        self._keys = keys = Keys(run)
        self._publishes = publishes
        self._closed: CleanupReport | None = None
        self._connection = connection = Connection(
            redis_url, client=redis_client, timeout_seconds=timeout, reads_batches=True
        )
        self._roster = Roster(
            connection,
            keys,
            settings,
            learner_name=run_name(learner_name, what="learner_name"),
            publishes=publishes,
        )
        self._channel = Channel(connection, keys.meta)
        self._metrics = metrics = Metrics()
        self._began = self._doubt = self._republish = False
        try:
            connection.check_server(allow_eviction=allow_eviction)
            connection.load(SCRIPTS)
            self._epoch = self._roster.open(
                wire_format=FORMAT_VERSION, num_workers=num_workers, shards=self._chosen_shards(shards)
            )
            self._shards = {key: Channel(connection, key) for key in keys.one_of_each_shard}
            self._known_shards = set[str]()  #: those whose server was there once
            self._publisher = Publisher(
                connection,
                keys,
                epoch=self._epoch,
                images=ImageStore(run, host_cache_place(host_cache)),
                metrics=metrics,
                key=key,
            )
            self._holdings = PendingEntries(connection, keys, name=learner_name, epoch=self._epoch)
            self._commander = CommandSender(connection, keys, epoch=self._epoch, key=key)
            self._ledger = Ledger(
                connection,
                keys,
                epoch=self._epoch,
                latest_version=lambda: self._publisher.last_used,
                signed=key is not None,
                settled=self._commander.note,
            )
            workers = self._roster.ids()
            # From here on no acknowledgement of an older learner of this name is accepted.
            self._holdings.take_over(workers)
            if publishes:
                self._commander.remember()
                self._ledger.remember(workers)
            self._tell_what_was_there()
        except BaseException:
            connection.close()
            raise
        self._dead_letters = DeadLetters(connection, keys, self._holdings, max_bytes=max_queue_bytes)
        self._ownership = Takeover(connection, self._holdings, take_over_seconds=take_over_seconds)
        self._flow = RateLimiter(samples_per_insert)
        self._collector = Collector(
            connection,
            keys,
            self._holdings,
            self._dead_letters,
            self._ownership,
            self._flow,
            metrics,
            acknowledge=acknowledge,
            max_staleness=max_staleness,
            max_deliveries=max_deliveries,
            workers=self._roster.ids,
            latest_version=lambda: self._publisher.latest_version,
            check=self._check,
        )
        self._recorder = Recorder(connection, keys, metrics, epoch=self._epoch, known=self._known)
        self._logs: list[ScalarLog] = []
        self._housekeeping_seconds = min(HOUSEKEEPING_SECONDS, forget_seconds / 2)
        self._next_housekeeping = Deadline(self._housekeeping_seconds)
        self._next_sign_of_life = Deadline(0)
        self._thread = BackgroundThread(f"ledger of {run!r}", self._run_once)
        self._thread.start()

    def __enter__(self) -> Self:
        """Give the communicator itself; leaving the block cleans it up."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Clean up. After an error, batches that were only returned stay, for the next learner."""
        self.cleanup(acknowledge=kind is None)

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._keys.run

    @property
    def epoch(self) -> int:
        """Which life of a learner this is: when it began by the server's clock, in milliseconds; it only grows."""
        return self._epoch

    @property
    def version(self) -> int:
        """Number of the latest published version; 0 before the first."""
        return self._publisher.latest_version

    def send_model_weights(
        self,
        model_state_dict: Any,
        compression_enabled: bool = True,
        *,
        dtype: str | torch.dtype | None = None,
        wait: bool = True,
    ) -> PublishReceipt:
        """Publish weights as the run's next version, once for all workers.

        Args:
            model_state_dict: a state dict, or any dictionary (nested allowed) of tensors, arrays and plain values.
            compression_enabled: whether to compress with blosc2 (lossless), and to store differences to the version
                before where they are smaller; off is faster on a fast link.
            dtype: what floating tensors and arrays are cast to on the way, such as `bfloat16` (rounded to nearest
                even); a worker's model keeps its own dtypes. None sends them as they are.
            wait: whether to return only when the version is out. With False the weights have been copied when this
                returns, training may go on, and the receipt completes later; a further call waits for it first.

        Raises:
            UnsupportedType: something in it cannot travel; its path is named.
            InvalidArgument: `dtype` cannot be cast to, or this learner was made with `publishes=False`.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check_publishes()
        if callable(getattr(model_state_dict, "state_dict", None)):
            raise UnsupportedType(
                "send the weights and not the model: send_model_weights(model.state_dict())"
            )
        if not isinstance(model_state_dict, Mapping):
            raise UnsupportedType(
                f"weights are a dictionary, such as model.state_dict(); got {type(model_state_dict).__name__}"
            )
        return self._publisher.publish(
            model_state_dict,
            compression=compression_enabled,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            wait=wait,
        )

    def collect_experiences(
        self, timeout: float = 0.0, max_batches: int | None = None
    ) -> list[tuple[int, Batch]]:
        """Give batches as (worker_id, batch) pairs, each worker's in order.

        Args:
            timeout: seconds to wait for a first batch, of whichever worker; 0 to take only what is there.
            max_batches: how many to give at most; by default what is there, up to 256 MB at once.

        Raises:
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check()
        if max_batches is not None:
            positive_int("max_batches", max_batches)
        return self._collector.collect(
            timeout_seconds=waiting_seconds("timeout", timeout), max_batches=max_batches
        )

    def acknowledge(self, done: Sequence[tuple[int, Batch]] | Mapping[str, Any]) -> int:
        """Say that batches are done with, so that the server forgets them; give how many it still had.

        Only needed with `acknowledge="manual"`. What another learner has taken over meanwhile does not count.

        Args:
            done: pairs that `collect_experiences` gave, or marks: then everything that they cover.

        Raises:
            InvalidArgument: these are not marks of this run.
            UnsupportedType: these are neither pairs nor marks.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check()
        if isinstance(done, Mapping):
            return self._collector.acknowledge_marks(self._marks_of(done)["batches"])
        if not isinstance(done, Sequence) or not all(map(_is_pair, done)):
            raise UnsupportedType(
                "acknowledge takes (worker_id, batch) pairs as collect_experiences gave them, or what marks() gave"
            )
        return self._collector.acknowledge(done)

    def marks(self) -> dict[str, Any]:
        """Give what was collected so far, to be saved in a training checkpoint with what became of it.

        Plain values: JSON, pickle and `torch.save` all keep them.
        """
        self._check()
        return {
            "run": self.run,
            "version": self.version,
            "batches": self._collector.marks(),
            "inserts": self._flow.inserts,
            "samples": self._flow.samples,
        }

    def restore(self, marks: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: what these marks cover is never collected again, and what follows is.

        Numbers of versions go on from the checkpoint's too, also where the server has lost them.

        Args:
            marks: as `marks` gave them; to be called before anything is collected.

        Raises:
            InvalidArgument: these are not marks of this run, or something was collected already.
        """
        self._check()
        found = self._marks_of(marks)
        if not self._collector.restore(found["batches"]):
            raise InvalidArgument(
                "restore(marks) comes before the first collect_experiences; make a new WorkerCommunicator for it"
            )
        self._publisher.raise_floor(found["version"])
        self._flow.restore(found["inserts"], found["samples"])

    def may_sample(self, count: int = 1) -> bool:
        """Give whether to draw this many samples now, with `samples_per_insert`; if so, they are counted.

        `collect_experiences` gives no batches while sampling is too far behind, and this gives False while it is
        too far ahead, so a learner calls both in turn: collect, then train while this gives True.

        Raises:
            InvalidArgument: so many could never be drawn at once.
        """
        self._check()
        return self._flow.may_sample(count)

    def dead_letters(self, worker_id: int | None = None) -> list[DeadLetter]:
        """Give the batches that could not be used, with the reason; of one worker, or of all.

        Raises:
            InvalidArgument: this is no worker id.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            workers = self._roster.ids() if worker_id is None else [worker_number(worker_id)]
            return self._dead_letters.list(workers)

    def retry_dead_letters(self, letters: Sequence[DeadLetter]) -> int:
        """Have dead batches collected once more, within seconds; give how many were still there.

        Raises:
            UnsupportedType: these are not dead letters.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            return self._dead_letters.retry(_letters("retry_dead_letters", letters))

    def purge_dead_letters(self, letters: Sequence[DeadLetter] | None = None) -> int:
        """Delete dead letters, by default all; give how many were there. They stay counted.

        Raises:
            UnsupportedType: these are not dead letters.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._operation():
            found = self.dead_letters() if letters is None else _letters("purge_dead_letters", letters)
            return self._dead_letters.purge(found)

    def send_control_command(
        self,
        command: str,
        data: Any = None,
        worker_ids: Sequence[int] | None = None,
        *,
        expires: float | None = None,
    ) -> Command:
        """Send a command to some workers, or to all that are members now. The result can be waited for.

        Args:
            command: `stop`, `pause` (data: `{"duration": seconds}`, or None until `resume`), `resume`, `reset`,
                or a name for which the workers registered a handler.
            data: what the handler gets; anything that a batch may contain.
            worker_ids: whom to ask; None for everyone.
            expires: a worker that reads it more than this many seconds later does not do it.

        Raises:
            InvalidArgument: the name or the expiry cannot work, or this learner was made with `publishes=False`.
            UnknownWorker: one of the ids is not a member of the run.
            Fenced: a newer learner has taken over the run.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check_publishes()
        with self._operation():
            return self._commander.send(command, data, worker_ids, expires_seconds=expires)

    def workers(self) -> list[WorkerInfo]:
        """Give the run's members, by id: where they run, what they run, when they were last heard of."""
        with self._operation():
            return self._roster.workers()

    def missed_updates(self) -> dict[int, MissedUpdates]:
        """Give, by worker, which versions and commands it missed, why, and since when."""
        with self._operation() as deadline:
            workers = self._roster.ids()
            self._settle(workers, deadline)
            return self._ledger.missed_updates(
                workers, latest_version=self.version, published=self._publisher.published
            )

    def log_to(
        self,
        writer: SummaryWriter,
        *,
        step: Callable[[], int] | None = None,
        every_seconds: float = 10.0,
    ) -> None:
        """Write the figures of this learner with TensorBoard's `SummaryWriter`, or anything that has `add_scalar`.

        In the background, until `cleanup`. An error of the writer's ends that, is logged, and harms nothing else.
        `rlbroker.metrics.tensorboard.TAGS` lists what is written; tags begin with `rlbroker/`.

        Args:
            writer: `add_scalar(tag, value, step)` is called in a thread of ours, but not after `cleanup`.
            step: gives the training step that figures belong to, and is called in that thread too; by default rows
                collected so far.
            every_seconds: how often; each second at most.

        Raises:
            InvalidArgument: the writer has no `add_scalar`, or `step` cannot be called.
        """
        self._check()
        if not callable(getattr(writer, "add_scalar", None)):
            raise InvalidArgument(
                f"log_to takes a writer that has add_scalar, such as TensorBoard's SummaryWriter; got "
                f"{type(writer).__name__}"
            )
        if step is not None and not callable(step):
            raise InvalidArgument(
                f"step must be a function that gives the training step; got {type(step).__name__}"
            )
        every_seconds = positive_seconds("every_seconds", every_seconds)
        self._logs.append(ScalarLog(writer, step=step, every_seconds=every_seconds))

    def get_queue_info(self) -> dict[str, Any]:
        """Give sizes as Redis has them.

        Returns:
            `experience_queue_sizes` (batches waiting), `model_queue_sizes` (versions published and neither
            applied nor missed) and `control_queue_sizes` (commands not answered), each a list by worker id; and
            `counts`, by worker id, the `QueueCounts` of its batches.
        """
        with self._operation() as deadline:
            workers = self._roster.ids()
            self._settle(workers, deadline)
            counts = read_counts(self._connection, self._keys, workers)
            accounts = self._ledger.accounts(counts)
            waiting = self._commander.waiting()
        size = max(self._num_workers, *(worker + 1 for worker in counts), 0)
        experiences, models, control = [0] * size, [0] * size, [0] * size
        for worker, account in accounts.items():
            experiences[worker] = counts[worker].waiting
            models[worker] = max(0, self.version - account.settled) if account.member else 0
            control[worker] = waiting.get(worker, 0)
        return {
            "experience_queue_sizes": experiences,
            "model_queue_sizes": models,
            "control_queue_sizes": control,
            "counts": counts,
        }

    def cleanup(self, *, acknowledge: bool = True, over: bool = True) -> CleanupReport:
        """End this learner within its timeout; give what it leaves in Redis. May be called again.

        Args:
            acknowledge: whether batches that were returned last count as done (not with `acknowledge="manual"`).
            over: whether the run is over; if not, as this learner is to be started again elsewhere, those who look
                at the run see that it is away.
        """
        if self._closed is not None:
            return self._closed
        self._connection.check_process()
        deadline = Deadline(self._connection.timeout_seconds)
        self._closed = CleanupReport(complete=False)
        if not self._publisher.finish(deadline.remaining):
            logger.warning(
                "cleanup of the run %r: the last weights are not out yet, and may not get there", self.run
            )
        ended = self._thread.stop(deadline.remaining)
        for log in self._logs:
            log.end(deadline.remaining)
        try:
            if not deadline.over:
                with within(deadline):
                    self._closed = self._finish(deadline, acknowledge=acknowledge, ended=ended, over=over)
        except PeerError as error:
            logger.warning("cleanup of the run %r: %s", self.run, error)
        finally:
            if ended:
                self._channel.close()
            self._publisher.close()
            self._connection.close()
        return self._closed

    def _finish(self, deadline: Deadline, *, acknowledge: bool, ended: bool, over: bool) -> CleanupReport:
        if acknowledge:
            self._collector.acknowledge_returned(deadline)
        workers = self._roster.ids()
        self._settle(workers, deadline)
        counts = read_counts(self._connection, self._keys, workers)
        waiting = {worker: count.waiting for worker, count in counts.items()}
        commands = sum(self._commander.waiting().values())
        if over:
            self._roster.close()
        if ended:
            with suppress(PeerError):  # the report counts for more
                self._record(last=True)
        return CleanupReport(waiting, self._holdings.counts(), commands)

    def _tell_what_was_there(self) -> None:
        """Log that the run is not new: it is right after a crash, and not for another training."""
        if not self._roster.goes_on or not self._publishes:
            return
        counts = read_counts(self._connection, self._keys, self._roster.ids()).values()
        batches = sum(one.waiting + one.in_hand for one in counts)
        if self.version or batches:
            logger.warning(
                "the run %r goes on: version %d, %s of earlier workers waiting. For a new training choose "
                "another run name",
                self.run,
                self.version,
                counted(batches, "batch", "batches"),
            )

    @contextmanager
    def _operation(self) -> Iterator[Deadline]:
        """Check that this learner may go on, and have all that is done here end within its timeout."""
        self._check()
        with within(Deadline(self._connection.timeout_seconds)) as deadline:
            yield deadline

    def _check(self) -> None:
        if self._closed is not None:
            raise Closed("this WorkerCommunicator was closed; make a new one")
        self._connection.check_process()
        self._thread.check()

    def _check_publishes(self) -> None:
        self._check()
        if not self._publishes:
            raise InvalidArgument("this learner was made with publishes=False: it only collects experiences")

    def _settle(self, workers: Sequence[int], deadline: Deadline) -> None:
        """Settle what the workers acknowledged, if this learner is the one that does."""
        if self._roster.leads:
            self._ledger.settle(workers, deadline)

    def _marks_of(self, marks: Mapping[str, Any]) -> Mapping[str, Any]:
        """Check marks that come from outside, such as a file."""
        try:
            found = {
                "run": str(marks["run"]),
                "version": int(marks["version"]),
                "inserts": int(marks["inserts"]),
                "samples": int(marks["samples"]),
                "batches": {
                    str(name): {
                        "through": entry_id(mark["through"]),
                        "except": [*map(entry_id, mark["except"])],
                        "passed_over": [
                            [entry_id(first), entry_id(last)] for first, last in mark["passed_over"]
                        ],
                        "taken_over": [*map(entry_id, mark["taken_over"])],
                    }
                    for name, mark in marks["batches"].items()
                    if worker_number(int(str(name).removeprefix("again:"))) >= 0
                },
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgument(f"these are no marks, as marks() gives them: {error!r}") from error
        if found["run"] != self.run:
            raise InvalidArgument(f"these marks are of the run {found['run']!r}; this is {self.run!r}")
        return found

    # In the background

    def _run_once(self) -> None:
        """Settle acknowledgements as they come; one step of the background thread."""
        if self._channel.connect():
            self._doubt = self._began  # another server may be there now, or one that lost something
            self._began = True
        try:
            if self._doubt:
                self._restore()
            if self._republish:
                failed = self._ledger.failed_version
                self._republish = not self._publisher.restore(unreadable_version=failed)
                self._ledger.failed_version = 0
            if self._next_sign_of_life.over:
                self._roster.heartbeat(self._channel)
                self._look_after_shards()
                self._connection.load_missing(SCRIPTS)
                self._republish |= self._roster.leads and self._publisher.outrun()
                self._next_sign_of_life = Deadline(ALIVE_SECONDS)
                self._record()
            self._ownership.renew(self._collector.sources)
            self._settle_for_a_while()
        except RunLost as error:
            logger.warning("%s", error)
            self._doubt = True
        except Fenced:  # replaced; or only a newer one publishes now, and this one goes on collecting
            self._roster.heartbeat(self._channel)
        if self._next_housekeeping.over:
            self._housekeeping()
            self._next_housekeeping = Deadline(self._housekeeping_seconds)

    def _look_after_shards(self) -> None:
        """Find out whether a shard's server may have lost something; one that is away is not waited for."""
        for key, channel in self._shards.items():
            with suppress(ConnectionFailed, ServerOutOfMemory):
                fresh, known = channel.connect(), key in self._known_shards
                channel.execute(*(("SET", key, " ".join(self._keys.shards)) if fresh else ("PING",)))
                self._known_shards.add(key)
                self._doubt |= fresh and known

    def _record(self, *, last: bool = False) -> None:
        """Take this second's sample of the run's history."""
        if self._roster.leads or self._logs:
            sample = self._recorder.record(write=self._roster.leads, last=last)
            if sample is not None:
                for log in self._logs:
                    log.offer(sample)

    def _chosen_shards(self, count: int | None) -> str:
        """Choose the shards of a new run: as many on each master as on the others, unless there are some already."""
        servers = self._connection.servers
        if not servers.several:
            if count not in (None, 1):
                raise InvalidArgument(f"shards are for a Cluster, and {self._connection.address} is none")
            return ""
        if not self._connection.execute("EXISTS", self._keys.meta) and (found := self._shards_there()):
            return found
        masters = len(self._connection.masters())
        return self._keys.choose_shards(count or masters, masters, self._connection.master_for)

    def _shards_there(self) -> str:
        """Give the shards of a run whose `meta` a node has lost, as those on others say; empty if there are none."""
        found = self._connection.ask([("GET", key) for key in self._keys.one_of_likely_shards])
        said = Counter(text.decode() for text in found if isinstance(text, bytes) and _SHARDS.fullmatch(text))
        return max(said, key=said.__getitem__, default="")

    def _known(self) -> RunState:
        delivered, lost = self._holdings.totals()
        return RunState(
            version=self._publisher.latest_version,
            alive=self._roster.alive,
            away=self._roster.away,
            everyone=self._roster.everyone,
            in_hand=self._holdings.counts(),
            delivered=delivered,
            lost=lost,
            missed=self._ledger.missed_versions,
        )

    def _settle_for_a_while(self) -> None:
        workers = self._roster.ids()
        if not workers or not self._roster.leads:
            self._thread.pause(BLOCK_SECONDS)
        elif self._ledger.wait(workers, self._connection.block_seconds):
            self._thread.pause(min(LONGEST_GATHER_SECONDS, len(workers) * GATHER_SECONDS))
            self._settle(workers, Deadline(0))
            self._commander.look_again()

    def _housekeeping(self) -> None:
        for worker in self._roster.forget_silent():
            logger.warning("worker %d was silent for too long and no longer belongs to the run", worker)
        if self._roster.leads:
            self._roster.count_hosts()
            self._commander.trim()
            self._publisher.tidy()
            self._republish = True

    def _restore(self) -> None:
        """Write back what the server may have lost. Where it lost nothing, nothing changes.

        The run's `meta` comes after what it would allow to be changed, and before what needs it.
        """
        self._doubt = True
        self._holdings.restore()
        if self._roster.leads:
            self._ledger.restore()
            self._commander.restore()
        self._roster.restore()
        self._connection.load(SCRIPTS)
        self._republish = self._roster.leads
        self._next_sign_of_life = Deadline(0)
        self._doubt = False


def _is_pair(pair: Any) -> bool:
    two = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    return two and isinstance(pair[1], Batch) and hasattr(pair[1], "held_as")


def _letters(call: str, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
    if not isinstance(letters, Sequence) or not all(isinstance(one, DeadLetter) for one in letters):
        raise UnsupportedType(f"{call} takes a list of dead letters, as dead_letters() gave them")
    return letters
