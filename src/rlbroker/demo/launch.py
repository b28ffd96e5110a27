"""The parent process of `rlbroker demo`: it starts server, learner and workers, and shows the progress.

It does not import torch or Gymnasium, to leave the processor to its child processes.
"""

from __future__ import annotations

import os
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
from rlbroker.backend.text import counted
from rlbroker.backend.url import redis_url
from rlbroker.config import redacted_url
from rlbroker.demo import check_output
from rlbroker.demo.dashboard import View, describe, open_view
from rlbroker.demo.processes import DemoProcess, wait_for
from rlbroker.demo.training_progress import Progress, Summary, parse_report
from rlbroker.errors import PeerError
from rlbroker.local.child_process import GUARD_MARGIN_SECONDS
from rlbroker.local.embedded_server import RedisServer

LEARNER = "learner"
#: How long each process may take to end when its work is done.
STOP_SECONDS = 5.0
#: After Ctrl-C: how long the learner may take to stop the workers and itself, before they are stopped by signals.
INTERRUPT_SECONDS = 2.5
#: How much longer than its time limit the learner may run, to stop the workers and draw the picture.
GRACE_SECONDS = 20.0
_LAST_LINES = 20
#: How often to look for output of the processes.
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class DemoSettings:
    """The options of `rlbroker demo`."""

    workers: int = 2
    env_id: str = "CartPole-v1"
    seed: int | None = None
    seconds: float = 180.0
    output: Path | None = Path("demo.png")
    keep_server: bool = False
    url: str | None = None  #: of a running server; None to start an embedded one


def build_commands(settings: DemoSettings, run: str, seconds: float) -> dict[str, list[str]]:
    """Return the commands to type on separate machines, by process name."""
    common = ["--run", run, "--env", settings.env_id]
    if settings.seed is not None:
        common += ["--seed", str(settings.seed)]
    learner = ["rlbroker", "learner", *common, "--workers", str(settings.workers)]
    learner += ["--minutes", f"{seconds / 60:.4g}"]
    if settings.output is not None:
        learner += ["--output", str(settings.output)]
    workers = {
        f"worker-{number}": ["rlbroker", "worker", *common, "--worker-id", str(number)]
        for number in range(settings.workers)
    }
    return {LEARNER: learner, **workers}


