"""`rlbroker demo`: the whole thing on one machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from rlbroker.ops.cli.options import Env, MaxSeconds, Minutes, Seed


def demo(
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 2,
    env: Env = "CartPole-v1",
    seed: Seed = None,
    minutes: Minutes = 3.0,
    max_seconds: MaxSeconds = None,
    output: Annotated[Path, typer.Option(help="Picture of the training run.")] = Path("demo.png"),
    keep_server: Annotated[
        bool, typer.Option("--keep-server", help="Leave the server up afterwards, until Ctrl-C.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            envvar=["RLBROKER_REDIS_URL", "REDIS_URL"], help="Server to use; without one, an embedded server."
        ),
    ] = None,
) -> None:
    """Train a policy with PPO: a server, a learner and workers, each a process of its own.

    Ends as soon as the environment is solved. Exit code: 0 solved, 1 not solved in time, 130 after Ctrl-C.

    Example: rlbroker demo --workers 2 --env CartPole-v1 --seed 1
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from rlbroker.demo import require_extras

    require_extras()
    from rlbroker.demo.launch import DemoSettings, run_demo

    settings = DemoSettings(
        workers=workers,
        env_id=env,
        seed=seed,
        seconds=minutes * 60.0 if max_seconds is None else max_seconds,
        output=output,
        keep_server=keep_server,
        url=url,
    )
    raise typer.Exit(run_demo(settings))
