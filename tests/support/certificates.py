"""Certificates of two unrelated authorities, and a TLS proxy."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

DAY = timedelta(days=1)


class Certificates:
    """Certificate files of two authorities, `ours` and `other`, each created at its first use."""

    def __init__(self, folder: Path) -> None:
        import trustme  # slow to import, and most tests need no certificates

        self.folder = folder
        self._authorities = {"ours": trustme.CA(), "other": trustme.CA()}

    def ca(self, authority: str = "ours") -> str:
        path = self.folder / f"{authority}.crt"
        if not path.exists():
            self._authorities[authority].cert_pem.write_to_path(str(path))
        return str(path)

    def certificate(
        self, *names: str, authority: str = "ours", expired: bool = False, client: bool = False
    ) -> tuple[str, str]:
        """Return the files of a certificate and its key; a client gets its own, also for the same names."""
        kind = "client" if client else "server"
        stem = self.folder / "-".join((kind, authority, *names, *(["expired"] if expired else [])))
        paths = f"{stem}.crt", f"{stem}.key"
        if not stem.with_suffix(".crt").exists():
            now = datetime.now(UTC)
            made = self._authorities[authority].issue_cert(
                *(names or ("localhost", "127.0.0.1")),
                not_before=now - 3 * DAY,
                not_after=now + (-DAY if expired else DAY),
            )
            made.cert_chain_pems[0].write_to_path(paths[0])
            made.private_key_pem.write_to_path(paths[1])
        return paths


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class TlsProxy:
    """A TLS proxy in front of a server without TLS."""

    def __init__(self, target: str, context: ssl.SSLContext) -> None:
        """Start to listen.

        Args:
            target: the server's Unix socket.
            context: the TLS settings of new connections; may be replaced at any time.
        """
        self._target, self.context = target, context
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True, name="tls-proxy").start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True, name="tls-proxy").start()

    def _serve(self, client: socket.socket) -> None:
        try:
            secure = self.context.wrap_socket(client, server_side=True)
        except OSError:  # the TLS alert has told the client the reason
            client.close()
            return
        with secure, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._target)
            replies = threading.Thread(target=_forward, args=(server, secure), daemon=True, name="tls-proxy")
            replies.start()
            _forward(secure, server)
            replies.join()


def server_context(
    certificate: tuple[str, str], ca: str, *, newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
) -> ssl.SSLContext:
    """Return a context with the settings of deploy/redis/tls.conf: clients need a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(*certificate)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _forward(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 18):
            target.sendall(data)
    except OSError:
        pass
    for side in (source, target):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
