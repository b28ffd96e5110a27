"""All times of a membership: heartbeat, lease, forgetting, and return after a loss.

A worker sends HEARTBEATS_PER_LEASE heartbeats in each lease, by default one each second.

| a worker that was silent for | is | which means |
|---|---|---|
| less than `lease_seconds` (default 5 s) | `alive` | some heartbeats may fail before anything happens |
| `lease_seconds` or longer | `away` | a process that asks for any free worker id may get this one |
| `forget_seconds` (default 600 s) or longer | forgotten | it is fenced, and what it left open is settled as missed |

`lease_seconds` and `forget_seconds` are settings of the run (`config.RunSettings`). All times are measured by the
server's clock. Silence counts from the last heartbeat, or from when the learner opened or restored the run if that is
later: before that the server may have been unreachable for workers too.
"""

from __future__ import annotations

from typing import Final

from rlbroker.config import RunSettings

#: Heartbeats in one lease: this many must fail in a row before a worker is `away`.
HEARTBEATS_PER_LEASE = 5

#: Interval at which a worker polls for its run to be opened. A poll costs the server far less than a heartbeat.
OPEN_POLL_SECONDS: Final = 0.1

#: After the server lost the run, a worker must return within its lease, or within this time if that is longer: the
#: worker has to notice the loss first.
RETURN_SECONDS = 10.0


def heartbeat_seconds(settings: RunSettings) -> float:
    """Return the interval between two heartbeats."""
    return settings.lease_seconds / HEARTBEATS_PER_LEASE


def heartbeat_lifetime_milliseconds(settings: RunSettings) -> int:
    """Return the lifetime of a heartbeat's key: people look there for the host of a worker that died."""
    return int(max(10 * settings.lease_seconds, settings.forget_seconds) * 1000)


def return_seconds(settings: RunSettings) -> float:
    """Return the time in which a worker must return after the server lost the run."""
    return min(max(settings.lease_seconds, RETURN_SECONDS), settings.forget_seconds)
