"""Attacks from the network, between clients and a server that uses TLS. The attacker may have a certificate.

It wants to read the traffic, to pose as the server, or to get access.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, suppress

import numpy as np
import pytest
import redis
from certificates import Certificates, TlsProxy, server_context
from conftest import wait_until
from redis.backoff import NoBackoff
from redis.retry import Retry

from rlbroker import TlsFailed, WorkerClient, WorkerCommunicator
from rlbroker.config import TLS_VARIABLES
from rlbroker.local.embedded_server import RedisServer

CA, CERTIFICATE, KEY = TLS_VARIABLES

#: A value that must not appear in the traffic.
SECRET = b"the opponent's next move"


class Wiretap:
    """A proxy that forwards all bytes in both directions and keeps a copy."""

    def __init__(self, port: int) -> None:
        self._target, self.seen = port, bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            back = threading.Thread(target=self._forward, args=(server, client), daemon=True)
            back.start()
            self._forward(client, server)
            back.join()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                target.sendall(data)
        for side in (source, target):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(embedded: RedisServer, certificates: Certificates) -> Iterator[TlsProxy]:
    with closing(
        TlsProxy(str(embedded.socket_path), server_context(certificates.certificate(), certificates.ca()))
    ) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def honest_clients(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure certificates for honest clients; the attacker passes its own."""
    monkeypatch.setenv(CA, certificates.ca())
    certificate, key = certificates.certificate(client=True)
    monkeypatch.setenv(CERTIFICATE, certificate)
    monkeypatch.setenv(KEY, key)


def url(embedded: RedisServer, port: int) -> str:
    user = embedded.url.partition("//")[2].partition("@")[0]
    return f"rediss://{user}@127.0.0.1:{port}/0"


def test_a_wiretap_sees_no_batches_weights_or_passwords(
    embedded: RedisServer, proxy: TlsProxy, run: str
) -> None:
    with closing(Wiretap(proxy.port)) as tap:
        tapped_url = url(embedded, tap.port)
        with (
            WorkerCommunicator(1, redis_url=tapped_url, run=run) as learner,
            WorkerClient(tapped_url, run, host_cache=False) as worker,
        ):
            learner.send_model_weights({"secret": np.frombuffer(SECRET, np.uint8)}, compression_enabled=False)
            worker.load_weights({})
            worker.send_experiences({"secret": SECRET})
            ((_, batch),) = wait_until(
                "the batch has arrived", lambda: learner.collect_experiences(timeout=1.0)
            )
            assert batch["secret"] == SECRET
        password = tapped_url.partition("//")[2].partition("@")[0].partition(":")[2]
        assert len(tap.seen) > 2000
        for word in (SECRET, password.encode(), run.encode(), b"XADD"):
            assert word not in tap.seen


def test_the_wiretap_sees_what_travels_without_tls(embedded: RedisServer, run: str) -> None:
    """This shows that the wiretap works."""
    with RedisServer(bind="127.0.0.1") as server:
        assert server.network_url
        port = int(server.network_url.rpartition(":")[2].partition("/")[0])
        with closing(Wiretap(port)) as tap:
            plain = server.network_url.replace(f":{port}/", f":{tap.port}/")
            client = redis.Redis.from_url(plain)
            client.set("x", SECRET)
            assert SECRET in tap.seen
            client.close()


@pytest.mark.parametrize(("authority", "names"), [("other", ()), ("ours", ("elsewhere.example",))])
def test_a_server_with_a_wrong_certificate_is_refused(
    embedded: RedisServer, certificates: Certificates, authority: str, names: tuple[str, ...]
) -> None:
    """A man in the middle has a certificate of another authority, or of the right one for another name."""
    own = certificates.certificate(*names, authority=authority)
    reason = "unable to get local issuer" if authority == "other" else "not valid for '127.0.0.1'"
    with (
        closing(TlsProxy(str(embedded.socket_path), server_context(own, certificates.ca()))) as middle,
        pytest.raises(TlsFailed, match=reason),
    ):
        WorkerClient(url(embedded, middle.port), "attacked", timeout=3600)


def test_a_client_without_a_certificate_gets_no_reply(proxy: TlsProxy, certificates: Certificates) -> None:
    context = ssl.create_default_context(cafile=certificates.ca())
    with (
        socket.create_connection(("127.0.0.1", proxy.port)) as plain,
        suppress(ssl.SSLError, ConnectionError),
        context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
    ):
        sock.sendall(b"PING\r\n")
        assert sock.recv(100) == b""


def test_a_client_certificate_does_not_replace_the_password(
    proxy: TlsProxy, certificates: Certificates
) -> None:
    certificate, key = certificates.certificate(client=True)
    client = redis.Redis(
        port=proxy.port,
        host="127.0.0.1",
        ssl=True,
        ssl_ca_certs=certificates.ca(),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        retry=Retry(NoBackoff(), 0),
    )
    with pytest.raises((redis.AuthenticationError, redis.exceptions.NoPermissionError)):
        client.keys("*")
    client.close()
