"""Which server is the master, by the replies of Sentinels and nodes of a Cluster: scripted replies, no server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, Self

import pytest
import redis
from redis import exceptions as redis_errors

from rlbroker.backend.cluster import ClusterTopology, slot_of
from rlbroker.backend.keys import Keys
from rlbroker.backend.sentinel import SentinelTopology, SentinelView
from rlbroker.backend.topology import Address, Server
from rlbroker.errors import ServerUnsuitable

pytestmark = pytest.mark.unit

A, B, C = ("a", 1), ("b", 2), ("c", 3)
KEY = Keys("pong").meta

AWAY = redis_errors.ConnectionError("away")

#: The reply of each server: an error to raise, a function of the command, or the reply to every command.
Replies = dict[Address, Any]


class ScriptedClient(redis.Redis):
    """A client of a server that gives scripted replies, which have redis-py's shapes already."""

    def __init__(self, address: Address, replies: Replies) -> None:
        super().__init__(host=address[0], port=address[1])
        pool: Any = ScriptedPool(self.connection_pool.connection_kwargs, replies)
        self.connection_pool = pool
        self.response_callbacks.clear()


class ScriptedPool:
    """A pool of one connection, which is its own."""

    is_connected = True

    def __init__(self, settings: dict[str, Any], replies: Replies) -> None:
        self.connection_kwargs, self._replies = settings, replies
        self._command: tuple[str, ...] = ()

    def get_connection(self) -> Self:
        return self

    def release(self, connection: Self) -> None:
        return

    def disconnect(self, *, inuse_connections: bool = True) -> None:
        return

    def send_packed_command(self, pieces: list[bytes], *, check_health: bool) -> None:
        words = [word.decode() for word in pieces[0].split(b"\r\n")[2::2]]
        self._command = (" ".join(words[:2]), *words[2:])

    def read_response(self) -> Any:
        reply = self._replies[self.connection_kwargs["host"], self.connection_kwargs["port"]]
        if isinstance(reply, Exception):
            raise reply
        return reply(self._command) if callable(reply) else reply


class ScriptedServers:
    """Servers with scripted replies, and topologies of them."""

    def __init__(self) -> None:
        self.replies: Replies = {}

    def client(self, address: Address, **settings: Any) -> redis.Redis:
        return ScriptedClient(address, self.replies)

    def cluster(self, *seeds: Address) -> ClusterTopology:
        return ClusterTopology(self.client, seeds, "the Cluster")

    def sentinels(self, service: str = "mymaster") -> SentinelTopology:
        return SentinelTopology(self.client, map(self.client, (A, B)), service, "the Sentinels")


@pytest.fixture
def servers() -> ScriptedServers:
    return ScriptedServers()


# Cluster


def node(
    owner: Address, *, epoch: int = 1, replica: Address | None = None, failed: int = 0
) -> Callable[..., Any]:
    """Reply as a node that knows one master with all slots, and some other masters that have failed."""
    nodes = [owner] if replica is None else [owner, replica]

    def reply(command: tuple[str, ...]) -> Any:
        if command == ("CLUSTER SLOTS",):
            return [[0, 16383, *([host.encode(), port, host.encode()] for host, port in nodes)]]
        own = {"node_id": owner[0], "epoch": str(epoch), "flags": "master", "slots": [["0", "16383"]]}
        other = {"node_id": "x", "epoch": "0", "flags": "master,fail", "slots": [["1"]]}
        return {"own": own} | {str(number): other for number in range(failed)}

    return reply


def test_a_node_that_does_not_answer_is_skipped(servers: ScriptedServers) -> None:
    servers.replies.update({A: AWAY, B: node(C)})
    with closing(servers.cluster(A, B)) as found:
        assert found.master_for(KEY).address == C
        assert [one.address for one in found.masters()] == [C]


def test_a_node_that_does_not_know_the_latest_failover_is_not_believed(servers: ScriptedServers) -> None:
    servers.replies.update({A: node(A, epoch=5), B: node(B, epoch=7), C: node(B, epoch=7)})
    with closing(servers.cluster(B, A, C)) as found:
        before = found.master_for(KEY)
        assert before == Server(servers.client(B), B, term=7)
        servers.replies[B] = AWAY
        found.mark_stale(before)
        assert found.master_for(KEY).address == B, "A is asked before C, and names an older master"


