"""The end of a client: by a call, or when nothing refers to the client any more."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence

from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import Deadline
from rlbroker.backend.threads import BackgroundThread
from rlbroker.errors import Closed


class Lifetime:
    """Whether a client may be used, and how it ends.

    A client is a thin object that its parts and threads never refer to, so that it disappears with the user's last
    reference. Its first thread leaves the run in both cases: after `end`, which waits for that, and after the client
    was dropped. So an interrupt of the closing thread leaves nothing half-done, and a dropped client is closed neither
    in the garbage collector nor under a lock that some thread holds.

    Attributes:
        closing: whether the client may not be used any more.
    """

    def __init__(
        self,
        client: object,
        name: str,
        connection: Connection,
        *,
        close_call: str,
        leave: Callable[[Deadline, bool], None],
        release: Callable[[], None],
    ) -> None:
        """Watch a client that is being constructed; nothing is open yet.

        Args:
            client: the client.
            name: what to call it in messages, as in `WorkerClient of the run 'pong'`.
            connection: the client's connection.
            close_call: the call that the user should have made.
            leave: leaves the run until the deadline, given whether the client was dropped. Called in the first thread,
                or in `end` if that thread does not run.
            release: closes everything that is open, without asking the server. May be called several times.
        """
        self._name, self._connection, self._close_call = name, connection, close_call
        self._leave, self._release = leave, release
        self._pid = os.getpid()
        self._threads: Sequence[BackgroundThread] = ()
        self._complete = False  #: whether the user has got the client
        self._dropped = self._left = False
        self._deadline = Deadline(0)
        self.closing = False
        self._finalizer = weakref.finalize(client, self._end_dropped)
        self._finalizer.atexit = False

    def add_threads(self, *threads: BackgroundThread) -> None:
        """Add threads of the client. The first one leaves the run, so it must be started before the run is joined."""
        self._threads = (*self._threads, *threads)

    def begin(self) -> None:
        """Note that the constructor is done."""
        self._complete = True

    def check(self) -> None:
        """Raise `Closed`, `ForkedProcess`, or the error that ended a background thread, such as `Fenced`."""
        if self.closing:
            kind = self._name.partition(" ")[0]
            raise Closed(f"this {kind} was closed; make a new one")
        self._connection.check_process()
        for thread in self._threads:
            thread.check()

    @property
    def ended(self) -> bool:
        """Whether the client has ended, and nothing is left to do."""
        return not self._finalizer.alive

    def end(self, deadline: Deadline) -> None:
        """Leave the run, and wait for that until the deadline. May be called again, after an interrupt too."""
        self.closing, self._deadline = True, deadline
        for thread in self._threads[:1]:
            thread.request_stop(then=self._leave_once)
            thread.wait_for_end(deadline.remaining)
        if self._leaves_by_itself:
            self._release()  # what the thread is waiting for fails now
        else:
            self._leave_once()
        self._finalizer.detach()

    @property
    def _leaves_by_itself(self) -> bool:
        return any(thread.running for thread in self._threads[:1])

    def _leave_once(self) -> None:
        if self._left:
            return
        try:
            self._leave(self._deadline, self._dropped)
        finally:
            self._left = True
            self._close_all()

    def _close_all(self) -> None:
        self._release()
        for thread in self._threads:
            thread.release()
        # Nothing refers in a circle any more: the client's memory need not wait for the garbage collector.
        self._leave, self._release = _leave_nothing, _release_nothing

    def _end_dropped(self) -> None:
        """End a client that was dropped. Runs anywhere: takes no lock, and does not wait."""
        if os.getpid() != self._pid:
            for thread in self._threads:
                thread.release()
            return
        self.closing = self._dropped = True
        self._deadline = Deadline(self._connection.timeout_seconds)
        if self._leaves_by_itself:
            self._threads[0].request_stop(then=self._leave_once)
        else:
            self._close_all()
        if self._complete:
            # Last, because this raises where warnings are errors.
            warnings.warn(f"unclosed {self._name}; call {self._close_call} at the end", ResourceWarning, 3)


def _leave_nothing(deadline: Deadline, dropped: bool) -> None:
    pass


def _release_nothing() -> None:
    pass


def is_exiting() -> bool:
    """Return whether the interpreter is exiting, so that threads stand still and modules are being emptied."""
    return sys is None or sys.is_finalizing()
