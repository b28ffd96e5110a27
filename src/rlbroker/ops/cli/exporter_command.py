"""`rlbroker exporter`: figures for Prometheus, for as long as the command runs."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.ops.cli.session import Session, with_session

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from rlbroker.ops.exporter.collector import MetricsCollector

logger = logging.getLogger("rlbroker")

#: Longest that a client may take to say what it wants, or to take what it asked for.
CLIENT_SECONDS = 10.0

#: Where the figures are.
PATH = "/metrics"


@with_session(without=("run", "as_json", "no_color"))
def exporter(
    session: Session,
    bind: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0: a free one.")] = 9717,
    run: Annotated[
        str | None, typer.Option(help="Which run; without it all on the server, new ones too.")
    ] = None,
) -> None:
    """Serve the figures of one run, or of all runs on a server, to Prometheus, and stop at Ctrl-C.

    The URL is printed on stdout. Everything is read from Redis when Prometheus asks, within --timeout; a server that
    is away is said to be away (`rlbroker_up 0`). Whoever reaches the port can read the figures: there is no password.
    Exit code: 130 after Ctrl-C, 0 after SIGTERM, 2 if it cannot start.

    Example: rlbroker exporter --url redis://host:6379/0 --port 9717
    """
    # First of all, so that it is no failure whenever a service manager ends it.
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    from rlbroker import __version__
    from rlbroker.backend.connection import Connection
    from rlbroker.config import run_name
    from rlbroker.errors import UsageError

    try:
        from rlbroker.ops.exporter.collector import MetricsCollector
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "prometheus_client":
            raise
        raise UsageError(
            "the exporter needs prometheus-client: run `pip install 'rlbroker[metrics]'`"
        ) from error
    if run is not None:
        run_name(run)
    connection = Connection(session.url, timeout_seconds=session.timeout)
    try:
        exposition = MetricsCollector(
            connection, version=__version__, run=run, timeout_seconds=session.timeout
        )
        with _server(bind, port, exposition) as server:
            host, bound = server.server_address[:2]
            print(f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{bound}{PATH}", flush=True)
            what = "all runs" if run is None else f"the run {run}"
            session.say(f"serving the figures of {what} on {connection.address}; Ctrl-C ends it")
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                over.wait()
            finally:
                server.shutdown()
    finally:
        connection.close()


def _server(bind: str, port: int, exposition: MetricsCollector) -> ThreadingHTTPServer:
    """Give a web server that listens.

    Raises:
        InvalidArgument: it cannot listen there.
    """
    import socket
    from http.server import ThreadingHTTPServer
    from socketserver import TCPServer

    from prometheus_client import CollectorRegistry, MetricsHandler

    from rlbroker.errors import DeadlineExceeded, InvalidArgument

    class Handler(MetricsHandler):
        timeout = CLIENT_SECONDS
        registry = CollectorRegistry()

        def do_GET(self) -> None:  # noqa: N802 - so it is called by the server
            if self.path.partition("?")[0] != PATH:
                self.send_error(404, f"the figures are at {PATH}")
                return
            try:
                super().do_GET()
            except DeadlineExceeded as error:  # nothing was sent yet
                self.send_error(503, str(error))

    class MetricsServer(ThreadingHTTPServer):
        daemon_threads = True

        def server_bind(self) -> None:
            """Do not ask a name server for the name of this machine, which may take long."""
            TCPServer.server_bind(self)
            self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say in one line what went wrong; a client that went away is nothing to speak of."""
            error = sys.exception()
            if not isinstance(error, OSError):
                logger.error("the figures could not be given: %s: %s", type(error).__name__, error)

    Handler.registry.register(exposition)
    try:
        family, *_, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        MetricsServer.address_family = family
        return MetricsServer((str(address[0]), port), Handler)
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {bind} port {port}: {error.strerror or error}") from error
