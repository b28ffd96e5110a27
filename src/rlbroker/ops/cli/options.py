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
