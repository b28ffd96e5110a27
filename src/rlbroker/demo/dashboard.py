"""The views of a training run: a dashboard on a terminal, plain lines or JSON elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlbroker.backend.text import counted
from rlbroker.demo.training_progress import Progress, Summary

CHART_WIDTH, CHART_HEIGHT = 64, 8
#: The window for the steps per second.
RATE_SECONDS = 5.0
PLAIN_LINE_SECONDS = 5.0
#: The text in the summary for each reason of a missed version.
_MISSED_TEXTS = {
    "superseded": "superseded by a newer one",
    "failed": "failed to apply",
    "away": "while away",
    "left": "on leaving",
}
_BLOCKS = " ▁▂▃▄▅▆▇█"


class View:
    """A view of the progress, as a context manager, which leaves the last state on the screen."""

    def __enter__(self) -> Self:
        """Start the view."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the view."""

    def update(self, progress: Progress) -> None:
        """Show a new state."""
        raise NotImplementedError


def open_view(env_id: str, console: Console | None = None) -> View:
    """Return a dashboard for a terminal, or plain lines for a file, for a pipe, or if NO_COLOR is set."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal and not console.no_color:
        return Dashboard(env_id, console)
    # Flush, because a log is read while training runs.
    return PlainLines(partial(print, end="", file=console.file, flush=True))


def draw_chart(values: Sequence[float], width: int, height: int, top: float) -> list[str]:
    """Return a chart of values between 0 and `top`: `height` lines of block characters.

    The values are spread over the whole width, with linear interpolation between them.

    >>> draw_chart([0, 4], 5, 2, top=4.0)
    ['   ▄█', ' ▄███']
    """
    columns = []
    for column in range(width):
        position = column * (len(values) - 1) / max(width - 1, 1)
        before = int(position)
        after = min(before + 1, len(values) - 1)
        columns.append(values[before] + (values[after] - values[before]) * (position - before))
    lines = []
    for row in reversed(range(height)):
        eighths = (round((value / top * height - row) * 8) for value in columns)
        lines.append("".join(_BLOCKS[min(max(n, 0), 8)] for n in eighths))
    return lines


class StepRate:
    """The steps per second over the last few seconds."""

    def __init__(self) -> None:
        """Start without any points."""
        self._points: deque[tuple[float, int]] = deque()

    def update(self, progress: Progress) -> float:
        """Add a point; return the rate up to it."""
        self._points.append((progress.seconds, progress.steps))
        while len(self._points) > 2 and progress.seconds - self._points[1][0] >= RATE_SECONDS:
            self._points.popleft()
        seconds, steps = self._points[0]
        return (progress.steps - steps) / max(progress.seconds - seconds, 1e-9) if progress.steps else 0.0


def _format_mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _format_staleness(progress: Progress) -> str:
    if not progress.batches:
        return "-"
    return f"{sum(staleness for _, _, staleness in progress.batches) / len(progress.batches):.1f}"


class JsonLines(View):
    """A view that writes each state as a line of JSON, which `rlbroker demo` reads."""

    def update(self, progress: Progress) -> None:
        """Write and flush a line."""
        print(progress.to_json(), flush=True)


class PlainLines(View):
    """A view that writes a line every few seconds, and the last state at the end."""

    def __init__(self, write: Callable[[str], object], seconds: float = PLAIN_LINE_SECONDS) -> None:
        """Call `write` at most once per `seconds`."""
        self._write = write
        self._seconds = seconds
        self._step_rate = StepRate()
        self._due = 0.0
        self._unwritten: str | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last state if it was not written yet."""
        if self._unwritten is not None:
            self._write(self._unwritten)

    def update(self, progress: Progress) -> None:
        """Write a line if it is due."""
        step_rate = self._step_rate.update(progress)
        self._unwritten = (
            f"{progress.seconds:6.1f} s  {progress.steps:>9,} steps  {step_rate:>7,.0f} steps/s  "
            f"version {progress.version}  return {_format_mean(progress.mean_return)} "
            f"({counted(progress.episodes, 'episode')})  staleness {_format_staleness(progress)}  "
            f"queue {progress.queued}  missed {progress.missed}  "
            f"workers {len(progress.workers)}\n"
        )
        if progress.seconds >= self._due:
            self._due = progress.seconds + self._seconds
            self._write(self._unwritten)
            self._unwritten = None


