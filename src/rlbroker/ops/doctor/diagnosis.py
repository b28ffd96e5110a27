"""Whether a server, a run on it and this machine are fit for each other, point by point, with what mends each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rlbroker.backend.connection import Connection
from rlbroker.backend.topology import SingleServer
from rlbroker.ops.doctor.checks import Check, State
from rlbroker.ops.doctor.host_checks import of_host
from rlbroker.ops.doctor.node_checks import at_each, look_at_nodes, of_all, of_clocks, of_nodes
from rlbroker.ops.doctor.run_checks import of_run
from rlbroker.ops.doctor.server_checks import of_clock, of_latency, of_rights, of_server
from rlbroker.ops.doctor.server_info import measure_latency, read_server_info

#: The states, the worst last; not to know something is no fault.
_BY_WEIGHT: Final[tuple[State, ...]] = ("unknown", "ok", "warning", "critical")


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at, in order.

    Attributes:
        server: its address, without user and password.
        run: the run that was looked at; None for none.
    """

    server: str
    run: str | None
    points: tuple[Check, ...]

    @property
    def state(self) -> State:
        """The worst that was found; `ok` if nothing was wrong."""
        return max(("ok", *(one.state for one in self.points)), key=_BY_WEIGHT.index)


def diagnose(connection: Connection, run: str | None = None) -> Diagnosis:
    """Look at a server, or at every node where there are several, and at one run on it.

    Raises:
        PeerError: the server could not be reached in time.
    """
    if isinstance(connection.servers, SingleServer):
        latency, facts = measure_latency(connection), read_server_info(connection)
        points = [of_latency(latency), *of_server(facts)]
        points += [of_rights(connection, facts, run), of_clock(latency, facts)]
    else:
        nodes, points = look_at_nodes(connection)
        facts = of_all(nodes)
        rights = at_each(connection, nodes, of_rights(connection, facts, run))
        points += [*of_nodes(connection, nodes), rights, *of_clocks(nodes)]
    snapshot = None
    if run is not None:
        of_this_run, snapshot = of_run(connection, facts, run)
        points += of_this_run
    points.append(of_host(snapshot))
    return Diagnosis(connection.address, run, tuple(points))
