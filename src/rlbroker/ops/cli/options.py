"""Options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from typing import Annotated

import typer

Url = Annotated[
    str | None,
    typer.Option(
        help="Server: redis://, rediss:// (TLS) or unix://; several: redis+sentinel://, redis+cluster://. Without it "
        "RLBROKER_REDIS_URL, REDIS_URL, localhost."
    ),
]
Env = Annotated[str, typer.Option(help="Gymnasium environment; learner and workers must have the same.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Random seed of the run; random if left out.")]
Minutes = Annotated[float, typer.Option(min=0.0, help="Longest time for everything.")]
MaxSeconds = Annotated[float | None, typer.Option(min=0.0, help="The same in seconds, instead of --minutes.")]
Hidden = Annotated[
    int, typer.Option(min=1, help="Units in each of the network's layers; learner and workers must agree.")
]
