"""`rlbroker` as a person runs it: the installed command, in processes of its own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

RLBROKER = str(Path(sys.executable).with_name("rlbroker"))


def environment(**more: str) -> dict[str, str]:
    """Variables for a command that finds no server and no wishes for colours in them but those given."""
    hidden = ("RLBROKER_REDIS_URL", "RLBROKER_RUN", "REDIS_URL", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
    kept = {name: text for name, text in os.environ.items() if name not in hidden}
    return kept | {"PYTHONWARNINGS": "error", "TERM": "xterm"} | more


def rlbroker(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; more variables can be given."""
    return subprocess.run(
        [RLBROKER, *arguments],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        [RLBROKER, *arguments],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_terminal(columns: int, *arguments: str, **more: str) -> str:
    """Give what a command writes to a terminal of this width until it ends."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [RLBROKER, *arguments], env=environment(**more), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = _read_all(ours)
    assert process.wait(timeout=10) == 0, said
    return said


def cells(said: str, first: int | str) -> dict[str, str]:
    """Give one line of a table by column: the one that begins with this."""
    lines = said.splitlines()
    line_number = next(number for number, line in enumerate(lines) if re.match(r"\s*─{5}", line)) - 1
    names = re.split(r"\s{2,}", lines[line_number].strip())
    line = next(line for line in lines[line_number + 2 :] if re.match(rf"\s*{first}  ", line))
    return dict(zip(names, re.split(r"\s{2,}", line.strip()), strict=False))


class Shell:
    """Where a person types: the server's URL is in the environment."""

    def __init__(self, url: str, run: str) -> None:
        self.url, self.run = url, run

    def __call__(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            env=environment(RLBROKER_REDIS_URL=self.url, **more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def command(self, *arguments: str) -> list[str]:
        return [RLBROKER, *arguments, "--run", self.run]

    def json(self, *arguments: str, **more: str) -> Any:
        done = self(*arguments, "--json", **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run what a hint says, as it is; the run is part of it."""
        words = shlex.split(line)
        assert words[0] == "rlbroker"
        assert words[-2:] == ["--run", self.run]
        return self(*words[1:-2])

    def on_terminal(self, *arguments: str, answer: str = "") -> tuple[int, str]:
        """Give the exit code, and what is written to a terminal, on which this is typed."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            self.command(*arguments),
            env=environment(RLBROKER_REDIS_URL=self.url),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        os.write(ours, answer.encode())
        said = _read_all(ours)
        return process.wait(timeout=10), said


def _read_all(terminal: int) -> str:
    """Give what is written to a terminal until its other end is closed."""
    said = b""
    with open(terminal, "rb", buffering=0) as lines:
        while True:
            try:
                part = lines.read(4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            said += part
    return said.decode().replace("\r\n", "\n")
