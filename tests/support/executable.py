"""Runs the installed `rlbroker` command in processes."""

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
    """Return this process's variables, without those that name a server or run or choose colours, plus `more`."""
    hidden = ("RLBROKER_REDIS_URL", "RLBROKER_RUN", "REDIS_URL", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
    kept = {name: text for name, text in os.environ.items() if name not in hidden}
    return kept | {"PYTHONWARNINGS": "error", "TERM": "xterm"} | more


def rlbroker(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with more environment variables."""
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
    """Start a command, with more environment variables."""
    return subprocess.Popen(
        [RLBROKER, *arguments],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_terminal(columns: int, *arguments: str, **more: str) -> str:
    """Return what a command writes to a terminal of this width until it ends."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [RLBROKER, *arguments], env=environment(**more), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    output = _read_all(controller)
    assert process.wait(timeout=10) == 0, output
    return output


def cells(output: str, first: int | str) -> dict[str, str]:
    """Return the cells of a table's line by column: of the line that begins with `first`."""
    lines = output.splitlines()
    line_number = next(number for number, line in enumerate(lines) if re.match(r"\s*─{5}", line)) - 1
    names = re.split(r"\s{2,}", lines[line_number].strip())
    line = next(line for line in lines[line_number + 2 :] if re.match(rf"\s*{first}  ", line))
    return dict(zip(names, re.split(r"\s{2,}", line.strip()), strict=False))


class RunShell:
    """Runs commands for one run of a server, whose URL is in the environment."""

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
        """Run a hint as it was printed; it names the run."""
        words = shlex.split(line)
        assert words[0] == "rlbroker"
        assert words[-2:] == ["--run", self.run]
        return self(*words[1:-2])

    def on_terminal(self, *arguments: str, answer: str = "") -> tuple[int, str]:
        """Run a command on a terminal, type the answer, and return the exit code and the output."""
        controller, terminal = pty.openpty()
        process = subprocess.Popen(
            self.command(*arguments),
            env=environment(RLBROKER_REDIS_URL=self.url),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        os.write(controller, answer.encode())
        output = _read_all(controller)
        return process.wait(timeout=10), output


def _read_all(terminal: int) -> str:
    """Return what is written to a terminal until its other end is closed."""
    output = b""
    with open(terminal, "rb", buffering=0) as lines:
        while True:
            try:
                part = lines.read(4096)
            except OSError:  # on Linux: the other end is closed
                break
            if not part:
                break
            output += part
    return output.decode().replace("\r\n", "\n")
