"""The background threads of a client: they outlast network faults, and end at errors that are final."""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from rlbroker.backend.deadline import Backoff
from rlbroker.backend.error_mapping import FINAL_ERRORS
from rlbroker.errors import PeerError

logger = logging.getLogger("rlbroker")

#: How many calls of `wake` one read clears.
WAKE_BYTES = 4096

#: A selector that needs no file descriptor; a process with many workers has few to spare.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class OutageLog:
    """The log of an operation that may fail for a while: one line when an outage begins, one when it ends.

    Not safe to use from several threads at once.
    """

    def __init__(self, what: str) -> None:
        """Start without an outage. Each line begins with the operation, `what`."""
        self._what = what
        #: The latest error of the present outage.
        self.error: Exception | None = None

    def report(self, error: Exception, more: str = "") -> None:
        """Record a failure; if it begins an outage, log it with `more`, a second clause."""
        if self.error is None:
            logger.warning("%s: %s; %strying again until it works", self._what, error, more and f"{more}; ")
        self.error = error

    def end(self) -> None:
        """Log the end of the outage, if there is one; at the level of its beginning, so that no reader misses it."""
        if self.error is not None:
            logger.warning("%s: it works again", self._what)
        self.error = None


class BackgroundThread:
    """A daemon thread that repeats one step until it is stopped.

    A step that fails because of the server (unreachable, out of memory, disk full …) is retried with exponential
    back-off. Errors that a retry does not cure (`FINAL_ERRORS`), and bugs, end the thread; the next `check` raises them
    to the caller.
    """

    def __init__(self, name: str, step: Callable[[], bool | None]) -> None:
        """Create the thread; `start` runs it.

        Args:
            name: shown in logs and debuggers.
            step: does one piece of work, and must return within a second or so. It returns False if it did not use
                the server, and so cannot tell whether an outage is over.
        """
        self._step = step
        self._stopping = threading.Event()
        #: The two ends of a socket pair: `wake` writes to the first, `wait_for` reads from the second.
        #: Empty before the thread starts.
        self._wake_pair: tuple[socket.socket, ...] = ()
        self._thread = threading.Thread(target=self._run, name=f"rlbroker-{name}", daemon=True)
        self.error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called; long steps must check it."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start repeating the step."""
        self._wake_pair = socket.socketpair()
        for end in self._wake_pair:
            end.setblocking(False)
        self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait for some time, or until `stop`."""
        self._stopping.wait(seconds)

    def wait_for(self, sock: socket.socket, seconds: float) -> bool:
        """Wait until a socket is readable, `wake` or `stop` is called, or the time is over.

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
        """Raise the error that ended the thread, if one did."""
        if self.error is not None:
            raise self.error.with_traceback(None)  # otherwise each raise would add to its traceback

    def request_stop(self) -> None:
        """Make the thread end after its present step."""
        self._stopping.set()
        self.wake()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread and wait for it; return whether it ended in time."""
        self.request_stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            pair, self._wake_pair = self._wake_pair, ()
            for end in pair:
                end.close()

    def _work(self) -> None:
        backoff, outage = Backoff(), OutageLog(self._thread.name)
        while not self.stopping:
            try:
                used_server = self._step()
            except Exception as error:
                if not isinstance(error, PeerError) or isinstance(error, FINAL_ERRORS):
                    if not self.stopping:
                        self.error = error
                        if not isinstance(error, PeerError):
                            logger.exception("%s stopped", self._thread.name)
                    return
                if not self.stopping:
                    outage.report(error)
                self.pause(backoff.next())
            else:
                if used_server is False:
                    continue
                outage.end()
                backoff.reset()