class Dashboard(View):
    """A view that redraws one panel in place at each update."""

    def __init__(self, env_id: str, console: Console) -> None:
        """Prepare to draw on `console`, which should be a terminal."""
        self._env_id = env_id
        self._step_rate = StepRate()
        self._mean_returns: list[float] = []
        self._live = Live(
            Panel("starting the processes …", title=self._title()),
            console=console,
            auto_refresh=False,
        )

    def _title(self) -> str:
        return f"rlbroker: PPO on {self._env_id}"

    def __enter__(self) -> Self:
        """Show the first panel."""
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last panel on the screen."""
        self._live.stop()

    def update(self, progress: Progress) -> None:
        """Redraw the panel."""
        if progress.mean_return is not None:
            self._mean_returns.append(progress.mean_return)
        self._live.update(self.render(progress), refresh=True)

    def render(self, progress: Progress) -> RenderableType:
        """Return the panel that shows a state."""
        return Panel(
            Group(self._chart(progress), Text(), self._statistics(progress), Text(), _worker_table(progress)),
            title=self._title(),
            subtitle=f"{progress.seconds:.0f} s, {progress.seconds_left:.0f} s left",
            width=CHART_WIDTH + 14,
        )

    def _chart(self, progress: Progress) -> RenderableType:
        """Return the learning curve. Negative returns are shifted up, so that the lowest value has height 0."""
        if not self._mean_returns:
            return Text("waiting for the first episodes …", style="dim")
        low = min(0.0, *self._mean_returns)
        high = max(progress.target or 0.0, *self._mean_returns, low + 1.0)
        text = Text("mean return of the last 100 episodes", style="dim")
        if progress.target is not None:
            text.append(f", solved at {progress.target:g}")
        lines = draw_chart(
            [value - low for value in self._mean_returns], CHART_WIDTH, CHART_HEIGHT, high - low
        )
        for number, line in enumerate(lines):
            label = f"{high:.0f}" if number == 0 else f"{low:.0f}" if number == CHART_HEIGHT - 1 else ""
            text.append(f"\n{label:>7} │", style="dim")
            text.append(line, style="not dim green")
        return text

    def _statistics(self, progress: Progress) -> RenderableType:
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            table.add_column()
        table.add_row(
            f"return [bold]{_format_mean(progress.mean_return)}[/]",
            f"episodes [bold]{progress.episodes:,}[/]",
            f"steps [bold]{progress.steps:,}[/]",
            f"steps/s [bold]{self._step_rate.update(progress):,.0f}[/]",
        )
        table.add_row(
            f"version [bold]{progress.version}[/]",
            f"staleness [bold]{_format_staleness(progress)}[/]",
            f"queued [bold]{progress.queued}[/]",
            f"missed updates [bold]{progress.missed}[/]",
        )
        return table


def _worker_table(progress: Progress) -> RenderableType:
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
    """Return the summary of a training run as text of a few lines.

    Example: the first line is ``Solved CartPole-v1 in 14.2 s: mean return 476.9 …``.
    """
    heading = {
        "solved": f"Solved {summary.env_id} in {summary.seconds:.1f} s",
        "not solved in time": f"{summary.env_id} is not solved after {summary.seconds:.1f} s",
        "trained": f"Trained on {summary.env_id} for {summary.seconds:.1f} s",
        "interrupted": f"Interrupted after {summary.seconds:.1f} s of training on {summary.env_id}",
        "moved": f"Asked to leave after {summary.seconds:.1f} s of training on {summary.env_id}, to be restarted; "
        "the workers keep running",
    }[summary.outcome]
    target = "" if summary.target is None else f" (solved at {summary.target:g})"
    batches = [f"{summary.batches_delivered:,} delivered"]
    batches += [f"{count:,} {reason}" for reason, count in summary.batches_lost.items()] or ["0 lost"]
    missed = (
        ", ".join(
            f"{count:,} {_MISSED_TEXTS.get(reason, reason)}" for reason, count in summary.missed.items()
        )
        or "none"
    )
    lines = [
        f"{heading}: mean return {_format_mean(summary.mean_return)} over the last 100 episodes{target}",
        f"  steps     {summary.steps:,} in {counted(summary.episodes, 'episode')}, "
        f"{summary.steps / max(summary.seconds, 1e-9):,.0f} a second",
        f"  weights   {counted(summary.versions, 'version')} published; missed by workers: {missed}",
        f"  staleness {summary.mean_staleness:.2f} versions on average, {summary.max_staleness} at most",
        f"  batches   {summary.batches_produced:,} produced = {' + '.join(batches)}",
    ]
    if summary.workers_left:
        left = ", ".join(map(str, summary.workers_left))
        lines.append(f"  workers that did not leave after the stop command: {left}")
    return "\n".join(lines)
