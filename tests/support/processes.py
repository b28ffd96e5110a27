"""Reads the state of processes from /proc on Linux, from `ps` elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PROC = Path("/proc")


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    state = _read_state(pid)[0]
    return state != "" and not state.startswith("Z")


def parent_of(pid: int) -> int:
    return int(_read_state(pid)[1])


def command_line(pid: int) -> str:
    """Return the command line of a process, which every user of the machine can read; empty if it has ended."""
    if not (_PROC / "self").exists():
        command = ["ps", "-o", "args=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def command_lines() -> str:
    """Return the command lines of all processes."""
    if not (_PROC / "self").exists():
        return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    lines = []
    for path in _PROC.glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # the process has ended
    return "\n".join(lines)


def _read_state(pid: int) -> tuple[str, str]:
    """Return the state and the parent of a process; empty strings if it does not exist."""
    if not (_PROC / "self").exists():
        command = ["ps", "-o", "stat=,ppid=", "-p", str(pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return (found[0], found[1]) if found else ("", "")
    try:
        # The name of the command, in brackets, may contain spaces.
        rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return rest[0], rest[1]
