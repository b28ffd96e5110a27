"""The background threads of a client: they outlast network faults, and stop working at errors that are final."""

from __future__ import annotations

import logging
import os
import queue
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from rlbroker.backend.deadline import Backoff, Deadline
from rlbroker.backend.error_mapping import FINAL_ERRORS
from rlbroker.errors import PeerError, raise_again, without_frames

logger = logging.getLogger("rlbroker")

#: How many calls of `wake` one read clears.
WAKE_BYTES = 4096

#: A selector that needs no file descriptor; a process with many workers has few to spare.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)

#: How long a thread waits at once for `request_stop` after an error that ended its work.
PARK_SECONDS = 3600.0

#: The longest wait for a thread's end between two looks at whether it has ended.
WAIT_SECONDS = 0.05


class OutageLog:
    """The log of an operation that may fail for a while: one line when an outage begins, one when it ends.

    Not safe to use from several threads at once.
    """

    def __init__(self, what: str) -> None:
        """Start without an outage. Each line begins with the operation, `what`."""
        self._what = what
        #: The latest error of the present outage; `raise_again` raises it.
        self.error: Exception | None = None

    def report(self, error: Exception, more: str = "") -> None:
        """Record a failure; if it begins an outage, log it with `more`, a second clause."""
        if self.error is None:
            logger.warning(
                "%s: %s; %strying again until it works", self._what, str(error), more and f"{more}; "
            )
        self.error = without_frames(error)

    def end(self) -> None:
        """Log the end of the outage, if there is one; at the level of its beginning, so that no reader misses it."""
        if self.error is not None:
            logger.warning("%s: it works again", self._what)
        self.error = None


class BackgroundThread:
    """A daemon thread that repeats one step until it is stopped.

    A step that fails because of the server (unreachable, out of memory, disk full …) is retried with exponential
    back-off. Errors that a retry does not cure (`FINAL_ERRORS`), and bugs, end the work; the next `check` raises them
    to the caller, and the thread only waits to be stopped.

    The calling threads take no lock and wait for no condition that an interrupt could leave behind. `request_stop` may
    be called anywhere, also by the garbage collector in any thread.

    Attributes:
        stopping: whether a stop was requested; long steps must check it.
        error: the error that ended the work.
    """

    def __init__(self, name: str, step: Callable[[], bool | None]) -> None:
        """Create the thread; `start` runs it.

        Args:
            name: shown in logs and debuggers.
            step: does one piece of work, and must return within a second or so. It returns False if it did not use
                the server, and so cannot tell whether an outage is over.
        """
        self._step = step
        self._then: Callable[[], None] | None = None
        self.stopping = False
        #: Each gets an item to end a wait of this thread, and of those that wait for its end. The flags tell the truth.
        self._stop_signal, self._end_signal = queue.SimpleQueue[None](), queue.SimpleQueue[None]()
        #: The two ends of a socket pair: `wake` writes to the first, `wait_for` reads from the second.
        #: Empty before the thread starts.
        self._wake_pair: tuple[socket.socket, ...] = ()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"rlbroker-{name}", daemon=True)
        self.error: Exception | None = None

    @property
    def running(self) -> bool:
        """Whether the thread was started in this process and has not ended."""
        started = self._thread.ident is not None and os.getpid() == self._pid
        return started and bool(self._wake_pair)

    def start(self) -> None:
        """Start repeating the step."""
        self._wake_pair = socket.socketpair()
        for end in self._wake_pair:
            end.setblocking(False)
        self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait for some time, or until a stop is requested."""
        if not self.stopping:
            with suppress(queue.Empty):
                self._stop_signal.get(timeout=seconds)

    def wait_for(self, sock: socket.socket, seconds: float) -> bool:
        """Wait until a socket is readable, `wake` or `request_stop` is called, or the time is over.

        Return whether the socket is readable.
        """
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        if self.stopping:
            return False
        wake_ends = self._wake_pair[1:]
        with _Selector() as selector:
            for one in (sock, *wake_ends):
                selector.register(one, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        for end in wake_ends:
            if end in ready:
                end.recv(WAKE_BYTES)
        return sock in ready

    def wake(self) -> None:
        """Make `wait_for` return early: the present call, or else the next one."""
        for end in self._wake_pair[:1]:
            with suppress(OSError):  # the socket's buffer is full, or the thread has ended
                end.send(b"!")

    def check(self) -> None:
        """Raise the error that ended the work, if one did."""
        if self.error is not None:
            raise_again(self.error)

    def request_stop(self, then: Callable[[], None] | None = None) -> None:
        """Make the thread end after its present step.

        Args:
            then: what the thread does last, if it has not ended yet; errors are logged.
        """
        if then is not None:
            self._then = then
        self.stopping = True
        self._stop_signal.put(None)
        self.wake()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread and wait for it; return whether it ended in time. Of itself, it has ended the steps."""
        self.request_stop()
        return self.wait_for_end(timeout_seconds)

    def wait_for_end(self, timeout_seconds: float) -> bool:
        """Wait until the thread has ended; return whether it has, or is the one that asks."""
        deadline = Deadline(timeout_seconds)
        while self.running and self._thread is not threading.current_thread():
            if deadline.over:
                return False
            with suppress(queue.Empty):
                self._end_signal.get(timeout=min(deadline.remaining, WAIT_SECONDS))
        return True

    def release(self) -> None:
        """Close the sockets of a thread that does not run: it was never started, or this is a forked child."""
        if not self.running:
            self._close_wake_pair()
            self._step = _do_nothing

    def _close_wake_pair(self) -> None:
        pair, self._wake_pair = self._wake_pair, ()
        for end in pair:
            end.close()

    def _run(self) -> None:
        try:
            self._work()
            while not self.stopping:
                self.pause(PARK_SECONDS)
            if self._then is not None:
                self._then()
        except Exception:
            logger.exception("%s ended", self._thread.name)
        finally:
            # Nothing refers in a circle any more: the client's memory need not wait for the garbage collector.
            self._step = self._then = _do_nothing
            self._close_wake_pair()
            self._end_signal.put(None)

    def _work(self) -> None:
        backoff, outage = Backoff(), OutageLog(self._thread.name)
        while not self.stopping:
            try:
                used_server = self._step()
            except Exception as error:
                if not isinstance(error, PeerError) or isinstance(error, FINAL_ERRORS):
                    if not self.stopping:
                        if not isinstance(error, PeerError):
                            logger.exception("%s stopped", self._thread.name)
                        self.error = without_frames(error)
                    return
                if not self.stopping:
                    outage.report(error)
                self.pause(backoff.next())
            else:
                if used_server is False:
                    continue
                outage.end()
                backoff.reset()


def _do_nothing() -> None:
    pass
