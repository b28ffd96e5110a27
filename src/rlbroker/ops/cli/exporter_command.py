"""`rlbroker exporter`: serves metrics to Prometheus until the command ends."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from rlbroker.ops.exporter.prometheus_collector import MetricsCollector

logger = logging.getLogger("rlbroker")

#: How long an HTTP client may take to send its request or to read the response.
CLIENT_SECONDS = 10.0

#: The URL path of the metrics.
PATH = "/metrics"


@with_session(without=("run", "as_json", "no_color"))
def exporter(
    session: Session,
    bind: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 to let other machines connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 for a free one.")] = 9717,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the run; by default all runs on the server, new ones included."),
    ] = None,
) -> None:
    """Serve metrics of one run, or of all runs on a server, to Prometheus until Ctrl-C.

    The URL is printed on stdout. Each scrape reads Redis, within --timeout; if the server does not answer,
    `rlbroker_up` is 0. There is no password: every client that reaches the port can read the metrics.
    Exit code: 130 after Ctrl-C, 0 after SIGTERM, 2 if it cannot start.

    Example: rlbroker exporter --url redis://host:6379/0 --port 9717
    """
    # First of all: SIGTERM must end the command with exit code 0 even while it starts.
    stopped = SimpleQueue[None]()
    signal.signal(signal.SIGTERM, lambda *_: stopped.put(None))
    from rlbroker import __version__
    from rlbroker.backend.connection import Connection
    from rlbroker.config import check_run_name
    from rlbroker.errors import UsageError

    try:
        from rlbroker.ops.exporter.prometheus_collector import MetricsCollector
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "prometheus_client":
            raise
        raise UsageError(
            "the exporter needs prometheus-client: run `pip install 'rlbroker[metrics]'`"
        ) from error
    if run is not None:
        check_run_name(run)
    connection = Connection(session.url, timeout_seconds=session.timeout)
    try:
        collector = MetricsCollector(
            connection, version=__version__, run=run, timeout_seconds=session.timeout
        )
        with _open_server(bind, port, collector) as server:
            host, bound_port = server.server_address[:2]
            print(f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{bound_port}{PATH}", flush=True)
            runs = "all runs" if run is None else f"the run {run}"
            session.note(f"serving the metrics of {runs} on {connection.address}; Ctrl-C ends it")
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                stopped.get()
            finally:
                server.shutdown()
    finally:
        connection.close()


def _open_server(bind: str, port: int, collector: MetricsCollector) -> ThreadingHTTPServer:
    """Return a web server that listens on the address; raise `InvalidArgument` if it cannot."""
    import socket
    from http.server import ThreadingHTTPServer
    from socketserver import TCPServer

    from prometheus_client import CollectorRegistry, MetricsHandler

    from rlbroker.errors import DeadlineExceeded, InvalidArgument

    class Handler(MetricsHandler):
        timeout = CLIENT_SECONDS
        registry = CollectorRegistry()

        def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
            if self.path.partition("?")[0] != PATH:
                self.send_error(404, f"the metrics are at {PATH}")
                return
            try:
                super().do_GET()
            except DeadlineExceeded as error:  # nothing was sent yet
                self.send_error(503, str(error))

    class MetricsServer(ThreadingHTTPServer):
        daemon_threads = True

        def server_bind(self) -> None:
            """Bind without looking up this machine's name, which may be slow."""
            TCPServer.server_bind(self)
            self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Log an error in one line; ignore clients that went away."""
            error = sys.exception()
            if not isinstance(error, OSError):
                logger.error("the metrics could not be served: %s: %s", type(error).__name__, str(error))

    Handler.registry.register(collector)
    try:
        family, *_, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        MetricsServer.address_family = family
        return MetricsServer((str(address[0]), port), Handler)
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {bind} port {port}: {error.strerror or error}") from error