def test_a_node_that_is_cut_off_from_most_masters_is_asked_last(servers: ScriptedServers) -> None:
    servers.replies.update({A: node(A, failed=2), B: node(B)})
    with closing(servers.cluster(A, B)) as found:
        assert found.master_for(KEY).address == A, "of two views of equal age, the first counts"
        servers.replies[B] = node(B, epoch=2)
        found.mark_stale(found.master_for(KEY))
        assert found.master_for(KEY).address == B


def test_a_master_that_was_replaced_in_between_is_another_server(servers: ScriptedServers) -> None:
    servers.replies[A] = node(A, epoch=1)
    with closing(servers.cluster(A)) as found:
        before = found.master_for(KEY)
        found.mark_stale()
        assert found.master_for(KEY) == before
        servers.replies[A] = node(A, epoch=3)
        found.mark_stale()
        assert found.master_for(KEY) != before


def test_a_moved_slot_is_on_the_node_that_a_redirect_names(servers: ScriptedServers) -> None:
    servers.replies[A] = node(A)
    with closing(servers.cluster(A)) as found:
        found.master_for(KEY)
        found.note_moved(slot_of(KEY), B)
        other = Keys("another").meta
        assert (found.master_for(KEY).address, found.master_for(other).address) == (B, A)


def test_the_replicas_of_a_master_are_known(servers: ScriptedServers) -> None:
    servers.replies[A] = node(A, replica=B)
    with closing(servers.cluster(A)) as found:
        assert [one.address for one in found.replicas_of(found.master_for(KEY))] == [B]


def test_nodes_that_the_others_consider_failed_are_lost(servers: ScriptedServers) -> None:
    nodes = {
        "a:1": {"node_id": "a", "epoch": "1", "flags": "myself,master", "slots": [["0", "16383"]]},
        "b:2": {"node_id": "b", "epoch": "0", "flags": "slave,fail?", "slots": []},
        "c:3": {"node_id": "c", "epoch": "0", "flags": "master,fail", "slots": []},
        "d:4": {"node_id": "d", "epoch": "0", "flags": "slave", "slots": []},
        ":0": {"node_id": "e", "epoch": "0", "flags": "master,fail,noaddr", "slots": []},
    }
    slots = [[0, 16383, [b"a", 1, b"a"], [b"b", 2, b"b"]]]
    servers.replies[A] = lambda command: slots if command == ("CLUSTER SLOTS",) else nodes
    with closing(servers.cluster(A)) as found:
        assert [one.address for one in found.replicas_of(found.master_for(KEY))] == [B]
        assert [one.address for one in found.lost()] == [C]


def test_if_no_node_answers_the_error_is_an_outage(servers: ScriptedServers) -> None:
    servers.replies.update({A: AWAY, B: TimeoutError("silent")})
    with (
        closing(servers.cluster(A, B)) as found,
        pytest.raises(redis_errors.ConnectionError, match="away; silent"),
    ):
        found.master_for(KEY)


def test_a_single_server_is_refused_as_a_cluster(servers: ScriptedServers) -> None:
    servers.replies[A] = redis_errors.ResponseError("This instance has cluster support disabled")
    with closing(servers.cluster(A)) as found, pytest.raises(ServerUnsuitable, match="write redis://a:1"):
        found.master_for(KEY)


# Sentinel


def describe_master(address: Address, *, epoch: int = 1, down: bool = False) -> dict[str, Any]:
    """The reply of a Sentinel to SENTINEL MASTERS."""
    state = {"ip": address[0], "port": address[1], "config-epoch": epoch, "is_master": True}
    return {"mymaster": state | {"is_sdown": down, "is_odown": False}}


def test_the_first_sentinel_that_answers_names_the_master(servers: ScriptedServers) -> None:
    servers.replies.update({A: AWAY, B: describe_master(C, epoch=2)})
    with closing(servers.sentinels()) as found:
        assert found.master_for(KEY) == Server(servers.client(C), C, term=2)


def test_a_sentinel_that_does_not_know_the_latest_failover_is_not_believed(servers: ScriptedServers) -> None:
    servers.replies.update({A: describe_master(B, epoch=4), B: AWAY})
    with closing(servers.sentinels()) as found:
        assert found.master_for(KEY).address == B
        servers.replies.update({A: describe_master(C, epoch=3), B: describe_master(B, epoch=4)})
        found.mark_stale()
        assert found.master_for(KEY).address == B


@pytest.mark.parametrize("silence", [AWAY, describe_master(C, epoch=9, down=True)])
def test_while_no_sentinel_knows_a_master_the_last_one_is_used(
    servers: ScriptedServers, silence: Any, caplog: pytest.LogCaptureFixture
) -> None:
    servers.replies.update({A: describe_master(C), B: AWAY})
    with closing(servers.sentinels()) as found:
        before = found.master_for(KEY)
        servers.replies.update({A: silence, B: silence})
        for _ in range(2):
            found.mark_stale()
            assert found.master_for(KEY) == before
    assert caplog.text.count("no Sentinel knows the master now") == 1


