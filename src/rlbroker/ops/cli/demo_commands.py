"""`rlbroker demo`, `learner` and `worker`: the demo on one machine, or its parts on several machines."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlbroker.ops.cli.exit_codes import EXIT_INTERRUPTED
from rlbroker.ops.cli.shared_options import Url

Env = Annotated[str, typer.Option(help="Gymnasium environment; the same for the learner and its workers.")]
Hidden = Annotated[
    int,
    typer.Option(min=1, help="Units in each layer of the network; the same for the learner and its workers."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Random seed of the run; by default random.")]
Minutes = Annotated[float, typer.Option(min=0.0, help="Time limit for the whole command.")]


def demo(
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = 2,
    env: Env = "CartPole-v1",
    seed: Seed = None,
    minutes: Minutes = 3.0,
    output: Annotated[Path, typer.Option(help="Picture of the training run.")] = Path("demo.png"),
    keep_server: Annotated[
        bool, typer.Option("--keep-server", help="Keep the server running after training, until Ctrl-C.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            envvar=["RLBROKER_REDIS_URL", "REDIS_URL"],
            help="Server to use; by default an embedded server is started.",
        ),
    ] = None,
) -> None:
    """Train a policy with PPO: starts a server, a learner and workers, each in its own process.

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
        seconds=minutes * 60.0,
        output=output,
        keep_server=keep_server,
        url=url,
    )
    raise typer.Exit(run_demo(settings))


def learner(
    url: Url = None,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the run, the same as the workers'; by default RLBROKER_RUN, then demo."),
    ] = None,
    env: Env = "CartPole-v1",
    workers: Annotated[int, typer.Option(min=1, help="Number of expected workers.")] = 2,
    hidden: Hidden = 64,
    seed: Seed = None,
    minutes: Minutes = 3.0,
    target: Annotated[
        float | None,
        typer.Option(
            help="Mean return over 100 episodes that counts as solved; by default the environment's own."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for a picture of the training run.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to save the training state to, and to resume from.")
    ] = None,
    progress: Annotated[
        Literal["auto", "json"],
        typer.Option(
            help="auto: a dashboard on a terminal, lines elsewhere. json: JSON lines, and always exit code 0."
        ),
    ] = "auto",
) -> None:
    """Train a policy with PPO on the batches that workers send, and stop the workers at the end.

    Ctrl-C ends training and stops the workers. After SIGTERM or SIGUSR1 the learner saves its checkpoint and ends, and
    the workers wait until it is started again. Without --checkpoint the training state is lost then. With it,
    --minutes limits the total time of all starts.
    Exit code: 0 solved, 1 not solved in time, 130 after Ctrl-C, 75 after a signal: start it again.

    Example: rlbroker learner --url redis://host:6379/0 --run demo --env CartPole-v1
    """
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # before training begins there is no state to save
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
        seconds=minutes * 60.0,
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
            print("no --checkpoint: the training state was not saved")
        raise typer.Exit(summary.exit_code)


def worker(
    url: Url = None,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the run, the same as the learner's; by default RLBROKER_RUN, then demo."),
    ] = None,
    env: Env = "CartPole-v1",
    worker_id: Annotated[
        int | None, typer.Option(min=0, help="Id of this worker; by default the lowest free id.")
    ] = None,
    envs: Annotated[int, typer.Option(min=1, help="Copies of the environment to step together.")] = 8,
    hidden: Hidden = 64,
    seed: Seed = None,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the learner to begin.")] = 60.0,
) -> None:
    """Act with the newest policy and send experiences, until the learner sends stop.

    SIGTERM and SIGUSR1 drain: the worker finishes and sends its batch (up to 10 s if its queue is full), then leaves
    the run (up to 10 s more). A second signal, or Ctrl-C, ends it at once.
    Exit code: 0 stopped or drained, 130 after Ctrl-C or a signal before it joined the run, 2 after an error.

    Example: rlbroker worker --url redis://host:6379/0 --run demo --env CartPole-v1
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):  # before the worker joins there is nothing to drain
        signal.signal(number, signal.default_int_handler)
    from rlbroker.demo import require_extras, training_run

    require_extras()
    from rlbroker.demo.rollout_worker import WorkerSettings, work

    settings = WorkerSettings(
        run=training_run(run),
        env_id=env,
        worker_id=worker_id,
        num_envs=envs,
        seed=seed,
        timeout_seconds=timeout,
        url=url,
        hidden=hidden,
    )
    try:
        work(settings, lambda: read_learner_state(settings.url, settings.run))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def read_learner_state(url: str | None, run: str) -> str:
    """Return the learner's state: `alive`, `ended`, `away`, `none` if there was none yet, `unknown` after an error."""
    from rlbroker.backend.connection import Connection
    from rlbroker.backend.keys import Keys
    from rlbroker.backend.replies import server_seconds, text_fields
    from rlbroker.ops.inspect.liveness import parse_learner

    connection = Connection(url, timeout_seconds=2.0)
    try:
        meta, clock = connection.execute_all([("HGETALL", Keys(run).meta), ("TIME",)], strict=False)
        return parse_learner(text_fields(meta), server_seconds(clock)).state
    except Exception:  # noqa: BLE001 - the state is only printed; the worker raises the same error itself
        return "unknown"
    finally:
        connection.close()
