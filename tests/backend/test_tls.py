"""TLS: all data of a run arrives bit-exact, and each kind of refusal says at once what to set.

A refusal that must come at once is tested with a timeout of an hour: a retry would exceed the test's own timeout.
"""

from __future__ import annotations

import re
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import redis
from certificates import Certificates, TlsProxy, server_context
from conftest import wait_until
from executable import rlbroker
from nodes import BUS
from redis_cluster import Cluster
from servers import FaultyServer, find_server_binary, free_port

from rlbroker import AccessDenied, ConnectionFailed, TlsFailed, WorkerClient, WorkerCommunicator
from rlbroker.backend import tls
from rlbroker.backend.channel import Channel
from rlbroker.backend.connection import Connection
from rlbroker.backend.deadline import ONE_TRY, Deadline
from rlbroker.config import TLS_VARIABLES
from rlbroker.local.embedded_server import RedisServer

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"

#: The embedded server behind a proxy; and the system's Redis with deploy/redis/tls.conf, if it is installed.
KINDS = ["proxy", *(["redis"] if find_server_binary("redis-7.0") else [])]

HOUR_SECONDS = 3600.0

CA, CERTIFICATE, KEY = TLS_VARIABLES


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TLS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


class TlsServer(FaultyServer):
    """The system's Redis with deploy/redis/tls.conf."""

    def __init__(self, folder: Path, certificate: tuple[str, str], certificates: Certificates) -> None:
        binary = find_server_binary("redis-7.0")
        assert binary is not None
        super().__init__(binary, folder)
        self._certificates = certificates
        self._config = (
            *("--include", str(DEPLOY / "tls.conf"), "--tls-port", str(self.port)),
            *("--tls-cert-file", certificate[0], "--tls-key-file", certificate[1]),
            *("--tls-ca-cert-file", certificates.ca()),
        )

    def client(self) -> Any:
        certificate, key = self._certificates.certificate("me", client=True)
        return redis.Redis(
            port=self.port,
            ssl=True,
            ssl_cert_reqs="none",  # in some tests the server's certificate is invalid
            ssl_certfile=certificate,
            ssl_keyfile=key,
            protocol=2,
        )


def start_proxy(server: RedisServer, context: ssl.SSLContext) -> tuple[TlsProxy, str]:
    """Start a TLS proxy for the embedded server; return it and its address with user and password."""
    parts = urlsplit(server.url)
    proxy = TlsProxy(parts.path, context)
    return proxy, f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}"


Serve = Callable[..., str]


