"""The picture of a training run: returns and staleness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlbroker.demo.training_progress import Progress

_EPISODES, _MEAN, _TARGET = "#9db4c0", "#1b4965", "#ca6702"
_WORKERS = ("#1b4965", "#ca6702", "#2a9d8f", "#9b2226", "#6a4c93", "#606c38")


def plot(path: Path, history: Sequence[Progress], title: str) -> None:
    """Draw the return over steps, and each worker's staleness over time, into a PNG file.

    Args:
        path: the file to write, atomically.
        history: all progress reports of the run, in order.
        title: the line above the picture.
    """
    # Imported here, because the parent process of the demo does not draw and should start quickly.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    returns, staleness = figure.subplots(2, 1, height_ratios=(2, 1))
    for axes in (returns, staleness):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)

    episodes = [episode for point in history for episode in point.returns]
    steps = [step for step, _ in episodes]
    values = [value for _, value in episodes]
    returns.scatter(steps, values, s=7, color=_EPISODES, alpha=0.7, lw=0, label="one episode")
    returns.plot(steps, running_mean(values, 100), color=_MEAN, lw=2, label="mean of the last 100")
    target = history[-1].target if history else None
    if target is not None:
        returns.axhline(target, color=_TARGET, linewidth=1.2, linestyle="--", label=f"solved: {target:g}")
    returns.set(xlabel="environment steps, all workers", ylabel="return")
    returns.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:,.0f}"))
    returns.legend(frameon=False, loc="best", fontsize=9)

    batches = [batch for point in history for batch in point.batches]
    workers = sorted({worker_id for _, worker_id, _ in batches})
    for number, worker_id in enumerate(workers):
        # Staleness is an integer: without a shift the points of the workers would hide each other.
        shift = 0.12 * (number - (len(workers) - 1) / 2) / max(1.0, len(workers) / 4)
        staleness.scatter(
            [seconds for seconds, worker, _ in batches if worker == worker_id],
            [stale + shift for _, worker, stale in batches if worker == worker_id],
            s=9,
            lw=0,
            color=_WORKERS[number % len(_WORKERS)],
            label=f"worker {worker_id}",
        )
    staleness.plot(
        [seconds for seconds, _, _ in batches],
        running_mean([stale for _, _, stale in batches], 20),
        color=_MEAN,
        lw=1.2,
        label="mean of the last 20",
    )
    staleness.set(xlabel="seconds", ylabel="staleness of batches\n(versions behind)")
    staleness.set_ylim(-0.3, max([1, *(stale for _, _, stale in batches)]) + 0.6)
    staleness.yaxis.set_major_locator(MaxNLocator(integer=True))
    staleness.legend(frameon=False, loc="upper left", fontsize=9, ncols=5, handletextpad=0.3)

    unfinished = path.with_name(path.name + ".part")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return, for each value, the mean of the last `window` values up to it.

    >>> running_mean([2, 4, 6, 8], 2)
    [2.0, 3.0, 5.0, 7.0]
    """
    means = []
    total = 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
