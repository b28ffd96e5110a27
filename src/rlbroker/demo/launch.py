"""The parent of `rlbroker demo`: starts server, learner and workers, and shows how they get on.

It imports neither torch nor Gymnasium, so that both cores are the children's.
"""

from __future__ import annotations

import os
import queue
import secrets
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from rich.console import Console

from rlbroker.backend.keys import Keys
from rlbroker.config import redacted_url
from rlbroker.demo import check_output
from rlbroker.demo.dashboard import View, describe, open_view
from rlbroker.demo.training_progress import Progress, Summary, parse_report
from rlbroker.errors import PeerError
from rlbroker.local.embedded_server import RedisServer
from rlbroker.local.supervisor import Supervisor

LEARNER = "learner"
#: How long each may take to end when its work is done.
STOP_SECONDS = 5.0
#: After Ctrl-C: for the learner to stop the workers and itself, and then for each to obey signals. Python takes
#: a second to leave torch behind.
INTERRUPT_SECONDS, SIGNAL_SECONDS = 2.5, 0.7
#: How much longer than its own limit the learner may take, to stop the workers and draw the picture.
GRACE_SECONDS = 20.0
_TAIL_LINES = 20


@dataclass(frozen=True)
class DemoSettings:
    """What `rlbroker demo` was asked to do."""

    workers: int = 2
    env_id: str = "CartPole-v1"
    seed: int | None = None
    seconds: float = 180.0
    output: Path | None = Path("demo.png")
    keep_server: bool = False
    url: str | None = None  #: of a server that runs already; None for an embedded one


def commands(settings: DemoSettings, run: str, seconds: float) -> dict[str, list[str]]:
    """Return what a person would type on each machine, by the process's name."""
    common = ["--run", run, "--env", settings.env_id]
    if settings.seed is not None:
        common += ["--seed", str(settings.seed)]
    learner = ["rlbroker", "learner", *common, "--workers", str(settings.workers)]
    learner += ["--max-seconds", f"{seconds:.1f}"]
    if settings.output is not None:
        learner += ["--output", str(settings.output)]
    workers = {
        f"worker-{number}": ["rlbroker", "worker", *common, "--worker-id", str(number)]
        for number in range(settings.workers)
    }
    return {LEARNER: learner, **workers}


def run_demo(settings: DemoSettings, console: Console | None = None) -> int:
    """Run the demo from start to end; return the exit code: 0 solved, 1 not solved in time, 130 Ctrl-C.

    Raises:
        PeerError: the learner ended without a result; the message has what it said last.
        ServerUnsuitable: there is no server program that runs here.
    """
    check_output(settings.output)
    console = console or Console()
    try:
        return _run(settings, console)
    except KeyboardInterrupt:
        _say(
            console,
            "Interrupted: everything is stopped. A picture is only drawn when training ends by itself.",
        )
        return 130


def _run(settings: DemoSettings, console: Console) -> int:
    deadline = time.monotonic() + settings.seconds
    with ExitStack() as stack:
        server: RedisServer | None = None
        url = settings.url
        if url is None:
            server = stack.enter_context(RedisServer())
            url = server.url
            _say(console, f"server: embedded {server.version}, as `rlbroker server` starts it")
            _say(console, f"$ export RLBROKER_REDIS_URL={shlex.quote(server.redacted_url)}")
        else:
            _say(console, f"server: {redacted_url(url)}")
        # The name is new, so that workers of an earlier demo on the same server have no part in this one.
        run = f"demo-{secrets.token_hex(3)}"
        todo = commands(settings, run, deadline - time.monotonic())
        for command in todo.values():
            _say(console, f"$ {shlex.join(command)}")
        processes = stack.enter_context(_Processes(todo, url))
        try:
            with open_view(settings.env_id, console) as view:
                summary = processes.watch(view, deadline + GRACE_SECONDS)
            _say(console, describe(summary))
            processes.wait()
        except KeyboardInterrupt:
            processes.interrupt()
            raise
        for line in processes.restarts():
            _say(console, line)
        if settings.output is not None and summary.outcome not in ("interrupted", "moved"):
            _say(console, f"  picture   {settings.output}")
        kept = settings.keep_server or server is None
        _say(console, how_to_look(url, run, kept=kept, ours=server is not None))
        if server is not None and settings.keep_server:
            _say(console, "The server stays until Ctrl-C.")
            with suppress(KeyboardInterrupt):
                signal.pause()
    return summary.exit_code


def _say(console: Console, text: str) -> None:
    """Write plain text: neither wrapped, so that commands can be copied, nor coloured."""
    console.file.write(text + "\n")
    console.file.flush()


