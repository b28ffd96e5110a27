"""The points of an examination: what was looked at, what was seen, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlbroker.backend.error_mapping import grant_command
from rlbroker.errors import AccessDenied, PeerError
from rlbroker.ops.doctor.server_info import ServerInfo

State = Literal["ok", "warning", "critical", "unknown"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        code: one word for programs, such as `latency`.
        state: `unknown` if the server does not tell, or not this user.
        what: one sentence for people, with what was seen.
        hint: a command that mends it, or lets it be looked at, or a line for each server where that has to be done;
            empty where there is none, or need not be one.
    """

    code: str
    state: State
    what: str
    hint: str = ""


def untold(code: str, what: str, facts: ServerInfo, command: str) -> Check:
    """Give the point for what the server does not tell.

    Args:
        code: of the point.
        what: what is not known.
        facts: what the server tells.
        command: what would have to be asked.
    """
    rule = facts.missing.get(command, "")
    if rule:
        why, hint = f"the user {facts.user!r} may not run {command}", grant_command(facts.user, rule)
    else:
        why, hint = f"the server does not tell ({command})", ""
    return Check(code, "unknown", f"{what}: {why}", hint)


def unread(code: str, what: str, error: PeerError) -> Check:
    """Give the point for what could not be read: a right is missing, or somebody else wrote there."""
    if isinstance(error, AccessDenied):
        hint = grant_command(error.user, error.rule) if error.rule else ""
        return Check(code, "unknown", f"{what}: {error}", hint)
    return Check(code, "critical", f"{what}: {error}")


def size(count: int) -> str:
    """Give a number of bytes that is short to read.

    >>> [size(count) for count in (999, 4_194_304, 536_870_912, 12_000_000_000)]
    ['999 B', '4.19 MB', '537 MB', '12 GB']
    """
    for unit, bytes_of_it in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bytes_of_it:
            return f"{count / bytes_of_it:,.3g} {unit}"
    return f"{count} B"