def test_if_no_sentinel_answers_at_first_it_is_an_error(servers: ScriptedServers) -> None:
    servers.replies.update({A: AWAY, B: AWAY})
    with (
        closing(servers.sentinels()) as found,
        pytest.raises(redis_errors.ConnectionError, match="no Sentinel knows"),
    ):
        found.master_for(KEY)


def test_a_service_that_no_sentinel_monitors_is_named_with_the_known_ones(servers: ScriptedServers) -> None:
    servers.replies.update({A: describe_master(C), B: describe_master(C)})
    with (
        closing(servers.sentinels("pong")) as found,
        pytest.raises(ServerUnsuitable, match="'pong', but mymaster"),
    ):
        found.master_for(KEY)


def test_a_server_is_refused_as_a_sentinel(servers: ScriptedServers) -> None:
    servers.replies[A] = redis_errors.ResponseError("unknown command 'SENTINEL'")
    with (
        closing(servers.sentinels()) as found,
        pytest.raises(ServerUnsuitable, match="a:1 is not a Sentinel"),
    ):
        found.master_for(KEY)


def describe_peer(address: Address, *, run_id: str = "", **flags: Any) -> dict[str, Any]:
    """The row in which a Sentinel describes another server or Sentinel."""
    found = {
        "ip": address[0],
        "port": address[1],
        "runid": run_id,
        "is_sdown": False,
        "is_disconnected": False,
    }
    return found | flags


def sentinel(run_id: str, *others: dict[str, Any], refusal: str = "", quorum: int = 2) -> Callable[..., Any]:
    """Reply as a Sentinel that knows others."""

    def reply(command: tuple[str, ...]) -> Any:
        if command[0] == "SENTINEL CKQUORUM" and refusal:
            raise redis_errors.ResponseError(refusal)
        return {
            "SENTINEL MYID": run_id.encode(),
            "SENTINEL MASTER": {"quorum": quorum},
            "SENTINEL SENTINELS": list(others),
            "SENTINEL SLAVES": [
                describe_peer(A),
                describe_peer(B, is_sdown=True),
                describe_peer(C, **{"master-link-status": "err"}),
            ],
        }.get(command[0])

    return reply


def test_sentinels_are_counted_by_their_ids_and_not_by_their_addresses(servers: ScriptedServers) -> None:
    other, third = describe_peer(("10.0.0.2", 2), run_id="2"), describe_peer(C, run_id="3")
    servers.replies.update(
        {A: sentinel("1", other, third), B: sentinel("2", describe_peer(("10.0.0.1", 1), run_id="1"), third)}
    )
    with closing(servers.sentinels()) as found:
        assert found.view_sentinels() == SentinelView(silent=[], total=3, alive=3, needed=2, refusal="")


def test_sentinels_that_do_not_answer_us_or_another_sentinel_are_named(servers: ScriptedServers) -> None:
    third = describe_peer(C, run_id="3", is_sdown=True)
    servers.replies.update({A: sentinel("1", describe_peer(B, run_id="2"), third, quorum=3), B: AWAY})
    with closing(servers.sentinels()) as found:
        assert found.view_sentinels() == SentinelView(
            silent=["b:2", "c:3"], total=3, alive=1, needed=3, refusal=""
        )
        servers.replies[A] = sentinel(
            "1", describe_peer(B, run_id="2"), refusal="NOQUORUM 1 usable Sentinels"
        )
        assert found.view_sentinels().refusal == "a:1 reports NOQUORUM 1 usable Sentinels"


def test_a_sentinel_that_another_one_cannot_reach_is_not_waited_for(servers: ScriptedServers) -> None:
    servers.replies.update(
        {A: sentinel("1", describe_peer(B, run_id="2", is_sdown=True)), B: AssertionError("it was asked")}
    )
    with closing(servers.sentinels()) as found:
        assert found.view_sentinels() == SentinelView(silent=["b:2"], total=2, alive=1, needed=2, refusal="")


def test_replicas_that_sentinels_cannot_reach_are_lost(servers: ScriptedServers) -> None:
    servers.replies.update({A: AWAY, B: sentinel("2")})
    with closing(servers.sentinels()) as found:
        assert [one.address for one in found.lost()] == [B, C]