def run_demo(settings: DemoSettings) -> int:
    """Run the demo; return the exit code: 0 solved, 1 not solved in time, 130 after Ctrl-C.

    Raises:
        PeerError: the learner ended without a summary; the message has its last output.
        ServerUnsuitable: no server program works on this machine.
    """
    check_output(settings.output)
    console = Console()
    try:
        return _run(settings, console)
    except KeyboardInterrupt:
        _print(
            console,
            "Interrupted: all processes are stopped. The picture is only drawn when training is not interrupted.",
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
            _print(console, f"server: embedded {server.version}, as `rlbroker server` starts it")
            _print(console, f"$ export RLBROKER_REDIS_URL={shlex.quote(server.redacted_url)}")
        else:
            _print(console, f"server: {redacted_url(redis_url(url))}")
        # A new name, so that workers of an earlier demo on the same server do not join this run.
        run = f"demo-{secrets.token_hex(3)}"
        commands = build_commands(settings, run, deadline - time.monotonic())
        for command in commands.values():
            _print(console, f"$ {shlex.join(command)}")
        processes = stack.enter_context(_Processes(commands, url))
        try:
            with open_view(settings.env_id, console) as view:
                summary = processes.watch(view, deadline + GRACE_SECONDS)
            _print(console, describe(summary))
            processes.wait()
        except KeyboardInterrupt:
            processes.interrupt()
            raise
        for line in processes.describe_restarts():
            _print(console, line)
        if settings.output is not None and summary.outcome not in ("interrupted", "moved"):
            _print(console, f"  picture   {settings.output}")
        kept = settings.keep_server or server is None
        _print(console, describe_inspection(url, run, kept=kept, embedded=server is not None))
        if server is not None and settings.keep_server:
            _print(console, "The server keeps running until Ctrl-C.")
            with suppress(KeyboardInterrupt):
                signal.pause()
    return summary.exit_code


def _print(console: Console, text: str) -> None:
    """Write plain text, not wrapped (so that commands can be copied) and not coloured."""
    console.file.write(text + "\n")
    console.file.flush()


class _Processes:
    """The learner and the workers. As a context manager it stops all of them at the end."""

    def __init__(self, commands: Mapping[str, list[str]], url: str) -> None:
        """Prepare the processes. `watch` starts them."""
        # A restarted learner would train from scratch, so it is not restarted. A restarted worker just rejoins.
        self._processes = {
            name: DemoProcess(name, _own_command(command), url, max_restarts=0 if name == LEARNER else 5)
            for name, command in commands.items()
        }
        self._learner = self._processes[LEARNER]
        self._training = False

    def __enter__(self) -> Self:
        """Return the processes."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the processes that still run."""
        self._stop()

    def watch(self, view: View, deadline: float) -> Summary:
        """Show the learner's progress reports until it reports its summary.

        Raises:
            PeerError: the learner ended without a summary, or did not report one by the deadline.
        """
        last_lines = {name: deque[str](maxlen=_LAST_LINES) for name in self._processes}
        while time.monotonic() < deadline and not self._learner.ended:
            for name, process in self._processes.items():
                for line in process.poll():
                    match parse_report(line) if name == LEARNER else None:
                        case Progress() as progress:
                            self._training = True
                            view.update(progress)
                        case Summary() as summary:
                            return summary
                        case None:
                            last_lines[name].append(line)
            time.sleep(_POLL_SECONDS)
        names = [LEARNER] if last_lines[LEARNER] else list(last_lines)
        last_output = [f"{name}: {line}" for name in names for line in last_lines[name]]
        raise PeerError("\n".join(["the learner ended without a result; the last output was:", *last_output]))

    def wait(self) -> None:
        """Wait until the learner and the workers have ended. Call this after `watch`."""
        wait_for(list(self._processes.values()), STOP_SECONDS)

    def interrupt(self) -> None:
        """Stop all processes within a few seconds, through the learner if possible."""
        pid = self._learner.pid
        if self._training and pid is not None:
            # The learner sends "stop" to all workers. Only processes that do not end then get signals.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            wait_for([self._learner], INTERRUPT_SECONDS)
        self._stop()

    def _stop(self) -> None:
        processes = list(self._processes.values())
        for process in processes:
            process.request_stop()
        if not wait_for(processes, STOP_SECONDS + GUARD_MARGIN_SECONDS):
            for process in processes:
                process.kill()

    def describe_restarts(self) -> list[str]:
        """Return a line of text for each worker that was restarted."""
        return [
            f"  {process.name} was restarted {counted(process.restarts, 'time')}"
            for process in self._processes.values()
            if process.restarts
        ]


def _own_command(command: list[str]) -> list[str]:
    """Return the command for this installation of rlbroker, independent of the PATH."""
    program, *arguments = command
    assert program == "rlbroker"
    options = ["--progress", "json"] if arguments[0] == "learner" else []
    return [sys.executable, "-c", "from rlbroker.ops.cli import main; main()", *arguments, *options]


def describe_inspection(url: str, run: str, *, kept: bool, embedded: bool) -> str:
    """Return text with commands that show what is in Redis, or a hint at --keep-server.

    Args:
        url: the server's URL.
        run: the demo's run.
        kept: whether the server still runs.
        embedded: whether it is the demo's own server. The password of another server is not shown.
    """
    if not kept:
        return "With --keep-server the server keeps running, and redis-cli can show what is in it."
    parts = urlsplit(url)
    lines = ["Inspect the server from another terminal:"]
    if embedded:
        lines.append(f"  export RLBROKER_REDIS_URL={shlex.quote(url)}")
    else:
        lines.append("  export RLBROKER_REDIS_URL=…  # the URL of your server")
    lines.append(f"  rlbroker status --run {run}")
    if parts.password and not embedded:
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
    for redis_command in (
        ("HGETALL", keys.weights),
        ("HGETALL", keys.counts(0)),
        ("HGETALL", keys.ledger(0)),
        ("XREVRANGE", keys.missed, "+", "-", "COUNT", "3"),
    ):
        lines.append(f"  {cli} {shlex.join(redis_command)}")
    return "\n".join(lines)
