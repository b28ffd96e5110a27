"""`rlbroker server`: an embedded server that runs as long as the command."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

#: How often to check that the server still runs.
CHECK_SECONDS = 0.2


def server(
    bind: Annotated[
        str | None,
        typer.Option(help="Address to listen on for other machines; by default only a Unix socket."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, help="TCP port, needs --bind; 0, or by default, a free one.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Keep the data, synced every second, and the password here; by default nothing is kept."
        ),
    ] = None,
    maxmemory_mb: Annotated[
        int | None, typer.Option("--maxmemory-mb", min=16, help="Memory limit in MB.")
    ] = None,
) -> None:
    """Start a Redis-compatible server that requires a password, and stop it at Ctrl-C.

    The URL, with the password, is printed on stdout; pass it to the learner and the workers as RLBROKER_REDIS_URL.
    Exit code: 130 after Ctrl-C or SIGTERM, 2 if the server cannot start or stops by itself.

    Example: rlbroker server --bind 0.0.0.0 --port 6379
    """
    # Before anything else: SIGTERM during the start must stop the server in order, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from rlbroker.errors import ConnectionFailed, InvalidArgument
    from rlbroker.local.embedded_server import RedisServer

    if port is not None and bind is None:
        raise InvalidArgument(
            "--port needs --bind ADDRESS, such as --bind 127.0.0.1: without it there is only a Unix socket"
        )
    limit = None if maxmemory_mb is None else maxmemory_mb << 20
    embedded = RedisServer(
        bind=bind, port=port, directory=directory, maxmemory_bytes=limit, persistence=directory is not None
    )
    try:
        with embedded:
            print(f"{embedded.version}, process {embedded.pid}; Ctrl-C ends it", file=sys.stderr)
            print(f"export RLBROKER_REDIS_URL='{embedded.network_url or embedded.url}'", flush=True)
            while embedded.running:
                time.sleep(CHECK_SECONDS)
            raise ConnectionFailed(f"the server ended by itself; its log ends with:\n{embedded.log_tail(5)}")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
