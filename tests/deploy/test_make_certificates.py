"""deploy/redis/make-certificates: what it makes lets a client in, and what it refuses."""

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

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="the script asks for openssl, too")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def refused(*arguments: str, **environment: str) -> str:
    done = make(*arguments, **environment)
    assert done.returncode == 2
    assert not done.stdout
    return done.stderr


@needs_openssl
def test_what_it_makes_lets_clients_in_and_goes_on_doing_so_when_it_is_made_anew(
    embedded: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "certificates"
    done = make(str(folder), "redis.example.org", "10.0.0.5", "--days", "1")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    names = "DNS:localhost,IP:127.0.0.1,DNS:redis.example.org,IP:10.0.0.5"
    assert f"server: {folder}/server.crt and server.key, for {names}, good for 1 days" in done.stdout
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
    place = f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}?ssl_ca_certs={ca}"
    connection = Connection(f"rediss://{place}&ssl_certfile={client[0]}&ssl_keyfile={client[1]}")
    with closing(proxy), closing(connection):
        assert connection.execute("PING")
        wrong = Connection(f"rediss://{place}&ssl_certfile={server[0]}&ssl_keyfile={server[1]}")
        with closing(wrong), pytest.raises(TlsFailed, match="is not one for clients"):
            wrong.execute("PING")  # a stolen certificate of the server is not one of a client

        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        again = make("--days=2", str(folder))
        assert f"authority: {folder}/ca.crt, which was there" in again.stdout
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name for name in before if before[name] == after[name]} == {"ca.crt", "ca.key"}
        connection.close()
        assert connection.execute("PING")  # new client certificate, old one of the server


@needs_openssl
def test_it_does_not_make_a_second_authority_beside_half_of_one(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("the only thing left")
    assert "has only one of ca.crt and ca.key" in refused(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["ca.crt"]


def test_it_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    assert "say where to put the files" in refused()
    assert "there is no option --dayz" in refused("--dayz", "3", str(tmp_path))
    assert "--days must be a number" in refused(str(tmp_path), "--days", "soon")
    assert "--days must be a number" in refused(str(tmp_path), "--days")
    assert "Example: make-certificates" in make("--help").stdout
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(bash)
    assert "openssl is missing; install it" in refused(str(tmp_path / "new"), PATH=str(tmp_path / "bin"))
    assert not (tmp_path / "new").exists()


@needs_openssl
def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "a b is neither a DNS name nor an IP address" in refused(str(tmp_path), "a b")
