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
from urllib.parse import unquote, urlsplit

from rich.console import Console

from rlbroker.config import redacted_url
from rlbroker.demo.progress import Progress, Summary, parse_report
from rlbroker.demo.view import describe, open_view
from rlbroker.errors import PeerError
from rlbroker.keys import Keys
from rlbroker.local.redis_server import RedisServer
from rlbroker.local.supervisor import Supervisor

LEARNER = "learner"
#: How long the children get to stop after Ctrl-C before they are killed.
INTERRUPT_SECONDS = 2.5
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
        PeerError: the learner ended without a result.
        ServerUnsuitable: there is no server program that runs here.
    """
    console = console or Console()
    deadline = time.monotonic() + settings.seconds
    say = console.file.write
    with ExitStack() as stack:
        server: RedisServer | None = None
        url = settings.url
        if url is None:
            server = stack.enter_context(RedisServer())
            url = server.url
            say(f"server: embedded {server.version}\n")
        else:
            say(f"server: {redacted_url(url)}\n")
        # The name is new, so that a server of one's own keeps nothing of an earlier demo's workers.
        run = f"demo-{secrets.token_hex(3)}"
        todo = commands(settings, run, deadline - time.monotonic())
        for command in todo.values():
            say(f"$ {shlex.join(command)}\n")
        try:
            summary = _watch(settings, console, todo, url, deadline)
        except KeyboardInterrupt:
            say("Interrupted; everything is stopped and no picture was written.\n")
            return 130
        say(describe(summary) + "\n")
        if settings.output is not None and summary.outcome != "interrupted":
            say(f"  picture   {settings.output}\n")
        say(_how_to_look(url, run, kept=settings.keep_server or server is None))
        console.file.flush()
        if server is not None and settings.keep_server:
            say("The server stays until Ctrl-C.\n")
            console.file.flush()
            with suppress(KeyboardInterrupt):
                signal.pause()
    return summary.exit_code


def _watch(
    settings: DemoSettings, console: Console, todo: Mapping[str, list[str]], url: str, deadline: float
) -> Summary:
    """Run the processes until the learner gives its summary and the workers have stopped."""
    # Not as an argument: a command line with a password in it can be read by everybody on the machine.
    environment = {"RLBROKER_REDIS_URL": url, "OMP_NUM_THREADS": "1"}
    lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    tails = {name: deque[str](maxlen=_TAIL_LINES) for name in todo}

    def supervise(names: list[str], max_restarts: int) -> Supervisor:
        return Supervisor(
            {name: _executable(todo[name]) for name in names},
            environment=environment,
            on_output=lambda name, line: lines.put((name, line)),
            max_restarts=max_restarts,
            stop_timeout_seconds=INTERRUPT_SECONDS,
        )

    # A learner begins anew when it is restarted, so it is not; a worker just joins again.
    learner = supervise([LEARNER], max_restarts=0)
    workers = supervise([name for name in todo if name != LEARNER], max_restarts=5)
    with open_view(settings.env_id, console) as view, workers, learner:
        try:
            while time.monotonic() < deadline + GRACE_SECONDS:
                ended = learner.wait(0)
                try:
                    name, line = lines.get(timeout=0.2)
                except queue.Empty:
                    if ended:
                        break
                    continue
                match parse_report(line) if name == LEARNER else None:
                    case Progress() as progress:
                        view.update(progress)
                    case Summary() as summary:
                        learner.wait(GRACE_SECONDS)
                        workers.wait(INTERRUPT_SECONDS)
                        return summary
                    case None:
                        tails[name].append(line)
        except KeyboardInterrupt:
            # The learner can tell the workers to stop; only what does not obey is signalled.
            pid = learner.status()[LEARNER].pid
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
            if learner.wait(INTERRUPT_SECONDS):
                workers.wait(0.5)
            raise
    said = "\n".join(f"{name}: {line}" for name, tail in tails.items() for line in tail)
    raise PeerError(f"the learner ended without a result; what the processes said last:\n{said}")


def _executable(command: list[str]) -> list[str]:
    """Return a command that runs this very installation, whatever the PATH is."""
    program, *arguments = command
    assert program == "rlbroker"
    options = ["--progress", "json"] if arguments[0] == "learner" else []
    return [sys.executable, "-c", "from rlbroker.cli import main; main()", *arguments, *options]


def _how_to_look(url: str, run: str, *, kept: bool) -> str:
    """Return commands that show what is in Redis, or how to get a server that stays."""
    if not kept:
        return "With --keep-server the server stays, to be looked at with redis-cli.\n"
    parts = urlsplit(url)
    lines = ["Look into the server from another terminal:\n"]
    if parts.password:
        lines.append(f"  export REDISCLI_AUTH={shlex.quote(unquote(parts.password))}\n")
    if parts.scheme == "unix":
        cli = f"redis-cli -s {shlex.quote(unquote(parts.path))}"
        if parts.username:
            cli += f" --user {shlex.quote(unquote(parts.username))}"
    else:
        user = f"{parts.username}@" if parts.username else ""
        host = parts.netloc.rpartition("@")[2]
        cli = f"redis-cli -u {shlex.quote(f'{parts.scheme}://{user}{host}{parts.path}')}"
    keys = Keys(run)
    for words in (
        ("HGETALL", keys.weights),
        ("HGETALL", keys.counts(0)),
        ("XREVRANGE", keys.missed, "+", "-", "COUNT", "3"),
        ("--scan", "--pattern", f"{keys.prefix}:*"),
    ):
        lines.append(f"  {cli} {shlex.join(words)}\n")
    return "".join(lines)
