"""`rlbroker worker`: the demo's acting side, on any machine that reaches the server."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from rlbroker.ops.cli.options import Env, Hidden, Seed, Url


def worker(
    url: Url = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the training job, the same as the learner's; without it RLBROKER_RUN, demo."
        ),
    ] = None,
    env: Env = "CartPole-v1",
    worker_id: Annotated[
        int | None, typer.Option(min=0, help="This worker's number; the lowest free one if left out.")
    ] = None,
    envs: Annotated[int, typer.Option(min=1, help="Copies of the environment to step together.")] = 8,
    hidden: Hidden = 64,
    seed: Seed = None,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the learner to begin.")] = 60.0,
) -> None:
    """Act with the newest policy and send what happens, until the learner says stop.

    SIGTERM and SIGUSR1 drain: the worker finishes its batch, sends it, which may take 10 s at a full queue, and leaves
    the run, within 10 s more. A second one, and Ctrl-C, end it at once.
    Exit code: 0 stopped or drained, 130 after Ctrl-C, or if it was told to go before it had joined, 2 if something
    is wrong.

    Example: rlbroker worker --url redis://host:6379/0 --run demo --env CartPole-v1
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until it has joined, there is nothing to finish
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
        work(settings, lambda: state_of_learner(settings.url, settings.run))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def state_of_learner(url: str | None, run: str) -> str:
    """Give what the learner is about: `alive`, `ended`, `away`, `none` before the first, `unknown` if nobody says."""
    from rlbroker.backend.connection import Connection
    from rlbroker.backend.keys import Keys
    from rlbroker.backend.replies import server_seconds, text_fields
    from rlbroker.ops.inspect.liveness import learner_silent_seconds, learner_state

    connection = Connection(url, timeout_seconds=2.0)
    try:
        meta, clock = connection.ask([("HGETALL", Keys(run).meta), ("TIME",)])
        fields = text_fields(meta)
        return learner_state(fields, learner_silent_seconds(fields, server_seconds(clock)))
    except Exception:  # noqa: BLE001 - it is only for what is said; whatever is wrong, the worker meets it too
        return "unknown"
    finally:
        connection.close()