@pytest.fixture(scope="module", params=KINDS)
def serve(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """A function that returns the address of a server whose certificate is for some names."""
    made: dict[Any, str] = {}
    with ExitStack() as stack:

        def address(*names: str, expired: bool = False) -> str:
            if (names, expired) not in made:
                certificate = certificates.certificate(*names, expired=expired)
                if request.param == "proxy":
                    context = server_context(certificate, certificates.ca())
                    proxy, made[names, expired] = start_proxy(request.getfixturevalue("embedded"), context)
                    stack.callback(proxy.close)
                else:
                    server = TlsServer(tmp_path_factory.mktemp("redis"), certificate, certificates)
                    start_server(stack, server)
                    made[names, expired] = f"127.0.0.1:{server.port}"
            return made[names, expired]

        yield address


def start_server(stack: ExitStack, server: FaultyServer | Cluster) -> None:
    """Start a server that runs until the stack is closed."""
    try:
        stack.enter_context(server)
    except AssertionError as error:
        if "Bad directive" not in str(error):
            raise
        pytest.skip("the system's server was built without TLS")


@pytest.fixture
def accepted_query(certificates: Certificates) -> str:
    """The URL parameters that the server accepts."""
    return query(certificates.ca(), certificates.certificate("me", client=True))


def query(ca: str, certificate: tuple[str, str] | None = None) -> str:
    found = f"ssl_ca_certs={ca}"
    return f"{found}&ssl_certfile={certificate[0]}&ssl_keyfile={certificate[1]}" if certificate else found


def refusal_message(url: str) -> str:
    """Return the message of the `TlsFailed` that must be raised at once, without the address."""
    with (
        pytest.raises(TlsFailed) as caught,
        closing(Connection(url, timeout_seconds=HOUR_SECONDS)) as connection,
    ):
        connection.execute("PING")
    message = str(caught.value)
    address = urlsplit(url).netloc.rpartition("@")[2]
    assert message.startswith((f"rediss://{address} ", f"redis://{address} "))
    assert "\n" not in message
    password = urlsplit(url).password
    assert not password or password not in message
    return message.partition(address)[2].strip()


@pytest.fixture
def variables(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's TLS files in the environment."""
    certificate, key = certificates.certificate("me", client=True)
    for name, path in ((CA, certificates.ca()), (CERTIFICATE, certificate), (KEY, key)):
        monkeypatch.setenv(name, path)


@pytest.mark.usefixtures("variables")
def test_a_run_over_tls_is_bit_exact(serve: Serve, run: str) -> None:
    assert_run_works(f"rediss://{serve()}", run)


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("named", ["as a Cluster", "by one node"])
def test_a_run_over_tls_on_a_cluster_is_bit_exact(tls_cluster: list[int], run: str, named: str) -> None:
    places = ",".join(f"127.0.0.1:{port}" for port in tls_cluster)
    assert_run_works(
        f"rediss+cluster://{places}" if named == "as a Cluster" else f"rediss://127.0.0.1:{tls_cluster[1]}",
        run,
    )


@pytest.fixture(scope="module")
def tls_cluster(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """The TLS ports of a Cluster of three masters that use TLS among themselves, and name each other's TLS ports."""
    binary = find_server_binary("redis-7.0")
    if binary is None:
        pytest.skip("there is no server with TLS here (apt install redis-server)")
    server_pair, client = certificates.certificate(), certificates.certificate("node", client=True)
    engine = Cluster(binary, tmp_path_factory.mktemp("tls-cluster"), 3, 0)
    ports = [free_port() for _ in engine.nodes]
    for node, port in zip(engine.nodes, ports, strict=True):
        node._config += (
            *("--tls-port", str(port), "--tls-cluster", "yes", "--cluster-port", str(node.port + BUS)),
            *(
                "--tls-cert-file",
                server_pair[0],
                "--tls-key-file",
                server_pair[1],
                "--tls-ca-cert-file",
                certificates.ca(),
            ),
            *("--tls-client-cert-file", client[0], "--tls-client-key-file", client[1]),
        )
    with ExitStack() as stack:
        start_server(stack, engine)
        yield ports


def assert_run_works(url: str, run: str) -> None:
    """Send weights, an update of them, batches and a command, and compare what arrives."""
    random = np.random.default_rng(0)
    weights: dict[str, Any] = {
        "w": random.standard_normal(3_000_001),
        "b": np.arange(7, dtype=np.int8),
    }  # of several chunks
    with (
        WorkerCommunicator(1, redis_url=url, run=run, timeout=20.0) as learner,
        WorkerClient(url, run, 0, host_cache=False, timeout=20.0) as worker,
    ):
        learner.send_model_weights(weights, compression_enabled=False)
        model: dict[str, Any] = {}
        worker.load_weights(model)
        assert all(np.array_equal(model[name], weights[name]) for name in weights)
        weights["w"][5] = 1.0
        learner.send_model_weights(weights)
        wait_until(
            "the worker applies the second version", lambda: worker.poll(model) and worker.version == 2
        )
        assert np.array_equal(model["w"], weights["w"])
        batches = [{"obs": random.integers(0, 255, size, dtype=np.uint8)} for size in (1, 16_384, 2_000_003)]
        for batch in batches:
            worker.send_experiences(batch)
        found: list[Any] = []

        def all_collected() -> bool:
            found.extend(learner.collect_experiences(timeout=1.0))
            return len(found) == len(batches)

        wait_until("the learner has all batches", all_collected)
        assert all(
            np.array_equal(got["obs"], sent["obs"]) for (_, got), sent in zip(found, batches, strict=True)
        )
        command = learner.send_control_command("stop")
        wait_until("the worker obeys", lambda: (worker.poll(), not worker.running)[1])
        assert command.wait(timeout=10.0)[0].state == "done"


def test_a_channel_gives_the_encrypted_socket(serve: Serve, accepted_query: str) -> None:
    with closing(Connection(f"rediss://{serve()}?{accepted_query}")) as connection:
        channel = Channel(connection)
        channel.connect()
        assert isinstance(channel.raw_socket, ssl.SSLSocket)
        assert channel.raw_socket.version() == "TLSv1.3"
        channel.close()


def test_messages_that_arrive_together_are_all_received(serve: Serve, accepted_query: str, run: str) -> None:
    sent = [bytes([number]) * 20_000 for number in range(5)]
    with (
        closing(Connection(f"rediss://{serve()}?{accepted_query}")) as connection,
        connection.pubsub(run) as pubsub,
    ):
        pubsub.subscribe(run)
        wait_until("the subscription is active", lambda: connection.execute("PUBLISH", run, b"") == 1)
        connection.execute_all([("PUBLISH", run, message) for message in sent])
        received: list[bytes] = []

        def receive() -> bool:
            message = pubsub.get_message(timeout=0.1)
            if message and message["type"] == "message" and message["data"]:
                received.append(message["data"])
            return received == sent

        wait_until("all messages are received", receive)


def test_a_server_certificate_of_another_authority_is_refused(
    serve: Serve, certificates: Certificates
) -> None:
    other = certificates.ca("other")
    for url in (f"rediss://{serve()}?{query(other)}", f"rediss://{serve()}"):
        message = refusal_message(url)
        assert re.match("has a certificate that cannot be trusted: .*certificate", message)
        assert f"check the authority in {CA} (in a URL: ssl_ca_certs)" in message


def test_an_expired_server_certificate_is_refused(serve: Serve, accepted_query: str) -> None:
    message = refusal_message(f"rediss://{serve(expired=True)}?{accepted_query}")
    assert message.startswith("has a certificate that cannot be trusted: certificate has expired; check ")


def test_a_server_certificate_for_another_name_is_refused(serve: Serve, accepted_query: str) -> None:
    address = serve("elsewhere.example")
    named = address.replace("127.0.0.1", "localhost")
    for url, name in ((address, "127.0.0.1"), (named, "localhost")):
        assert f"certificate is not valid for '{name}'" in refusal_message(f"rediss://{url}?{accepted_query}")


def test_a_client_without_a_certificate_is_told_what_to_set(serve: Serve, certificates: Certificates) -> None:
    url = f"rediss://{serve()}?{query(certificates.ca())}"
    message = refusal_message(url)
    assert message.startswith("refuses this client by TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED; check the ")
    assert f"{CERTIFICATE} and its key in {KEY} (in a URL: ssl_certfile and ssl_keyfile)" in message
    for _ in range(20):  # with TLS 1.3 it varies whether the reason arrives or must be fetched
        with closing(Connection(url)) as connection, pytest.raises(TlsFailed, match="CERTIFICATE_REQUIRED"):
            connection.execute("PING", deadline=ONE_TRY)


def test_a_client_whose_certificate_is_refused_is_told_why(serve: Serve, certificates: Certificates) -> None:
    for pair, why in (
        (certificates.certificate("me", authority="other", client=True), "UNKNOWN_CA"),
        (certificates.certificate("me", expired=True, client=True), "CERTIFICATE_EXPIRED"),
    ):
        message = refusal_message(f"rediss://{serve()}?{query(certificates.ca(), pair)}")
        assert re.match(f"refuses this client by TLS: [A-Z0-9_]*{why};", message)


def test_a_url_without_tls_for_a_server_with_tls_is_refused(serve: Serve) -> None:
    assert refusal_message(f"redis://{serve()}") == "speaks TLS, and the URL says redis://: write rediss://"


def test_a_url_with_tls_for_a_server_without_tls_is_refused(certificates: Certificates) -> None:
    with RedisServer(bind="127.0.0.1") as server:
        assert server.network_url is not None
        url = server.network_url.replace("redis://", "rediss://").removesuffix("/0")
        assert refusal_message(f"{url}?{query(certificates.ca())}").startswith(
            "does not speak TLS, but the URL says rediss://: turn TLS on in the server"
        )


def test_old_tls_is_refused_and_tls_1_2_asks_for_a_client_certificate(
    embedded: RedisServer, certificates: Certificates
) -> None:
    certificate, ca = certificates.certificate(), certificates.ca()
    proxy, address = start_proxy(embedded, server_context(certificate, ca, newest=ssl.TLSVersion.TLSv1_2))
    with closing(proxy):
        url = f"rediss://{address}?{query(ca)}"
        assert "HANDSHAKE_FAILURE; check the certificate in" in refusal_message(url)
        proxy.context = old = server_context(certificate, ca)
        with pytest.warns(DeprecationWarning, match="TLSVersion"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        assert re.match("refuses this client by TLS: .*PROTOCOL", refusal_message(url))


def test_a_given_client_is_refused_with_the_reason(serve: Serve, certificates: Certificates) -> None:
    parts = urlsplit(f"rediss://{serve()}")
    client = redis.Redis(
        host="127.0.0.1",
        port=parts.port or 0,
        username=parts.username,
        password=parts.password,
        ssl=True,
        ssl_ca_certs=certificates.ca("other"),
    )
    with closing(client), pytest.raises(TlsFailed, match="certificate that cannot be trusted: self-signed"):
        Connection(client=client, timeout_seconds=HOUR_SECONDS).execute("PING")


def test_renewed_files_are_read_again_and_a_changing_server_is_an_outage(
    embedded: RedisServer, certificates: Certificates, tmp_path: Path
) -> None:
    client = certificates.certificate("me", client=True)
    original = server_context(certificates.certificate(), certificates.ca())
    other = server_context(certificates.certificate(authority="other"), certificates.ca())
    proxy, address = start_proxy(embedded, original)
    authority = tmp_path / "ca.crt"
    shutil.copy(certificates.ca(), authority)
    connection = Connection(f"rediss://{address}?{query(str(authority), client)}")
    with closing(proxy), closing(connection):
        assert connection.execute("PING")
        proxy.context = other
        connection.close()
        with pytest.raises(
            ConnectionFailed, match=r"can no longer be reached by TLS: .*certificate verify failed"
        ):
            connection.execute("PING", deadline=Deadline(0.1))
        authority.unlink()
        with pytest.raises(
            ConnectionFailed, match=r"cannot be reached: .* \(ssl_ca_certs\) cannot be used: No such file"
        ):
            connection.execute("PING", deadline=Deadline(0.1))
        shutil.copy(certificates.ca("other"), authority)
        assert connection.execute("PING")


def test_a_wrong_password_over_tls_is_named_as_the_cause(
    serve: Serve, accepted_query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(self: tls.TlsConnection) -> None:
        pytest.fail("the server has given the reason, so there must be no second connection")

    monkeypatch.setattr(tls.TlsConnection, "_look_for_alert", fetch)
    address = serve().rpartition("@")[2]
    with (
        closing(
            Connection(f"rediss://nobody:wrong@{address}?{accepted_query}", timeout_seconds=HOUR_SECONDS)
        ) as connection,
        pytest.raises(AccessDenied, match="check user and password"),
    ):
        connection.execute("PING")


def test_commands_fail_with_one_line_that_says_what_to_set(serve: Serve, certificates: Certificates) -> None:
    for command, code in (("status", 2), ("doctor", 3)):
        done = rlbroker(command, RLBROKER_REDIS_URL=f"rediss://{serve()}", **{CA: certificates.ca()})
        assert done.returncode == code
        assert not done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("rlbroker: rediss://127.0.0.1:")
        assert f"check the certificate in {CERTIFICATE} and its key in {KEY}" in line
