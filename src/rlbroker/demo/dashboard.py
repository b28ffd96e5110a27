"""What a person sees while training runs: a dashboard on a terminal, lines elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlbroker.backend.text import counted
from rlbroker.demo.training_progress import Progress, Summary

CHART_WIDTH, CHART_HEIGHT = 64, 8
#: Over how long the steps per second are taken.
RATE_SECONDS = 5.0
PLAIN_SECONDS = 5.0
#: For people, why a worker missed a version.
_MISSED = {
    "superseded": "superseded by a newer one",
    "failed": "that could not be applied",
    "away": "while away",
    "left": "on leaving",
}
_BLOCKS = " ▁▂▃▄▅▆▇█"


class View(Protocol):
    """Shows progress; a context manager, so that a terminal is left as it was."""

    def __enter__(self) -> Self:
        """Start showing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing, and leave the last state on the screen."""

    def update(self, progress: Progress) -> None:
        """Show the newest state."""


def open_view(env_id: str, console: Console | None = None) -> View:
    """Return a dashboard for a terminal; plain lines for a file or a pipe, or where NO_COLOR is set."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal and not console.no_color:
        return Dashboard(env_id, console)
    return PlainLines(partial(print, end="", file=console.file, flush=True))  # a log is read while it grows


def chart(values: Sequence[float], width: int, height: int, top: float) -> list[str]:
    """Draw values between 0 and `top` as columns of block characters; return `height` lines.

    The values are spread over the whole width, with straight lines between them.

    >>> chart([0, 4], 5, 2, top=4.0)
    ['   ▄█', ' ▄███']
    """
    columns = []
    for column in range(width):
        place = column * (len(values) - 1) / max(width - 1, 1)
        before = int(place)
        after = min(before + 1, len(values) - 1)
        columns.append(values[before] + (values[after] - values[before]) * (place - before))
    lines = []
    for row in reversed(range(height)):
        eighths = (round((value / top * height - row) * 8) for value in columns)
        lines.append("".join(_BLOCKS[min(max(n, 0), 8)] for n in eighths))
    return lines


class Rate:
    """Steps per second over the last few seconds."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._points: deque[tuple[float, int]] = deque()

    def __call__(self, progress: Progress) -> float:
        """Take a point, and return the rate up to it."""
        self._points.append((progress.seconds, progress.steps))
        while len(self._points) > 2 and progress.seconds - self._points[1][0] >= RATE_SECONDS:
            self._points.popleft()
        seconds, steps = self._points[0]
        return (progress.steps - steps) / max(progress.seconds - seconds, 1e-9) if progress.steps else 0.0


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _staleness(progress: Progress) -> str:
    if not progress.batches:
        return "-"
    return f"{sum(staleness for _, _, staleness in progress.batches) / len(progress.batches):.1f}"


class JsonLines:
    """Writes every state as a line of JSON, for `rlbroker demo` to read."""

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing."""

    def update(self, progress: Progress) -> None:
        """Write a line, at once."""
        print(progress.to_json(), flush=True)


