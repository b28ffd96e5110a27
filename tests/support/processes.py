"""Looking at processes from outside, with what a bare machine has: /proc on Linux, `ps` elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PROC = Path("/proc")


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to take note does not."""
    state = _facts(pid)[0]
    return state != "" and not state.startswith("Z")


def parent_of(pid: int) -> int:
    return int(_facts(pid)[1])


def command_line(pid: int) -> str:
    """The command line of one process, as everybody on the machine can read it; empty if it is not there."""
    if not (_PROC / "self").exists():
        command = ["ps", "-o", "args=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def command_lines() -> str:
    """The command lines of all processes."""
    if not (_PROC / "self").exists():
        return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    lines = []
    for path in _PROC.glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended meanwhile
    return "\n".join(lines)


def _facts(pid: int) -> tuple[str, str]:
    """Give state and parent; empty if there is no such process."""
    if not (_PROC / "self").exists():
        command = ["ps", "-o", "stat=,ppid=", "-p", str(pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return (found[0], found[1]) if found else ("", "")
    try:
        # The command's name, in brackets, may hold spaces.
        rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return rest[0], rest[1]
