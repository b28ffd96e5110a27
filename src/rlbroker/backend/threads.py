"""The threads behind a client: they go on after faults of the network, and stop at errors that are final."""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from rlbroker.backend.deadline import Backoff
from rlbroker.backend.outage import OutageLog
from rlbroker.errors import AccessDenied, Fenced, IncompatibleFormat, PeerError, TlsFailed

logger = logging.getLogger("rlbroker")

#: So many calls of `wake` are heard at once.
RINGS = 4096

#: It takes no file descriptor, of which a process with many workers has few to spare.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)

#: What trying again does not mend.
FINAL = (AccessDenied, TlsFailed, Fenced, IncompatibleFormat)


class BackgroundThread:
    """A daemon thread that repeats one step until it is stopped.

    A step that fails because of the server (away, out of memory, disk full …) is tried again after a growing
    pause. Errors that waiting does not mend, and our own mistakes, end the thread; the next `check` raises
    them, so that they reach the caller.
    """

    def __init__(self, name: str, step: Callable[[], bool | None]) -> None:
        """Prepare the thread.

        Args:
            name: shown in logs and debuggers.
            step: does one piece of work; must return within a second or so. It gives False if it did not ask
                the server for anything, and so cannot tell whether it is back.
        """
        self._step = step
        self._stopping = threading.Event()
        #: What `wake` writes to, and what `wait_for` reads; there is none before the thread has started.
        self._bell: tuple[socket.socket, ...] = ()
        self._thread = threading.Thread(target=self._run, name=f"rlbroker-{name}", daemon=True)
        self.error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called; long steps look at it."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start repeating."""
        self._bell = socket.socketpair()
        for end in self._bell:
            end.setblocking(False)
        self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond `stop`."""
        self._stopping.wait(seconds)

    def wait_for(self, sock: socket.socket, seconds: float) -> bool:
        """Wait until there is something to read, but not beyond `wake` or `stop`; give whether there is.

        Args:
            sock: where.
            seconds: how long to wait at most.
        """
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        if self.stopping:
            return False
        bells = self._bell[1:]
        with _Selector() as selector:
            for one in (sock, *bells):
                selector.register(one, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        for bell in bells:
            if bell in ready:
                bell.recv(RINGS)
        return sock in ready

    def wake(self) -> None:
        """Have `wait_for` return, the next one if there is none now: there is something else to do."""
        for bell in self._bell[:1]:
            with suppress(OSError):  # it was rung often, or the thread has ended
                bell.send(b"!")

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        if self.error is not None:
            raise self.error.with_traceback(None)  # each raise would add to it otherwise

    def request_stop(self) -> None:
        """Have the thread end after its present step."""
        self._stopping.set()
        self.wake()

    def stop(self, timeout_seconds: float) -> bool:
        """End the thread and wait for it; give whether it ended in time."""
        self.request_stop()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            bell, self._bell = self._bell, ()
            for end in bell:
                end.close()

    def _work(self) -> None:
        backoff, outage = Backoff(), OutageLog(self._thread.name)
        while not self.stopping:
            try:
                worked = self._step()
            except Exception as error:
                if not isinstance(error, PeerError) or isinstance(error, FINAL):
                    if not self.stopping:
                        self.error = error
                        if not isinstance(error, PeerError):
                            logger.exception("%s stopped", self._thread.name)
                    return
                if not self.stopping:
                    outage.tell(error)
                self.pause(backoff.next())
            else:
                if worked is False:
                    continue
                outage.end()
                backoff.reset()