class PlainLines:
    """Writes a line every few seconds, and the last state at the end."""

    def __init__(self, write: Callable[[str], object], seconds: float = PLAIN_SECONDS) -> None:
        """Write with `write`, at most once in `seconds`."""
        self._write = write
        self._seconds = seconds
        self._rate = Rate()
        self._due = 0.0
        self._unwritten: str | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last state, if it was not due yet."""
        if self._unwritten is not None:
            self._write(self._unwritten)

    def update(self, progress: Progress) -> None:
        """Write a line if one is due."""
        self._unwritten = (
            f"{progress.seconds:6.1f} s  {progress.steps:>9,} steps  {self._rate(progress):>7,.0f} steps/s  "
            f"version {progress.version}  return {_mean(progress.mean_return)} "
            f"({counted(progress.episodes, 'episode')})  staleness {_staleness(progress)}  "
            f"queue {progress.queued}  missed {progress.missed}  "
            f"workers {len(progress.workers)}\n"
        )
        if progress.seconds >= self._due:
            self._due = progress.seconds + self._seconds
            self._write(self._unwritten)
            self._unwritten = None


class Dashboard:
    """Redraws one panel in place, a few times a second."""

    def __init__(self, env_id: str, console: Console) -> None:
        """Draw on `console`, which should be a terminal."""
        self._env_id = env_id
        self._rate = Rate()
        self._curve: list[float] = []
        self._live = Live(
            Panel("starting the processes …", title=self._title()),
            console=console,
            auto_refresh=False,
        )

    def _title(self) -> str:
        return f"rlbroker: PPO on {self._env_id}"

    def __enter__(self) -> Self:
        """Show that something is about to begin."""
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last panel on the screen."""
        self._live.stop()

    def update(self, progress: Progress) -> None:
        """Redraw."""
        if progress.mean_return is not None:
            self._curve.append(progress.mean_return)
        self._live.update(self.render(progress), refresh=True)

    def render(self, progress: Progress) -> RenderableType:
        """Return the panel for a state."""
        return Panel(
            Group(self._chart(progress), Text(), self._figures(progress), Text(), _roster(progress)),
            title=self._title(),
            subtitle=f"{progress.seconds:.0f} s, {progress.seconds_left:.0f} s left",
            width=CHART_WIDTH + 14,
        )

    def _chart(self, progress: Progress) -> RenderableType:
        """Draw the learning curve; returns below zero are shifted up, so that 0 is the lowest column."""
        if not self._curve:
            return Text("waiting for the first episodes …", style="dim")
        low = min(0.0, *self._curve)
        high = max(progress.target or 0.0, *self._curve, low + 1.0)
        text = Text("mean return of the last 100 episodes", style="dim")
        if progress.target is not None:
            text.append(f", solved at {progress.target:g}")
        lines = chart([value - low for value in self._curve], CHART_WIDTH, CHART_HEIGHT, high - low)
        for number, line in enumerate(lines):
            label = f"{high:.0f}" if number == 0 else f"{low:.0f}" if number == CHART_HEIGHT - 1 else ""
            text.append(f"\n{label:>7} │", style="dim")
            text.append(line, style="not dim green")
        return text

    def _figures(self, progress: Progress) -> RenderableType:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            table.add_column()
        table.add_row(
            f"return [bold]{_mean(progress.mean_return)}[/]",
            f"episodes [bold]{progress.episodes:,}[/]",
            f"steps [bold]{progress.steps:,}[/]",
            f"steps/s [bold]{self._rate(progress):,.0f}[/]",
        )
        table.add_row(
            f"version [bold]{progress.version}[/]",
            f"staleness [bold]{_staleness(progress)}[/]",
            f"queued [bold]{progress.queued}[/]",
            f"missed updates [bold]{progress.missed}[/]",
        )
        return table


def _roster(progress: Progress) -> RenderableType:
    if not progress.workers:
        return Text("no worker yet", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("worker", "host", "pid", "state", "version", "behind"):
        table.add_column(name, justify="left" if name in ("host", "state") else "right", style="default")
    for worker in progress.workers:
        table.add_row(
            str(worker.worker_id),
            Text(worker.host),
            str(worker.pid),
            worker.state,
            str(worker.version),
            str(worker.staleness),
        )
    return table


def describe(summary: Summary) -> str:
    """Return what came of a training run, in a few lines for a person.

    Example: the first line is ``Solved CartPole-v1 in 14.2 s: mean return 476.9 …``.
    """
    heading = {
        "solved": f"Solved {summary.env_id} in {summary.seconds:.1f} s",
        "not solved in time": f"{summary.env_id} is not solved after {summary.seconds:.1f} s",
        "trained": f"Trained on {summary.env_id} for {summary.seconds:.1f} s",
        "interrupted": f"Interrupted after {summary.seconds:.1f} s of training on {summary.env_id}",
        "moved": f"Told to go after {summary.seconds:.1f} s of training on {summary.env_id}, to be started again; "
        "the workers go on",
    }[summary.outcome]
    target = "" if summary.target is None else f" (solved at {summary.target:g})"
    batches = [f"{summary.batches_delivered:,} delivered"]
    batches += [f"{count:,} {reason}" for reason, count in summary.batches_lost.items()] or ["0 lost"]
    missed = (
        ", ".join(f"{count:,} {_MISSED.get(why, why)}" for why, count in summary.missed.items()) or "none"
    )
    lines = [
        f"{heading}: mean return {_mean(summary.mean_return)} over the last 100 episodes{target}",
        f"  steps     {summary.steps:,} in {counted(summary.episodes, 'episode')}, "
        f"{summary.steps / max(summary.seconds, 1e-9):,.0f} a second",
        f"  weights   {counted(summary.versions, 'version')} published; missed by workers: {missed}",
        f"  staleness {summary.mean_staleness:.2f} versions on average, {summary.max_staleness} at most",
        f"  batches   {summary.batches_produced:,} produced = {' + '.join(batches)}",
    ]
    if summary.workers_left:
        left = ", ".join(map(str, summary.workers_left))
        lines.append(f"  workers that did not leave when told to stop: {left}")
    return "\n".join(lines)
