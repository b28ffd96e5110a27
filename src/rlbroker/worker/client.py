"""`WorkerClient`: the worker's side of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self, SupportsIndex, get_args

import redis

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline, within
from rlbroker.backend.keys import Keys
from rlbroker.backend.lifetime import Lifetime, is_exiting
from rlbroker.backend.locks import CallLock
from rlbroker.codec.foreign import is_mapping
from rlbroker.codec.refusals import type_name
from rlbroker.codec.signing import SigningKey
from rlbroker.config import (
    DEFAULT_RUN,
    HostCacheSetting,
    Level,
    SigningKeySetting,
    WhenFull,
    check_choice,
    check_count,
    check_positive_seconds,
    check_timeout_seconds,
    host_cache_place,
    signing_secret,
)
from rlbroker.control.command_handlers import CommandHandlers, Handler
from rlbroker.errors import DeadlineExceeded, PeerError, UnsupportedType
from rlbroker.types import Model, SendReceipt
from rlbroker.weights.applier import CHECK_SECONDS, LoadTarget
from rlbroker.weights.host_cache import ImageStore
from rlbroker.weights.loading import check_target
from rlbroker.worker.parts import WorkerParts

logger = logging.getLogger("rlbroker")


class WorkerClient:
    """A worker's client: it receives weights and commands from the learner of a run, and sends experiences to it.

    Use it as a context manager, so that the worker leaves the run at the end. All methods may be called from several
    threads of one process. ::

        with WorkerClient(redis_url="redis://host:6379/0", run="pong") as worker:
            worker.load_weights(model)
            while worker.running:
                worker.poll(model)
                worker.send_experiences(play(model))

    Weights and commands arrive in the background. They take effect only in `poll`, `load_weights`, `wait_for_weights`
    and `take_weights`, between two steps of the caller.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        run: str = DEFAULT_RUN,
        worker_id: SupportsIndex | None = None,
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
        """Join a run. The learner may start later. A process that already has this worker id is fenced.

        Args:
            redis_url: `redis://`, `rediss://` or `unix://`; for a Cluster `redis+cluster://host:port,host:port`; for
                Sentinels `redis+sentinel://host:port,host:port/service`. By default the environment's
                RLBROKER_REDIS_URL, then REDIS_URL, then `redis://localhost:6379/0`.
            run: name of the training job, as the learner has it.
            worker_id: this worker's id, from 0 to 65535. None for the lowest that is free.
            redis_client: a redis-py or fakeredis client to use instead of a URL.
            timeout: the most seconds that one operation takes, and that sending waits for room in the queue.
            when_full: what to do at a full queue: `"block"`, `"drop_oldest"` or `"drop_newest"`. None for what the
                learner chose.
            compression: whether to compress batches losslessly if that makes them smaller. If it does not, it is
                soon tried only occasionally.
            level: where a batch must be stored to count as safe: `"redis"`, in the server's memory; `"replica"`, on
                one replica too; `"fsync"`, on the server's disk; `"learner"`, in this process until the learner
                acknowledges it, so that it is sent again if the server loses it.
            host_cache: whether the processes of this machine share weights, so that each version is downloaded and
                decoded once. True for /dev/shm or what RLBROKER_HOST_CACHE names; a directory to use that one.
            keep_dtype: whether weights that the learner cast for the transfer keep that dtype when they fill an
                empty dictionary. By default they get the learner's dtype back.
            signing_key: the learner's key: text or bytes of at least 32 bytes, or a `Path` of a file with it. Weights
                and commands without its signature are refused. By default the file that RLBROKER_SIGNING_KEY_FILE
                names, if it is set.
            read_from_replicas: whether to read weights from replicas of the servers, if there are any, so that many
                workers do not load the masters. What a replica does not have yet is read from its master.

        Raises:
            InvalidArgument: an argument has a value that cannot work.
            ConnectionFailed: the server could not be reached within the timeout.
            AccessDenied: the password is wrong, or the user lacks a right.
            TlsFailed: no secure connection to the server is possible.
            ServerUnsuitable: the server is too old, or cannot provide the level.
            IncompatibleFormat: the learner writes another wire format.
            DeadlineExceeded: no free worker id was found within the timeout.
        """
        if when_full is not None:
            check_choice("when_full", when_full, get_args(WhenFull))
        check_choice("level", level, get_args(Level))
        secret = signing_secret(signing_key)
        self._keys = keys = Keys(run)
        self._commands = CommandHandlers()
        self._obeying = CallLock()  #: held while commands are obeyed, so that they keep their order
        self._taking = CallLock()  #: held while a tree is taken
        self._untaken: LoadTarget | None = None  #: a tree that an interrupted `take_weights` did not return
        self._connection = connection = Connection(redis_url, client=redis_client, timeout_seconds=timeout)
        self._parts = parts = WorkerParts(
            connection,
            keys,
            ImageStore(run, host_cache_place(host_cache)),
            key=SigningKey(secret) if secret else None,
            from_replicas=read_from_replicas,
            keep_dtype=keep_dtype,
        )
        self._heartbeat, self._subscriber, self._weights = parts.heartbeat, parts.subscriber, parts.weights
        self._last_poll = parts.last_poll
        self._life = Lifetime(
            self,
            f"WorkerClient of the run {run!r}",
            connection,
            close_call="close()",
            leave=parts.leave,
            release=parts.release,
        )
        try:
            self._life.add_threads(parts.heartbeat.thread, parts.subscriber.thread)
            self._inbox, self._sender = parts.join(
                worker_id, when_full=when_full, compression=compression, level=level
            )
            self._life.add_threads(self._inbox.thread)
            self._life.begin()
        except BaseException:  # includes Ctrl-C: the learner must not wait for a worker that never started
            self._life.end(Deadline(timeout))
            raise

    def __enter__(self) -> Self:
        """Return the client; leaving the block calls `close`."""
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
        """This worker's id in the run."""
        return self._heartbeat.registration.worker_id

    @property
    def incarnation(self) -> int:
        """This worker's incarnation: the server's time in milliseconds when it joined. It only grows."""
        return self._heartbeat.registration.incarnation

    @property
    def run(self) -> str:
        """The run's name."""
        return self._keys.run

    @property
    def version(self) -> int:
        """The version that was applied last; 0 before the first. Batches are tagged with it."""
        return self._weights.version

    @property
    def running(self) -> bool:
        """Whether the worker's loop should continue. Once False, it stays False.

        It is False after a `stop` command, `drain` or `close`. It is also False once the run has ended: from the start
        if the worker joined later, and otherwise, even without `poll`, about a second after its next heartbeat.
        """
        return not (self._finished or self._heartbeat.run_ended)

    @property
    def draining(self) -> bool:
        """Whether `drain` was called, or a signal of `drain_on` arrived."""
        return self._parts.draining

    @property
    def paused(self) -> bool:
        """Whether a `pause` command is in force."""
        return self._commands.paused

    # Commands

    def on_command(self, name: str, handler: Handler) -> None:
        """Register a function that is called, within `poll`, with the data of each command of this name.

        For `stop`, `pause`, `resume` and `reset` it is called after their built-in effect. If it raises an
        `Exception`, the command's outcome at this worker is `failed`, with the error's text. So it is after an
        interrupt: a handler is called at most once for each command. It may call the client. ::

            worker.on_command("set_epsilon", policy.set_epsilon)

        Args:
            name: the command's name.
            handler: takes the command's data. Registering a second handler for a name replaces the first.

        Raises:
            UnsupportedType: the name is not text, or the handler is not callable.
        """
        self._commands.register(name, handler)

    def reset_requested(self) -> bool:
        """Return whether a `reset` command was obeyed since the last call, so that new episodes should begin."""
        return self._commands.take_reset()

    def drain(self) -> None:
        """Ask this worker to finish: `running` becomes False, and calls that wait for weights or `resume` return.

        The batch in progress is not lost: a following `send_experiences` sends it and waits for room as usual. Then
        `close` leaves the run. May be called several times, from any thread and from a signal handler.
        """
        self._parts.drain()

    def drain_on(self, *signals: int) -> None:
        """Call `drain` at the first of each of these signals. A second one of the same kind has its previous effect.

        Kubernetes, Slurm and systemd end a process with a signal. `close` restores the signal handlers. ::

            worker.drain_on(signal.SIGTERM, signal.SIGINT)

        Args:
            signals: such as `signal.SIGTERM` or `signal.SIGUSR1`.

        Raises:
            UsageError: this is not the main thread, and only that can handle signals.
            InvalidArgument: one of them is not a signal that can be handled.
        """
        self._check()
        self._parts.signals.watch(*signals)

    # Weights

    def load_weights(self, model: Model, timeout: float = 60.0) -> int:
        """Load the latest weights into a model. Wait for the first version if there is none yet.

        If a `stop` command, `drain`, or `close` in another thread comes first, it returns without weights, and
        `running` is False.

        Args:
            model: a `torch.nn.Module`, or a dictionary; see `poll`.
            timeout: the most seconds to wait.

        Returns:
            The version that the worker runs now; 0 if none was loaded.

        Raises:
            WeightsMismatch: the weights do not fit the model; the message names keys and shapes.
            UnsupportedType: the model is neither a module nor a dictionary.
            DeadlineExceeded: no weights arrived in time.
            Fenced: a newer process has this worker id.
            PeerError: the server refused, or could not be reached in time.
        """
        with self._last_poll:
            self._check()
            self._inbox.send_unsent()
            check_target(model)
            deadline = Deadline(check_positive_seconds("timeout", timeout))
            with within(deadline):
                latest = self._subscriber.read_latest()
            self._wait_and_load(model, deadline, newer_than=0, latest=latest)
            return self.version

    def wait_for_weights(
        self, model: Model, timeout: float | None = None, *, newer_than: SupportsIndex | None = None
    ) -> bool:
        """Load weights that are newer than those that the worker runs. Wait until they arrive, and obey commands.

        A worker that sends one batch of each version needs no `poll`::

            while worker.wait_for_weights(model):
                worker.send_experiences(play(model))

        Args:
            model: a `torch.nn.Module`, or a dictionary; see `poll`.
            timeout: the most seconds to wait; None for no limit. Once a minute the log says what is waited for.
            newer_than: a version; anything newer is loaded, also what the worker runs already. None for `version`.

        Returns:
            Whether weights were loaded; `version` is their number. False after a `stop` command, `drain`, or `close`
            in another thread.

        Raises:
            WeightsMismatch: the weights do not fit the model, which is unchanged. The next call offers them again.
            UnsupportedType: the model is neither a module nor a dictionary.
            InvalidArgument: `newer_than` is not a version, or the timeout is not a positive number.
            DeadlineExceeded: nothing newer arrived in time.
            Fenced: a newer process has this worker id.
            PeerError: a fault that waiting does not mend. Others are retried in the background.
        """
        with self._last_poll:
            self._check()
            self._inbox.send_unsent()
            check_target(model)
            after = None if newer_than is None else check_count("newer_than", newer_than)
            seconds = float("inf") if timeout is None else check_positive_seconds("timeout", timeout)
            return self._wait_and_load(model, Deadline(seconds), newer_than=after)

    def take_weights(self, timeout: float = 0.0) -> tuple[int, dict[str, Any]] | None:
        """Return the newest weights as a new dictionary, for code that has no model to load them into. Obey commands.

        For JAX, `torch.func`, and everything else that passes parameters as values. ::

            while worker.running:
                if taken := worker.take_weights():
                    version, params = taken
                worker.send_experiences(play(params))

        The worker then runs that version, as after `poll`: batches are tagged with it, and the learner hears of it.
        While a `pause` is in force, this does not return unless the worker drains.

        Args:
            timeout: seconds to wait for weights that are newer than those that were taken or loaded last. 0 to look
                only at what has arrived.

        Returns:
            The version and its tree, nested as it was sent: tensors as tensors, on the CPU, and arrays as arrays, in
            the dtypes that an empty dictionary gets in `poll`. The tree is the caller's: rlbroker neither writes to it
            nor shares its memory. None if nothing newer has arrived in time, and after a `stop` command or `drain`.

        Raises:
            InvalidArgument: the timeout is negative or not a number.
            Fenced: a newer process has this worker id.
            PeerError: a fault that waiting does not mend. Others are retried in the background.
        """
        taken: list[LoadTarget] = []
        try:
            with self._last_poll:
                self._check()
                deadline = Deadline(check_timeout_seconds("timeout", timeout))
                self._inbox.send_unsent()
                if self._inbox.waiting or self.paused:
                    self._obey_commands()
                # None: another thread was waiting all this time.
                return self._taking.run_within(deadline.remaining, self._take, deadline, taken)
        except BaseException:  # an interrupt: the next call returns what this one has taken
            for target in taken:
                self._untaken = target if target.version else None
            raise

    def poll(self, model: Model | None = None) -> bool:
        """Obey the commands that have arrived, and load the newest weights if there are any. Cheap otherwise.

        While a `pause` is in force, this does not return unless the worker drains.

        Args:
            model: a `torch.nn.Module`, which takes what its `load_state_dict` takes; or a dictionary, which is filled
                if it is empty, and otherwise has its tensors and arrays overwritten in place, in their own dtypes, and
                its other values replaced; or None, to obey commands only.

        Returns:
            Whether new weights were loaded. `version` is their number.

        Raises:
            WeightsMismatch: the weights do not fit the model, which is unchanged; the message names keys and shapes.
                `poll` does not offer them again: call `load_weights` with a model that they fit.
            UnsupportedType: the model is neither a module nor a dictionary.
            Fenced: a newer process has this worker id.
            PeerError: a fault that waiting does not mend. Others are retried in the background.
        """
        with self._last_poll:
            self._check()
            self._inbox.send_unsent()
            if self._inbox.waiting or self.paused:
                self._obey_commands()
            if model is None or not self._subscriber.ready or not self.running:
                return False
            check_target(model)
            target = LoadTarget(model)
            self._weights.apply(target)
            return bool(target.version)

    # Experiences

    def send_experiences(
        self, batch: Mapping[str, Any], timeout: float | None = None, *, rows: SupportsIndex | None = None
    ) -> SendReceipt:
        """Send one batch, tagged with the applied version. Return once it has reached the client's level.

        Args:
            batch: a dictionary or another mapping, nested or not, of tensors, arrays and plain values. No other thread
                may write to it during the call.
            timeout: the most seconds to wait for room in the queue; the client's timeout by default.
            rows: the number of rows, for counts and rates, if it is not the leading dimension of the first array or
                tensor; for example in `{"transitions": [50 dictionaries]}`.

        Returns:
            A receipt with `sequence`, `version`, `rows` and sizes. It is false if the batch was dropped: at a full
            queue with `when_full="drop_newest"`, or because a `stop` came while waiting for room.

        Raises:
            UnsupportedType: a value cannot be encoded; the message names its path.
            BatchTooLarge: the batch alone exceeds the queue's `max_queue_bytes`, or what the server takes.
            QueueFull: there was no room in time. The batch was not sent.
            Unconfirmed: the batch was accepted, and its arrival was not confirmed in time. It is kept and sent again
                in the background: do not send it a second time.
            DeadlineExceeded: no learner opened the run in time. The batch was not sent.
            Fenced: a newer process has this worker id.
            PeerError: the server refused, or could not be reached in time. The batch was not sent.
        """
        self._check()
        if not is_mapping(batch):
            raise UnsupportedType(
                f"a batch is a dictionary, not a {type_name(batch)}; send one, as from dataclasses.asdict()"
            )
        if timeout is not None:
            timeout = check_positive_seconds("timeout", timeout)
        return self._sender.send(
            batch,
            version=self.version,
            rows=rows,
            timeout_seconds=self._connection.timeout_seconds if timeout is None else timeout,
            stopped=self._gives_up_sending,
        )

    def flush(self, timeout: float | None = None) -> int:
        """Wait until every batch that was sent has reached its level.

        At level `"learner"` that is when the learner has acknowledged it. At the other levels there is something to
        wait for only after `Unconfirmed`.

        Args:
            timeout: the most seconds to wait; the client's timeout by default.

        Returns:
            How many batches have not reached their level in time.

        Raises:
            Fenced: a newer process has this worker id.
            PeerError: the server refused, or could not be reached in time.
        """
        self._check()
        seconds = (
            self._connection.timeout_seconds if timeout is None else check_timeout_seconds("timeout", timeout)
        )
        return self._sender.flush(seconds)

    # The end

    def close(self) -> None:
        """Leave the run within the client's timeout. Further calls change nothing.

        The order: wait for batches that have not reached their level, stop the threads, close the queue, send the
        acknowledgements that are left, and leave the roster. An `Unconfirmed` batch is waited for during three
        quarters of the timeout; if the worker drains, so are all batches that have not reached their level. A worker
        that saw the end of the run before it polled first obeys the commands that it has, up to the `stop`.
        """
        if is_exiting():
            return
        if not self._life.ended:
            self._connection.check_process()
            deadline = Deadline(self._connection.timeout_seconds)
            self._obey_last_commands(deadline)
            self._life.closing = True
            self._parts.finish_sending(deadline)
            if not self._commands.is_calling:
                self._inbox.finish_interrupted()
            self._life.end(deadline)
        self._parts.signals.restore()

    # Internals

    def _check(self) -> None:
        """Raise `Closed`, `ForkedProcess`, or the error that ended a background thread, such as `Fenced`."""
        self._life.check()

    @property
    def _finished(self) -> bool:
        """Whether no further command is obeyed."""
        return self._commands.stopped or self.draining or self._life.closing

    def _obey_commands(self, deadline: Deadline | None = None) -> None:
        """Obey every command that has arrived. While paused, wait for further ones, up to the deadline.

        A handler that calls the client obeys none: the next command begins when its own is done.
        """
        if not self._commands.is_calling:
            self._obeying.run(self._obey_arrived, deadline)

    def _obey_arrived(self, deadline: Deadline | None) -> None:
        # A stop that was interrupted between its effect and its acknowledgement is finished, too.
        while (not self._finished or self._inbox.begun) and not (deadline and deadline.over):
            waits = self.paused and self.running
            command = self._inbox.next(CHECK_SECONDS if waits else 0)
            if command is not None:
                self._commands.obey(command, self._inbox)
            elif waits:
                self._check()
            else:
                return

    def _obey_last_commands(self, deadline: Deadline) -> None:
        """Obey what has arrived, if the end of the run ended the worker's loop before a `poll` could obey it."""
        if not self._heartbeat.run_ended:
            return
        try:
            with within(deadline):
                self._obey_commands(deadline)
        except PeerError as error:
            logger.debug(
                "worker %d leaves with commands that it has not obeyed: %s", self.worker_id, str(error)
            )

    def _wait_and_load(
        self, model: Model, deadline: Deadline, *, newer_than: int | None, latest: int = 0
    ) -> bool:
        """Load a version into a model as soon as it is ready; return False if the worker is to end before.

        Args:
            newer_than, latest: as in `WeightsApplier.wait`.

        Raises:
            DeadlineExceeded: none came in time.
        """
        if newer_than is None:
            self._subscriber.offer_again(self.version)
        target, sought = LoadTarget(model), self._sought(newer_than)
        if self.running:
            go_on = partial(self._go_on, deadline)
            self._weights.wait(target, deadline, go_on, newer_than=newer_than, latest=latest, sought=sought)
        if not target.version and self._may_wait:
            raise DeadlineExceeded(
                f"no {sought} came within {deadline.seconds:g} s: {self._subscriber.reason}"
            )
        return bool(target.version)

    def _take(self, deadline: Deadline, taken: list[LoadTarget]) -> tuple[int, dict[str, Any]] | None:
        """Return the newest weights; note in `taken` what the next call returns if they do not reach the caller."""
        target = self._untaken
        if target:
            self._weights.complete(target)
        if target is None or target.version < self.version:  # a newer one was loaded since
            target = LoadTarget({})
        taken.append(target)
        self._untaken = None
        if not target.version and self.running:
            self._weights.wait(target, deadline, partial(self._go_on, deadline), sought=self._sought(None))
        return (target.version, target.model) if target.version else None

    def _go_on(self, deadline: Deadline) -> bool:
        """Obey commands, and return whether a call that waits until the deadline is to go on."""
        self._obey_commands(deadline)
        if self.running:
            self._check()
        return self._may_wait

    @property
    def _may_wait(self) -> bool:
        """Whether a call may wait: the worker runs, and if a handler calls, no `stop` waits for that handler."""
        return self.running and not (self._inbox.contains("stop") and self._commands.is_calling)

    def _sought(self, newer_than: int | None) -> str:
        """Return in words which weights a call waits for."""
        after = self.version if newer_than is None else newer_than
        newer = f" newer than version {after}" if after else ""
        return f"weights{newer} in the run {self.run!r} on {self._connection.address}"

    def _gives_up_sending(self) -> bool:
        """Return whether to drop a batch that waits for room. Not while draining: it is then still sent."""
        ended = self._life.closing or self._commands.stopped or self._heartbeat.run_ended
        return ended or self._inbox.contains("stop")
