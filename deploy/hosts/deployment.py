"""The setup that an administrator does: certificates, users, the server, and the files of each host."""

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

#: Timeout of one command.
COMMAND_SECONDS = 60.0


def rlbroker(*arguments: str) -> list[str]:
    """Return the command line of an rlbroker command in this environment."""
    return [sys.executable, "-m", "rlbroker", *arguments]


def user_of(worker: int) -> str:
    """Return the name that `rlbroker acl` gives to a worker's user."""
    return f"{RUN}-worker-{worker}"


def acl_version(output: str) -> str:
    """Return the Redis version whose ACL rules a server supports, from the output of its `--version`.

    Valkey supports those of Redis 7.2.

    >>> acl_version("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=b0a7514f8b35dc1f")
    '7.0'
    >>> acl_version("Valkey server v=9.1.2 sha=00000000:1 malloc=jemalloc-5.3.0 bits=64 build=bb2ee57236e6aa3a")
    '7.2'
    """
    found = re.search(r"v=(\d+\.\d+)", output)
    if found is None:
        raise RuntimeError(f"the server does not print its version: {output.strip()}")
    return "7.2" if output.startswith("Valkey") else found[1]


class Deployment:
    """A server configured with deploy/redis, the users of one run, and the files that each host needs."""

    def __init__(self, folder: Path, server: Host, workers: int) -> None:
        """Create certificates and users.

        Args:
            folder: the folder for all files; each host gets a subfolder.
            server: the server's host.
            workers: the number of workers.

        Raises:
            RuntimeError: a command failed; the message has its output.
        """
        self._folder, self._server = folder, server
        self._certificates, self._secrets = folder / "certificates", folder / "secrets"
        name = "valkey-server" if shutil.which("valkey-server") else "redis-server"
        self.program, self._client = name, name.replace("server", "cli")
        _run([str(REDIS / "make-certificates"), str(self._certificates), server.address])
        users = rlbroker(
            *("acl", "--run", RUN, "--workers", str(workers), "--secrets", str(self._secrets)),
            *("--server-version", acl_version(_run([self.program, "--version"]))),
        )
        (folder / "users.acl").write_text(_run(users))

    def server_command(self, log: Path) -> list[str]:
        """Return the command that starts the server with the unchanged files of deploy/redis."""
        folder = self._copy_files_to(self._server, ["server.crt", "server.key", "ca.crt"])
        data = folder / "data"
        data.mkdir()
        shutil.copy(self._folder / "users.acl", folder)
        settings = {
            "include": REDIS / "tls.conf",
            "tls-cert-file": folder / "server.crt",
            "tls-key-file": folder / "server.key",
            "tls-ca-cert-file": folder / "ca.crt",
            "aclfile": folder / "users.acl",
            "bind": self._server.address,
            "dir": data,
            "logfile": log,
        }
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return [self.program, str(REDIS / "redis.conf"), *options]

    def environment(self, host: Host, user: str) -> dict[str, str]:
        """Return the environment of a user's processes on a host, with the server's URL and the credentials."""
        folder = self._copy_files_to(host, ["client.crt", "client.key", "ca.crt"])
        password = folder / f"{user}.password"
        shutil.copy(self.password_file(user), password)
        cache = folder / "memory"  # the namespaces share /dev/shm, but real hosts do not
        cache.mkdir(exist_ok=True)
        return clean_environment() | {
            "RLBROKER_REDIS_URL": f"rediss://{self._server.address}:{PORT}/0",
            "RLBROKER_REDIS_USERNAME": user,
            "RLBROKER_REDIS_PASSWORD_FILE": str(password),
            "RLBROKER_TLS_CA_FILE": str(folder / "ca.crt"),
            "RLBROKER_TLS_CERTIFICATE_FILE": str(folder / "client.crt"),
            "RLBROKER_TLS_KEY_FILE": str(folder / "client.key"),
            "RLBROKER_HOST_CACHE": str(cache),
        }

    def password_file(self, user: str) -> Path:
        """Return the path of the file with a user's password."""
        return self._secrets / user

    def redis_cli(self, host: Host, user: str, *command: str) -> str:
        """Run a Redis command as a user on a host; return the server's reply, or its error."""
        files = self.environment(host, user)
        command_line = [
            *(self._client, "-h", self._server.address, "-p", str(PORT), "--tls", "--user", user),
            *("--cacert", files["RLBROKER_TLS_CA_FILE"]),
            *("--cert", files["RLBROKER_TLS_CERTIFICATE_FILE"]),
            *("--key", files["RLBROKER_TLS_KEY_FILE"]),
            *command,
        ]
        password = {"REDISCLI_AUTH": self.password_file(user).read_text().strip()}
        done = _execute(host.command(*command_line), files | password)
        return (done.stdout + done.stderr).strip()

    def _copy_files_to(self, host: Host, names: Sequence[str]) -> Path:
        folder = self._folder / "hosts" / host.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(self._certificates / name, folder)
        return folder


def query_rlbroker(host: Host, environment: dict[str, str], *command: str) -> Any:
    """Run an rlbroker command on a host; return the JSON that it prints.

    Raises:
        RuntimeError: the command printed no JSON; the message has its output.
    """
    done = _execute(host.command(*rlbroker(*command, "--run", RUN, "--json")), environment)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"rlbroker {' '.join(command)}: {(done.stdout + done.stderr).strip()}") from None


def refusal_of(host: Host, environment: dict[str, str], *command: str) -> str:
    """Run an rlbroker command that should fail; return its error, or an empty string if it succeeded."""
    done = _execute(host.command(*rlbroker(*command)), environment)
    return done.stderr.strip() if done.returncode else ""


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that configure a Redis client."""
    return {
        name: value
        for name, value in os.environ.items()
        if "REDIS" not in name and not name.startswith("RLBROKER_")
    }


def _run(command: Sequence[str]) -> str:
    done = _execute(command, clean_environment())
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _execute(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # In its own session: Ctrl-C must not interrupt the command halfway.
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
