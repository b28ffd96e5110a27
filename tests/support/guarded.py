"""A server with the configuration of deploy/redis, and with the users that `rlbroker acl` prints for it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any, Self

import redis
from executable import rlbroker
from servers import find_server_binary, free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "redis" / "redis.conf"

#: The Redis version that each kind of server is compatible with.
VERSIONS = {"embedded": "7.2", "redis-6.2": "6.2", "redis-7.0": "7.0"}

RUN = "pong"
WORKERS = 3


class GuardedServer:
    """A server on loopback whose clients need a user and a password."""

    def __init__(self, kind: str, folder: Path, *options: str) -> None:
        """Start the server.

        Args:
            kind: the kind of server, one of `servers.KINDS`.
            folder: the folder for its data and the passwords.
            options: further options of `rlbroker acl`.
        """
        self.kind, self.folder, self.port = kind, folder, free_port()
        self.has_read_only_keys = VERSIONS[kind] != "6.2"
        printed = rlbroker("acl", *self.acl_options, "--server-version", VERSIONS[kind], *options)
        assert printed.returncode == 0, printed.stderr
        self.notes = printed.stderr
        (folder / "users.acl").write_text(printed.stdout)
        binary = find_server_binary(kind)
        assert binary is not None
        self._log = (folder / "server.log").open("wb")
        self._process = subprocess.Popen(
            [
                binary,
                CONFIGURATION,
                "--port",
                str(self.port),
                "--dir",
                folder,
                "--aclfile",
                folder / "users.acl",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + 10.0
        while True:
            try:
                self.client("admin").ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise AssertionError((self.folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    @property
    def acl_options(self) -> tuple[str, ...]:
        return "--run", RUN, "--workers", str(WORKERS), "--secrets", str(self.folder / "secrets")

    def password(self, user: str) -> str:
        return (self.folder / "secrets" / user).read_text().strip()

    def url(self, user: str) -> str:
        return f"redis://{user}:{self.password(user)}@127.0.0.1:{self.port}/0"

    def client(self, user: str) -> Any:
        return redis.Redis.from_url(self.url(user), protocol=2, socket_timeout=5.0)

    def everything(self) -> dict[bytes, Any]:
        """Return the content of each key."""
        client = self.client("admin")
        return {key: client.dump(key) for key in client.keys("*")}
