"""The result of a check of `rlbroker doctor`, and helpers of the checks in `*_checks.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlbroker.backend.missing_rights import grant_command
from rlbroker.errors import AccessDenied, PeerError
from rlbroker.ops.doctor.server_info import ServerInfo

State = Literal["ok", "warning", "critical", "unknown"]


@dataclass(frozen=True)
class Check:
    """One check and its result.

    Attributes:
        code: one word for programs, such as `latency`.
        state: `unknown` if the server does not report it, or not to this user.
        what: one sentence for people, with the values that were read.
        hint: a command that repairs it or shows more; several lines if each node needs its own; empty without one.
    """

    code: str
    state: State
    what: str
    hint: str = ""


def unknown_check(code: str, what: str, info: ServerInfo, command: str) -> Check:
    """Return the check for a value that the server does not report, or not to this user; `command` would read it."""
    rule = info.missing.get(command, "")
    if rule:
        why, hint = f"the user {info.user!r} may not run {command}", grant_command(info.user, rule)
    else:
        why, hint = f"the server does not report it ({command})", ""
    return Check(code, "unknown", f"{what}: {why}", hint)


def unreadable_check(code: str, what: str, error: PeerError) -> Check:
    """Return the check for keys that cannot be read: the user lacks a right, or another program wrote them."""
    if isinstance(error, AccessDenied):
        hint = grant_command(error.user, error.rule) if error.rule else ""
        return Check(code, "unknown", f"{what}: {error}", hint)
    return Check(code, "critical", f"{what}: {error}")
