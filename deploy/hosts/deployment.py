"""What an administrator sets up: certificates, users, the server, and on each host the files that belong there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.hosts.network import Host

REPOSITORY = Path(__file__).resolve().parents[2]
REDIS = REPOSITORY / "deploy" / "redis"
RUN = "pong"
PORT = 6379

#: Longest that one command may take.
COMMAND_SECONDS = 60.0


def rlbroker(*arguments: str) -> list[str]:
    """Give the command line of an rlbroker command: the executable of this environment."""
    return [sys.executable, "-m", "rlbroker", *arguments]


def user_of(worker: int) -> str:
    """Give the user of a worker, as `rlbroker acl` names it."""
    return f"{RUN}-worker-{worker}"


def rights_of(said: str) -> str:
    """Give the version whose rights a server knows, from its `--version`; Valkey's are those of Redis 7.2.

    >>> rights_of("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=b0a7514f8b35dc1f")
    '7.0'
    >>> rights_of("Valkey server v=9.1.2 sha=00000000:1 malloc=jemalloc-5.3.0 bits=64 build=bb2ee57236e6aa3a")
    '7.2'
    """
    found = re.search(r"v=(\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"the server does not say which version it is: {said.strip()}")
    return "7.2" if said.startswith("Valkey") else found[1]


class Deployment:
    """A server with deploy/redis and the users of one run, and what each host needs to reach it."""

    def __init__(self, folder: Path, server: Host, workers: int) -> None:
        """Make certificates and users.

        Args:
            folder: for everything; the files of each host get a folder of their own in it.
            server: the server's host.
            workers: how many there will be.

        Raises:
            RuntimeError: a command failed; its message is in it.
        """
        self._folder, self._server = folder, server
        self._certificates, self._secrets = folder / "certificates", folder / "secrets"
        name = "valkey-server" if shutil.which("valkey-server") else "redis-server"
        self.program, self._client = name, name.replace("server", "cli")
        _run([str(REDIS / "make-certificates"), str(self._certificates), server.address])
        users = rlbroker(
            *("acl", "--run", RUN, "--workers", str(workers), "--secrets", str(self._secrets)),
            *("--server-version", rights_of(_run([self.program, "--version"]))),
        )
        (folder / "users.acl").write_text(_run(users))

    def server_command(self, log: Path) -> list[str]:
        """Give the command that starts the server, with the files of deploy/redis as they are."""
        here = self._files_of(self._server, ["server.crt", "server.key", "ca.crt"])
        data = here / "data"
        data.mkdir()
        shutil.copy(self._folder / "users.acl", here)
        settings = {
            "include": REDIS / "tls.conf",
            "tls-cert-file": here / "server.crt",
            "tls-key-file": here / "server.key",
            "tls-ca-cert-file": here / "ca.crt",
            "aclfile": here / "users.acl",
            "bind": self._server.address,
            "dir": data,
            "logfile": log,
        }
        given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return [self.program, str(REDIS / "redis.conf"), *given]

    def environment(self, host: Host, user: str) -> dict[str, str]:
        """Give the variables that lead a user's processes on a host to the server."""
        here = self._files_of(host, ["client.crt", "client.key", "ca.crt"])
        password = here / f"{user}.password"
        shutil.copy(self.password_file(user), password)
        cache = here / "memory"  # namespaces share /dev/shm, hosts do not
        cache.mkdir(exist_ok=True)
        return clean_environment() | {
            "RLBROKER_REDIS_URL": f"rediss://{self._server.address}:{PORT}/0",
            "RLBROKER_REDIS_USERNAME": user,
            "RLBROKER_REDIS_PASSWORD_FILE": str(password),
            "RLBROKER_TLS_CA_FILE": str(here / "ca.crt"),
            "RLBROKER_TLS_CERTIFICATE_FILE": str(here / "client.crt"),
            "RLBROKER_TLS_KEY_FILE": str(here / "client.key"),
            "RLBROKER_HOST_CACHE": str(cache),
        }

    def password_file(self, user: str) -> Path:
        """Give the file that holds a user's password."""
        return self._secrets / user

    def redis_cli(self, host: Host, user: str, *command: str) -> str:
        """Run a command of Redis as a user on a host; give what the server said, errors too."""
        files = self.environment(host, user)
        asked = [
            *(self._client, "-h", self._server.address, "-p", str(PORT), "--tls", "--user", user),
            *("--cacert", files["RLBROKER_TLS_CA_FILE"]),
            *("--cert", files["RLBROKER_TLS_CERTIFICATE_FILE"]),
            *("--key", files["RLBROKER_TLS_KEY_FILE"]),
            *command,
        ]
        password = {"REDISCLI_AUTH": self.password_file(user).read_text().strip()}
        done = _completed(host.command(*asked), files | password)
        return (done.stdout + done.stderr).strip()

    def _files_of(self, host: Host, names: Sequence[str]) -> Path:
        here = self._folder / "hosts" / host.name
        here.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(self._certificates / name, here)
        return here


def ask(host: Host, environment: dict[str, str], *command: str) -> Any:
    """Run a command of rlbroker on a host and give the JSON that it prints.

    Raises:
        RuntimeError: it printed none; its message is in it.
    """
    done = _completed(host.command(*rlbroker(*command, "--run", RUN, "--json")), environment)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"rlbroker {' '.join(command)}: {(done.stdout + done.stderr).strip()}") from None


def refusal(host: Host, environment: dict[str, str], *command: str) -> str:
    """Run a command of rlbroker that should be refused; give its error, empty if it was not."""
    done = _completed(host.command(*rlbroker(*command)), environment)
    return done.stderr.strip() if done.returncode else ""


def clean_environment() -> dict[str, str]:
    """Give this process's environment without what would lead a client to another server."""
    return {
        name: value
        for name, value in os.environ.items()
        if "REDIS" not in name and not name.startswith("RLBROKER_")
    }


def _run(command: Sequence[str]) -> str:
    done = _completed(command, clean_environment())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _completed(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # In a session of its own: Ctrl-C shall not end it halfway.
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=COMMAND_SECONDS,
    )
