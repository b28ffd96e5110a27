"""Work that a background thread does for calls that wait for it, and that an interrupted call leaves to the thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from rlbroker.backend.deadline import Deadline
from rlbroker.errors import without_frames

Result = TypeVar("Result")

#: A wait looks at the outcome at least this often, in case another one was interrupted while it had the notice of it.
_LOOK_SECONDS: Final = 0.1


class Task(Generic[Result]):
    """One piece of work, and its outcome. Any number of threads may wait for it.

    Attributes:
        on_failure: called in the background with the error if the work fails; None to leave it to `result`.
    """

    def __init__(
        self, work: Callable[[], Result], *, on_failure: Callable[[BaseException], None] | None = None
    ) -> None:
        """Describe the work; `TaskThread.submit` has it done."""
        self.on_failure = on_failure
        self._work: Callable[[], Result] | None = work
        self._outcome: tuple[Result | None, BaseException | None] | None = None
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def done(self) -> bool:
        """Whether the work has ended, with or without success."""
        return self._outcome is not None

    @property
    def failed(self) -> bool:
        """Whether the work has ended without success."""
        return self._outcome is not None and self._outcome[1] is not None

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the work has ended; return whether it has."""
        deadline = Deadline(float("inf") if timeout_seconds is None else timeout_seconds)
        while not self.done and not deadline.over:
            with suppress(queue.Empty):
                self._ended.get(timeout=min(deadline.remaining, _LOOK_SECONDS))
        if self.done and self._ended.empty():  # for the next wait
            self._ended.put(None)
        return self.done

    def result(self, timeout_seconds: float | None = None) -> Result:
        """Wait for the result, and return it, or raise the error of the work.

        Raises:
            TimeoutError: the work has not ended within the timeout.
        """
        if not self.wait(timeout_seconds) or self._outcome is None:
            raise TimeoutError
        result, error = self._outcome
        if error is not None:
            raise error.with_traceback(None)
        return result  # type: ignore[return-value] # without an error there is one

    def run(self) -> None:
        """Do the work, once; called by the thread."""
        work, self._work = self._work, None
        if work is None:
            return
        outcome: tuple[Result | None, BaseException | None]
        try:
            outcome = work(), None
        except BaseException as error:  # noqa: BLE001 # `result` raises it
            outcome = None, without_frames(error)
        del work  # what it works on is not needed any more
        self._end(*outcome)

    def cancel(self, error: Exception) -> None:
        """End the task with an error, if the thread has not begun it."""
        if self._work is not None:
            self._work = None
            self._end(None, error)

    def _end(self, result: Result | None, error: BaseException | None) -> None:
        self._outcome = result, error
        self._ended.put(None)
        if error is not None and self.on_failure is not None:
            self.on_failure(error)


class TaskThread:
    """A daemon thread that does tasks, one after the other. It ends when this object is closed or dropped."""

    def __init__(self, name: str) -> None:
        """Start the thread; the name is shown in logs and debuggers."""
        tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._submit = tasks.put
        #: The thread has the queue only, so that it does not keep its owner.
        self._end = weakref.finalize(self, tasks.put, None)
        self._end.atexit = False
        threading.Thread(target=_do_tasks, args=(tasks,), name=f"rlbroker-{name}", daemon=True).start()

    def submit(self, task: Task[Any]) -> None:
        """Queue a task for the thread. A task that is submitted again, after an interrupt, runs once."""
        self._submit(task)

    def close(self) -> None:
        """End the thread after the tasks that were submitted before, without waiting for them."""
        self._end()


def _do_tasks(tasks: queue.SimpleQueue[Task[Any] | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run()
