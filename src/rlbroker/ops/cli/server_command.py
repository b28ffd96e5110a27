"""`rlbroker server`: runs an embedded server until the command ends."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from rlbroker.ops.cli.exit_codes import EXIT_INTERRUPTED

#: Interval between two checks that the server still runs.
CHECK_SECONDS = 0.2


def server(
    bind: Annotated[
        str | None,
        typer.Option(help="Address to listen on for other machines; by default only a Unix socket."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, help="TCP port for --bind; by default, or with 0, a free one.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the data, synced every second, and the URL; by default nothing is kept."
        ),
    ] = None,
    maxmemory_mb: Annotated[
        int | None, typer.Option("--maxmemory-mb", min=16, help="Memory limit in MB.")
    ] = None,
) -> None:
    """Run a Redis-compatible server with a password until Ctrl-C.

    It prints a shell command that sets RLBROKER_REDIS_URL to its URL with the password, for the learner and workers.
    Exit code: 130 after Ctrl-C or SIGTERM, 2 if the server cannot start or stops by itself.

    Example: rlbroker server --bind 0.0.0.0 --port 6379
    """
    # First of all: SIGTERM must stop the server properly even while it starts.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from rlbroker.errors import ConnectionFailed, InvalidArgument
    from rlbroker.local.embedded_server import RedisServer

    if port is not None and bind is None:
        raise InvalidArgument(
            "--port needs --bind ADDRESS, such as --bind 127.0.0.1: without it there is only a Unix socket"
        )
    limit = None if maxmemory_mb is None else maxmemory_mb << 20
    embedded = RedisServer(bind=bind, port=port, directory=directory, maxmemory_bytes=limit)
    try:
        with embedded:
            print(f"{embedded.version}, process {embedded.pid}; Ctrl-C ends it", file=sys.stderr)
            print(f"export RLBROKER_REDIS_URL='{embedded.network_url or embedded.url}'", flush=True)
            while embedded.running:
                time.sleep(CHECK_SECONDS)
            raise ConnectionFailed(f"the server ended by itself; its log ends with:\n{embedded.log_tail(5)}")
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
