"""`rlbroker learner`: the demo's training side, on any machine that reaches the server."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlbroker.ops.cli.options import Env, Hidden, MaxSeconds, Minutes, Seed, Url


def learner(
    url: Url = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the training job, the same as the workers'; without it RLBROKER_RUN, demo."
        ),
    ] = None,
    env: Env = "CartPole-v1",
    workers: Annotated[int, typer.Option(min=1, help="Number of workers that are expected.")] = 2,
    hidden: Hidden = 64,
    seed: Seed = None,
    minutes: Minutes = 3.0,
    max_seconds: MaxSeconds = None,
    target: Annotated[
        float | None,
        typer.Option(help="Mean return of 100 episodes that counts as solved; else the environment's own."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to draw a picture of the training run.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to keep the state of training in, and to go on from.")
    ] = None,
    progress: Annotated[
        Literal["auto", "json"],
        typer.Option(
            help="auto: a dashboard, or lines where that is no terminal. json: for programs; exit code 0."
        ),
    ] = "auto",
) -> None:
    """Train a policy with PPO on what workers send, and stop the workers at the end.

    Ctrl-C ends training, and stops the workers too. SIGTERM and SIGUSR1 say that it is to be moved: it saves its
    checkpoint and ends, and the workers go on, and wait until it is started again. Without --checkpoint what was
    learned is then not kept; with it --minutes is the time of all starts together.
    Exit code: 0 solved, 1 not solved in time, 130 after Ctrl-C, 75 if it was told to go and is to be started again.

    Example: rlbroker learner --url redis://host:6379/0 --run demo --env CartPole-v1
    """
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until training begins, there is nothing to keep
        signal.signal(number, signal.default_int_handler)
    from rlbroker.demo import describe_run, require_extras, training_run

    require_extras()
    run = training_run(run)
    if progress == "auto":
        print(f"learner of {describe_run(url, run)}", flush=True)
    from rlbroker.demo.dashboard import JsonLines, describe, open_view
    from rlbroker.demo.ppo_learner import LearnerSettings, learn

    settings = LearnerSettings(
        run=run,
        env_id=env,
        workers=workers,
        seed=seed,
        seconds=minutes * 60.0 if max_seconds is None else max_seconds,
        target=target,
        output=output,
        checkpoint=checkpoint,
        url=url,
        hidden=hidden,
    )
    summary = learn(settings, JsonLines() if progress == "json" else open_view(env), began)
    if progress == "json":
        print(summary.to_json(), flush=True)
    else:
        print(describe(summary))
        if summary.outcome == "moved" and checkpoint is None:
            print("no --checkpoint: what was learned is not kept")
        raise typer.Exit(summary.exit_code)