class _Processes:
    """The learner and the workers; a context manager that leaves none of them."""

    def __init__(self, todo: Mapping[str, list[str]], url: str) -> None:
        """Prepare the processes; nothing starts yet."""
        self._lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._tails = {name: deque[str](maxlen=_TAIL_LINES) for name in todo}
        self._training = False

        def supervise(names: list[str], max_restarts: int) -> Supervisor:
            return Supervisor(
                {name: _executable(todo[name]) for name in names},
                # Not as an argument: everybody on the machine can read those, and there is a password in it.
                environment={"RLBROKER_REDIS_URL": url},
                on_output=lambda name, line: self._lines.put((name, line)),
                max_restarts=max_restarts,
                stop_timeout_seconds=STOP_SECONDS,
            )

        # A learner that failed would begin anew, so it is not restarted; a worker just joins again.
        self._learner = supervise([LEARNER], max_restarts=0)
        self._workers = supervise([name for name in todo if name != LEARNER], max_restarts=5)

    def __enter__(self) -> Self:
        """Start all of them."""
        self._learner.start()
        self._workers.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop those that still run."""
        self._learner.stop()
        self._workers.stop()

    def watch(self, view: View, deadline: float) -> Summary:
        """Show the learner's reports until its summary comes.

        Raises:
            PeerError: it ended without one, or did not give one by the deadline.
        """
        while time.monotonic() < deadline:
            ended = self._learner.wait(0)
            try:
                name, line = self._lines.get(timeout=0.2)
            except queue.Empty:
                if ended:
                    break
                continue
            match parse_report(line) if name == LEARNER else None:
                case Progress() as progress:
                    self._training = True
                    view.update(progress)
                case Summary() as summary:
                    return summary
                case None:
                    self._tails[name].append(line)
        names = [LEARNER] if self._tails[LEARNER] else list(self._tails)
        said = [f"{name}: {line}" for name in names for line in self._tails[name]]
        raise PeerError("\n".join(["the learner ended without a result; what was said last:", *said]))

    def wait(self) -> None:
        """Wait for the end of the learner, which has given its summary, and of the workers, which it stopped."""
        self._learner.wait(STOP_SECONDS)
        self._workers.wait(STOP_SECONDS)

    def interrupt(self) -> None:
        """Stop everything within a few seconds, politely where that is possible."""
        pid = self._learner.status()[LEARNER].pid
        if self._training and pid is not None:
            # It tells the workers to stop, on whatever machine; only what does not obey is signalled.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            self._learner.wait(INTERRUPT_SECONDS)
        self._learner.stop(SIGNAL_SECONDS)
        self._workers.stop(SIGNAL_SECONDS)

    def restarts(self) -> list[str]:
        """Return a line for each worker that had to be started again."""
        return [
            f"  {name} was started again {status.restarts} time{'s' * (status.restarts > 1)}"
            for name, status in self._workers.status().items()
            if status.restarts
        ]


def _executable(command: list[str]) -> list[str]:
    """Return a command that runs this very installation, whatever the PATH is."""
    program, *arguments = command
    assert program == "rlbroker"
    options = ["--progress", "json"] if arguments[0] == "learner" else []
    return [sys.executable, "-c", "from rlbroker.ops.cli import main; main()", *arguments, *options]


def how_to_look(url: str, run: str, *, kept: bool, ours: bool) -> str:
    """Return commands that show what is in Redis, or how to get a server that stays.

    Args:
        url: the server's.
        run: the demo's.
        kept: whether the server is still there.
        ours: whether we made the server up, and its password; that of another server is not for the screen.
    """
    if not kept:
        return "With --keep-server the server stays, to be looked at with redis-cli."
    parts = urlsplit(url)
    lines = ["Look into the server from another terminal:"]
    if ours:
        lines.append(f"  export RLBROKER_REDIS_URL={shlex.quote(url)}")
    else:
        lines.append("  export RLBROKER_REDIS_URL=…  # the URL of your server")
    lines.append(f"  rlbroker status --run {run}")
    if parts.password and not ours:
        lines.append("  export REDISCLI_AUTH=…  # its password")
    elif parts.password:
        lines.append(f"  export REDISCLI_AUTH={shlex.quote(unquote(parts.password))}")
    if parts.scheme == "unix":
        cli = f"redis-cli -s {shlex.quote(unquote(parts.path))}"
    else:
        host = parts.netloc.rpartition("@")[2]
        cli = f"redis-cli -u {shlex.quote(f'{parts.scheme}://{host}{parts.path}')}"
    if parts.username:
        cli += f" --user {shlex.quote(unquote(parts.username))}"
    keys = Keys(run)
    for words in (
        ("HGETALL", keys.weights),
        ("HGETALL", keys.counts(0)),
        ("HGETALL", keys.ledger(0)),
        ("XREVRANGE", keys.missed, "+", "-", "COUNT", "3"),
    ):
        lines.append(f"  {cli} {shlex.join(words)}")
    return "\n".join(lines)
