"""Tests of deploy/redis/make-certificates: its certificates work, and wrong arguments are refused."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from certificates import TlsProxy, server_context

from rlbroker import TlsFailed
from rlbroker.backend.connection import Connection
from rlbroker.local.embedded_server import RedisServer

SCRIPT = Path(__file__).parents[2] / "deploy" / "redis" / "make-certificates"
LEAVES = ("server", "client")

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="the script needs openssl")


def make_certificates(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def refusal_of(*arguments: str, **environment: str) -> str:
    done = make_certificates(*arguments, **environment)
    assert done.returncode == 2
    assert not done.stdout
    return done.stderr


@needs_openssl
def test_its_certificates_let_clients_in_and_renewed_ones_work_beside_old_ones(
    embedded: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "certificates"
    done = make_certificates(str(folder), "redis.example.org", "10.0.0.5", "--days", "1")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    names = "DNS:localhost,IP:127.0.0.1,DNS:redis.example.org,IP:10.0.0.5"
    assert f"server: {folder}/server.crt and server.key, for {names}, valid for 1 days" in done.stdout
    assert {path.name for path in folder.iterdir()} == {
        *("ca.crt", "ca.key", "server.crt", "server.key", "client.crt", "client.key")
    }
    for key in folder.glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600

    parts = urlsplit(embedded.url)
    ca, (server, client) = (
        str(folder / "ca.crt"),
        ((str(folder / f"{leaf}.crt"), str(folder / f"{leaf}.key")) for leaf in LEAVES),
    )
    proxy = TlsProxy(parts.path, server_context(server, ca))
    address = f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}?ssl_ca_certs={ca}"
    connection = Connection(f"rediss://{address}&ssl_certfile={client[0]}&ssl_keyfile={client[1]}")
    with closing(proxy), closing(connection):
        assert connection.execute("PING")
        wrong = Connection(f"rediss://{address}&ssl_certfile={server[0]}&ssl_keyfile={server[1]}")
        with closing(wrong), pytest.raises(TlsFailed, match="UNSUPPORTED_CERTIFICATE"):
            wrong.execute("PING")  # a stolen server certificate does not let a client in

        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        renewed = make_certificates("--days=2", str(folder))
        assert f"authority: {folder}/ca.crt, reused" in renewed.stdout
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name for name in before if before[name] == after[name]} == {"ca.crt", "ca.key"}
        connection.close()
        assert connection.execute("PING")  # a new client certificate works with the old server certificate


@needs_openssl
def test_an_incomplete_authority_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("the only thing left")
    assert "has only one of ca.crt and ca.key" in refusal_of(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["ca.crt"]


def test_wrong_arguments_are_refused_with_a_reason(tmp_path: Path) -> None:
    assert "FOLDER is missing" in refusal_of()
    assert "unknown option --dayz" in refusal_of("--dayz", "3", str(tmp_path))
    assert "--days must be a number" in refusal_of(str(tmp_path), "--days", "soon")
    assert "--days must be a number" in refusal_of(str(tmp_path), "--days")
    assert "Example: make-certificates" in make_certificates("--help").stdout
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(bash)
    assert "openssl is missing; install it" in refusal_of(str(tmp_path / "new"), PATH=str(tmp_path / "bin"))
    assert not (tmp_path / "new").exists()


@needs_openssl
def test_an_invalid_host_name_is_refused(tmp_path: Path) -> None:
    assert "a b is neither a DNS name nor an IP address" in refusal_of(str(tmp_path), "a b")
