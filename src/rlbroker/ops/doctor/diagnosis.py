"""The diagnosis of `rlbroker doctor`: all checks, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.topology import SingleServer
from rlbroker.ops.doctor.checks import Check, State
from rlbroker.ops.doctor.host_checks import check_host_cache
from rlbroker.ops.doctor.node_checks import (
    check_clocks,
    check_nodes,
    combine_masters,
    hint_at_each_node,
    read_nodes,
)
from rlbroker.ops.doctor.run_checks import check_run
from rlbroker.ops.doctor.server_checks import check_clock, check_latency, check_rights, check_server
from rlbroker.ops.doctor.server_info import measure_latency, read_server_info

#: The states, worst last; an unknown value is no fault.
_BY_WEIGHT: Final[tuple[State, ...]] = ("unknown", "ok", "warning", "critical")


@dataclass(frozen=True)
class Diagnosis:
    """All checks, in order.

    Attributes:
        server: the server's address, without user and password.
        run: the run that was checked, if any.
    """

    server: str
    run: str | None
    checks: tuple[Check, ...]

    @property
    def state(self) -> State:
        """The worst state of all checks; `ok` if nothing is wrong."""
        return max(("ok", *(check.state for check in self.checks)), key=_BY_WEIGHT.index)


def diagnose(connection: Connection, run: str | None = None) -> Diagnosis:
    """Check a server or all its nodes, a run on it, and this machine."""
    if isinstance(connection.servers, SingleServer):
        latency, info = measure_latency(connection), read_server_info(connection)
        checks = [check_latency(latency), *check_server(info)]
        checks += [check_rights(connection, info, run), check_clock(latency, info)]
    else:
        nodes, checks = read_nodes(connection)
        info = combine_masters(nodes)
        rights = hint_at_each_node(connection, nodes, check_rights(connection, info, run))
        checks += [*check_nodes(connection, nodes), rights, *check_clocks(nodes)]
    snapshot = None
    if run is not None:
        run_checks, snapshot = check_run(connection, info, run)
        checks += run_checks
    checks.append(check_host_cache(snapshot))
    return Diagnosis(connection.address, run, tuple(checks))
