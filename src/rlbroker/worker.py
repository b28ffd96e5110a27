"""`WorkerClient`: the worker's side of a run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, get_args

import redis

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.text import counted
from rlbroker.codec.limits import FORMAT_VERSION
from rlbroker.codec.signing import SigningKey
from rlbroker.config import (
    DEFAULT_RUN,
    HostCacheSetting,
    Level,
    SigningKeySetting,
    WhenFull,
    choice,
    host_cache_place,
    positive_seconds,
    signing_secret,
    waiting_seconds,
)
from rlbroker.control.drain_signals import DrainSignals
from rlbroker.control.inbox import Inbox, ReceivedCommand
from rlbroker.errors import Closed, DeadlineExceeded, InvalidArgument, PeerError, UnsupportedType
from rlbroker.experience.sender import Sender
from rlbroker.membership.heartbeat import Heartbeat, LastPoll
from rlbroker.types import SendReceipt
from rlbroker.weights.image_store import ImageStore
from rlbroker.weights.loading import check_target, load
from rlbroker.weights.subscriber import Subscriber
from rlbroker.weights.updates import WeightsUpdate, drop_superseded

logger = logging.getLogger("rlbroker")

#: Gets a command's data; an exception is reported to the learner, and the worker goes on.
Handler = Callable[[Any], None]

#: How long a paused or waiting worker sleeps between two looks at what arrived.
LOOK_SECONDS = 0.1

#: Which part of the time to leave a worker waits for what has not reached its level.
SETTLE_PART = 0.75


class WorkerClient:
    """Takes part in a run as one of its workers.

    Usable as a context manager, and from several threads of one process. Weights and commands arrive in the
    background; `poll` applies them, so that they take effect between two steps of the caller.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        run: str = DEFAULT_RUN,
        worker_id: int | None = None,
        *,
        redis_client: redis.Redis | redis.RedisCluster | None = None,
        timeout: float = 10.0,
        when_full: WhenFull | None = None,
        compression: bool = True,
        level: Level = "redis",
        host_cache: HostCacheSetting = True,
        keep_dtype: bool = False,
        signing_key: SigningKeySetting | None = None,
        read_from_replicas: bool = False,
    ) -> None:
        """Join a run. The learner may come later; a process with the same worker id is fenced.

        Args:
            redis_url: `redis://`, `rediss://` or `unix://`, or `redis+cluster://host:port,host:port` or
                `redis+sentinel://host:port,host:port/service`; defaults to RLBROKER_REDIS_URL, then REDIS_URL, then
                localhost.
            run: name of the training job, as the learner has it.
            worker_id: this worker's number; None for the lowest that is free.
            redis_client: a ready client instead of a URL, a fakeredis one or one of a Cluster too.
            timeout: seconds that any one operation may take, and that sending waits for room.
            when_full: what to do at a full queue: `block`, `drop_oldest` or `drop_newest`; None for what the
                learner chose.
            compression: whether to compress batches (lossless) where that makes them smaller; where it does not,
                it is soon tried only now and then.
            level: what a batch must have reached to be safe, and so what it survives: `redis`, the server has
                it; `replica`, one replica too; `fsync`, the server's disk; `learner`, this process keeps it until
                the learner has acknowledged it, and sends it again if the server loses it.
            host_cache: whether the processes of this machine share weights, so that each version is downloaded and
                decoded once: in /dev/shm, or in the directory that is given instead.
            keep_dtype: whether weights that the learner sent in a lower precision stay in it where they fill an
                empty dictionary; else they get the dtypes back that they had at the learner.
            signing_key: the learner's key, as text or bytes of at least 32, or a Path to a file with it: then weights
                and commands that were not signed with it are refused. By default, from the file that
                RLBROKER_SIGNING_KEY_FILE names.
            read_from_replicas: whether weights are read from replicas of the servers, where there are any, so that
                many workers do not load the masters. What a replica does not have yet comes from its master.

        Raises:
            InvalidArgument: a setting cannot work.
            ServerUnsuitable: the server is too old, or cannot give the level.
            AccessDenied: wrong password, or a right is missing.
            TlsFailed: there can be no secure connection to the server.
            IncompatibleFormat: the learner writes another wire format.
            ConnectionFailed: the server cannot be reached within the timeout.
        """
        if when_full is not None:
            choice("when_full", when_full, get_args(WhenFull))
        choice("level", level, get_args(Level))
        place = host_cache_place(host_cache)
        secret = signing_secret(signing_key)
        key = SigningKey(secret) if secret else None
        self._keys = keys = Keys(run)
        self._closed = self._draining = False
        self._running = True
        self._signals = DrainSignals(self.drain)
        self._version = 0
        self._misfit = ""  #: why the newest weights could not be loaded into the model
        self._paused_until: float | None = None
        self._resets = 0
        self._handlers: dict[str, Handler] = {}
        #: Held while commands are obeyed and weights applied, so that both keep their order.
        self._applying = threading.RLock()
        self._attention = LastPoll()
        self._connection = connection = Connection(redis_url, client=redis_client, timeout_seconds=timeout)
        self._keep_dtype = keep_dtype
        self._subscriber = Subscriber(
            connection,
            keys,
            ImageStore(run, place),
            key=key,
            from_replicas=read_from_replicas,
            run_size=lambda: self._heartbeat.run_size,
        )
        self._heartbeat = Heartbeat(
            connection,
            keys,
            wire_format=FORMAT_VERSION,
            describe=self._describe,
            newest_seen=lambda: self._subscriber.newest_seen,
            maintain=self._maintain,
        )
        self._sender: Sender | None = None
        try:
            connection.check_server(allow_eviction=True)  # the learner decides
            joined = self._heartbeat.register(worker_id)
            self._inbox = Inbox(
                connection,
                keys,
                joined,
                key=key,
                notice_version=self._subscriber.announce,
                rejoin=self._heartbeat.rejoin,
            )
            self._sender = Sender(
                connection,
                keys,
                joined,
                settings=self._heartbeat.settings,
                rejoin=self._heartbeat.rejoin,
                when_full=when_full,
                compression=compression,
                level=level,
                known=self._heartbeat.knows_run or not connection.servers.several,
            )
            for part in (self._heartbeat, self._subscriber, self._inbox):
                part.start()
        except BaseException:  # Ctrl-C too: nobody shall wait for a worker that never was
            self._abandon()
            raise

    def __enter__(self) -> Self:
        """Give the client itself; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the run."""
        self.close()

    @property
    def worker_id(self) -> int:
        """This worker's number in the run."""
        return self._heartbeat.registration.worker_id

    @property
    def incarnation(self) -> int:
        """Which life of that worker this is: when it began by the server's clock, in milliseconds; it only grows."""
        return self._heartbeat.registration.incarnation

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._keys.run

    @property
    def version(self) -> int:
        """The version that was applied last; 0 for none yet. Batches are tagged with it."""
        return self._version

    @property
    def running(self) -> bool:
        """Whether to go on: False after a `stop` command was obeyed, after `drain`, or after `close`."""
        return self._running and not self._draining and not self._closed

    @property
    def draining(self) -> bool:
        """Whether this worker was told to go: by `drain`, or by a signal after `drain_on`."""
        return self._draining

    @property
    def paused(self) -> bool:
        """Whether a `pause` command is in force."""
        until = self._paused_until
        return until is not None and time.monotonic() < until

    def on_command(self, name: str, handler: Handler) -> None:
        """Have a function called, from within `poll`, with the data of each command of this name.

        For `reset`, `pause` and `stop` it is called besides what they do by themselves.

        Raises:
            UnsupportedType: the handler cannot be called.
        """
        if not callable(handler):
            raise UnsupportedType(f"the handler of {name!r} must be callable; got {type(handler).__name__}")
        self._handlers[name] = handler

    def drain(self) -> None:
        """Have this worker finish: `running` is False from here on, and what waits for weights or a `resume` returns.

        The batch in the works is not lost: a following `send_experiences` sends it, and waits for room as always.
        `close` then leaves the run. May be called from any thread, from a signal handler too, and again.
        """
        self._draining = True  # and nothing else: a signal handler may hold up whoever has a lock

    def drain_on(self, *signals: int) -> None:
        """Call `drain` at the first of each of these signals; a second of the same kind does what it did before.

        So Kubernetes, Slurm, systemd and people say that a process should go. `close` gives the signals back.

        Args:
            signals: such as `signal.SIGTERM`, `signal.SIGUSR1`.

        Raises:
            UsageError: this is not the main thread, and only that can take signals.
            InvalidArgument: one of these is no signal that can be taken.
        """
        self._check()
        self._signals.watch(*signals)

    def reset_requested(self) -> bool:
        """Give whether a `reset` command came since the last call: time to begin new episodes."""
        requested, self._resets = self._resets > 0, 0
        return requested

    def load_weights(self, model: Any, timeout: float = 60.0) -> int:
        """Load the latest weights into a model, waiting for the first version; give its number.

        Returns early, without weights, if a `stop` command or `drain` comes first: `running` is False then.

        Args:
            model: a `torch.nn.Module`, or a dictionary (see `poll`).
            timeout: seconds to wait at most.

        Raises:
            WeightsMismatch: the weights do not fit the model; keys and shapes are named.
            UnsupportedType: the model is neither a module nor a dictionary.
            DeadlineExceeded: no weights came in time.
            PeerError: a newer process has this worker id, or the server refused.
        """
        with self._attention:
            return self._load_weights(model, timeout)

    def poll(self, model: Any = None) -> bool:
        """Obey the commands that came, and load the newest weights if there are any; cheap otherwise.

        While a `pause` is in force this call does not return, unless the worker drains.

        Args:
            model: a `torch.nn.Module`; or a dictionary, which is filled if it is empty, and otherwise has its
                tensors and arrays overwritten in place; or None to obey commands only.

        Returns:
            Whether new weights were loaded.

        Raises:
            WeightsMismatch: the weights do not fit the model; keys and shapes are named. They are not offered again:
                with a model that they fit, call `load_weights`.
            Fenced: a newer process has this worker id.
            PeerError: something else that waiting does not mend.
        """
        with self._attention:
            self._check()
            if self._inbox.waiting or self.paused:
                self._obey_waiting()
            if model is None or not self._subscriber.ready or not self.running:
                return False
            check_target(model)
            with self._applying:
                return self._apply(self._subscriber.take(), model)

    def send_experiences(self, batch: Mapping[str, Any], timeout: float | None = None) -> SendReceipt:
        """Send one batch, tagged with the applied version; once this returns, the server has it.

        Args:
            batch: nested dictionary of tensors, arrays and plain values; no other thread may write to them meanwhile.
            timeout: seconds to wait for room; the client's timeout by default.

        Returns:
            What happened. False if the batch was dropped: at a full queue with `drop_newest`, or when a
            `stop` came while waiting for room.

        Raises:
            UnsupportedType: something in the batch cannot travel; its path is named.
            BatchTooLarge: the batch alone exceeds the queue's byte bound.
            QueueFull: no room in time; the caller still has the batch.
            Unconfirmed: the batch was taken, and nobody could say in time that it arrived. It is kept and sent
                again by itself: do not send it a second time.
            DeadlineExceeded: no learner opened the run in time.
            Fenced: a newer process has this worker id.
            PeerError: the server stayed away or refused; the caller still has the batch.
        """
        self._check()
        if not isinstance(batch, dict):
            raise UnsupportedType(f"a batch is a dictionary, not a {type(batch).__name__}")
        if timeout is not None:
            positive_seconds("timeout", timeout)
        assert self._sender is not None
        return self._sender.send(
            batch,
            version=self._version,
            timeout_seconds=self._connection.timeout_seconds if timeout is None else timeout,
            # Not while it drains: what was begun is to arrive.
            stopped=lambda: self._closed or not self._running or self._inbox.holds("stop"),
        )

    def flush(self, timeout: float | None = None) -> int:
        """Wait until every batch that was sent has reached its level; give how many have not in time.

        At level `learner` that is when the learner has acknowledged them. The other levels only leave
        something to wait for after `Unconfirmed`.

        Args:
            timeout: seconds to wait; the client's timeout by default.

        Raises:
            Fenced: a newer process has this worker id.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check()
        assert self._sender is not None
        seconds = self._connection.timeout_seconds if timeout is None else waiting_seconds("timeout", timeout)
        return self._sender.flush(seconds)

    def close(self) -> None:
        """Leave the run within the timeout, so that nobody waits for this worker. May be called again.

        A batch that is `Unconfirmed` is waited for, for most of that time; by a worker that drains, all that have not
        reached their level.
        """
        if self._closed:
            return
        self._connection.check_process()
        self._closed = True
        try:
            self._leave(Deadline(self._connection.timeout_seconds))
        finally:
            self._signals.restore()

    def _leave(self, deadline: Deadline) -> None:
        self._settle(deadline.remaining * SETTLE_PART)
        for part in (self._subscriber, self._inbox, self._heartbeat):
            part.request_stop()
        try:
            self._subscriber.stop(deadline.remaining)
            with within(deadline):
                self._finish(deadline)
        except PeerError as error:
            logger.warning("worker %d left the run %r without saying so: %s", self.worker_id, self.run, error)
        finally:
            if self._sender is not None and self._sender.unsafe:
                logger.warning(
                    "worker %d leaves with %s not reached level %r: %s",
                    self.worker_id,
                    counted(self._sender.unsafe, "batch that has", "batches that have"),
                    self._sender.level,
                    self._sender.unconfirmed or "flush() waits for that",
                )
            self._connection.close()

    def _settle(self, seconds: float) -> None:
        assert self._sender is not None
        if not self._sender.unsafe:
            return
        try:
            with within(Deadline(seconds)):
                (self._sender.flush if self._draining else self._sender.confirm)(seconds)
        except PeerError as error:
            logger.debug("worker %d leaves: %s", self.worker_id, error)  # what remains is told below

    def _finish(self, deadline: Deadline) -> None:
        assert self._sender is not None
        try:
            self._sender.close(deadline)
            self._inbox.stop(deadline.remaining)
        finally:  # one that was replaced says so too: the run then knows that there are two of it
            late = deadline.over
            if not late:
                self._heartbeat.leave(deadline.remaining)
        if late:
            raise DeadlineExceeded("the server did not answer in time")

    def _maintain(self, returned: bool) -> None:
        """Look after what is under way; called with each heartbeat."""
        assert self._sender is not None
        if returned:
            self._inbox.mark_stale()
            self._sender.mark_stale()
        self._sender.maintain()

    def _check(self) -> None:
        if self._closed:
            raise Closed("this WorkerClient was closed; make a new one")
        self._connection.check_process()
        self._heartbeat.check()
        self._inbox.check()
        self._subscriber.check()

    def _abandon(self) -> None:
        self._closed = True
        try:
            self._heartbeat.leave(self._connection.timeout_seconds)
        except PeerError as error:
            logger.debug("leaving the run %r: %s", self.run, error)
        self._connection.close()

    def _describe(self) -> dict[str, str | int]:
        return {
            "version": self._version,
            "sent": self._sender.sent if self._sender else 0,
            "problem": self._subscriber.problem or self._misfit,
            "unconfirmed": self._sender.unconfirmed if self._sender else "",
            "room_seconds": f"{self._sender.room_seconds if self._sender else 0.0:.3f}",
            "unpolled_seconds": f"{self._attention.absent_seconds:.3f}",
        }

    # Weights

    def _load_weights(self, model: Any, timeout: float) -> int:
        self._check()
        check_target(model)
        deadline = Deadline(positive_seconds("timeout", timeout))
        with within(deadline):
            latest = self._subscriber.read_latest()
        if (
            latest and not self._subscriber.ready
        ):  # taken before: for another model, or one that it did not fit
            self._subscriber.fetch_again()
        loaded, waiting = False, list[WeightsUpdate]()
        while self.running:
            with self._applying:
                waiting = drop_superseded(
                    waiting + self._subscriber.take(min(LOOK_SECONDS, deadline.remaining))
                )
                # An older version is only good for a model if the latest does not come: it may have another shape.
                if deadline.over or self._subscriber.was_taken(latest):
                    loaded |= self._apply(waiting, model, again=True)
                    waiting = []
            if loaded:
                break
            self._obey_waiting(deadline)
            self._check()
            if deadline.over:
                waits = "is its learner running, and has it published?"
                problem = self._subscriber.problem or waits
                raise DeadlineExceeded(
                    f"no weights came in the run {self.run!r} on {self._connection.address} within {timeout:g} s: "
                    f"{problem}"
                )
        return self._version

    def _apply(self, updates: list[WeightsUpdate], model: Any, *, again: bool = False) -> bool:
        loaded = False
        for update in updates:
            if update.version <= self._version and not again:
                continue
            if update.problem:
                outcome = "refused" if update.refused else "failed"
                self._inbox.acknowledge_version(self._version, update.version, outcome, update.problem)
                continue
            try:
                assert update.decoded is not None
                load(update.decoded.weights_for(model, keep_dtype=self._keep_dtype), model)
            except Exception as error:
                self._misfit = f"version {update.version}: {error}"
                self._inbox.acknowledge_version(self._version, update.version, "failed", str(error))
                raise
            except BaseException:  # Ctrl-C: the model may hold half of it, so it is offered again
                self._subscriber.fetch_again()
                raise
            before, self._version, self._misfit = self._version, update.version, ""
            self._inbox.acknowledge_version(before, update.version, "applied")
            loaded = True
        return loaded

    # Commands

    def _obey_waiting(self, deadline: Deadline | None = None) -> None:
        """Obey every command that is there; while paused, wait for more, but not beyond the deadline."""
        with self._applying:
            while self.running and not (deadline and deadline.over):
                order = self._inbox.next(LOOK_SECONDS if self.paused else 0)
                if order is not None:
                    self._obey(order)
                elif self.paused:
                    self._check()
                else:
                    return

    def _obey(self, order: ReceivedCommand) -> None:
        known = order.name in _BUILT_IN or order.name in self._handlers
        expired = self._inbox.expired(order)  # if this cannot be found out, the order stays
        self._inbox.remove()
        if expired:
            self._inbox.acknowledge_command(order, "expired")
        elif not known:
            self._inbox.acknowledge_command(order, "unknown")
        else:
            try:
                if order.name in _BUILT_IN:
                    _BUILT_IN[order.name](self, order.data)
                if order.name in self._handlers:
                    self._handlers[order.name](order.data)
            except Exception as error:
                logger.exception("the command %r failed", order.name)
                self._inbox.acknowledge_command(order, "failed", f"{type(error).__name__}: {error}")
            except BaseException as error:  # Ctrl-C, sys.exit: the worker ends, but not without an answer
                self._inbox.acknowledge_command(order, "failed", type(error).__name__)
                raise
            else:
                self._inbox.acknowledge_command(order, "done")

    def _stop(self, data: Any) -> None:
        self._running = False

    def _pause(self, data: Any) -> None:
        duration = data.get("duration") if isinstance(data, dict) else data
        if duration is None:
            self._paused_until = float("inf")
        elif isinstance(duration, (int, float)) and duration >= 0:
            self._paused_until = time.monotonic() + duration
        else:
            raise InvalidArgument(f"pause takes a duration in seconds, or None; got {duration!r}")

    def _resume(self, data: Any) -> None:
        self._paused_until = None

    def _reset(self, data: Any) -> None:
        self._resets += 1


_BUILT_IN: dict[str, Callable[[WorkerClient, Any], None]] = {
    "stop": WorkerClient._stop,
    "pause": WorkerClient._pause,
    "resume": WorkerClient._resume,
    "reset": WorkerClient._reset,
}
