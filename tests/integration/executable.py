"""`rlbroker` as a person runs it: the installed command, in processes of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

RLBROKER = str(Path(sys.executable).with_name("rlbroker"))


def environment(**more: str) -> dict[str, str]:
    """Variables for a command that finds no server and no wishes for colours in them but those given."""
    hidden = ("RLBROKER_REDIS_URL", "REDIS_URL", "NO_COLOR", "FORCE_COLOR", "COLUMNS")
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
    said = b""
    with open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123 - a descriptor has no path
        while True:
            try:
                part = terminal.read(4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            said += part
    assert process.wait(timeout=10) == 0, said
    return said.decode().replace("\r\n", "\n")


def cells(said: str, first: int | str) -> dict[str, str]:
    """Give one line of a table by column: the one that begins with this."""
    lines = said.splitlines()
    line_number = next(number for number, line in enumerate(lines) if re.match(r"\s*─{5}", line)) - 1
    names = re.split(r"\s{2,}", lines[line_number].strip())
    line = next(line for line in lines[line_number + 2 :] if re.match(rf"\s*{first}  ", line))
    return dict(zip(names, re.split(r"\s{2,}", line.strip()), strict=False))
