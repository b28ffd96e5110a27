"""Who is master, by what nodes of a Cluster and Sentinels say: scripted answers, no server."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import redis
from redis import exceptions as redis_errors

from rlbroker.backend import topology
from rlbroker.backend.keys import Keys
from rlbroker.backend.topology import Address, ClusterTopology, SentinelTopology, Server, slot_of
from rlbroker.errors import ServerUnsuitable

pytestmark = pytest.mark.unit

A, B, C = ("a", 1), ("b", 2), ("c", 3)
KEY = Keys("pong").meta

#: What each server answers, or the error that it gives.
Answers = dict[Address, Any]


def client(address: Address, **settings: Any) -> redis.Redis:
    return redis.Redis(host=address[0], port=address[1])


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    found: Answers = {}

    def ask(one: redis.Redis, *command: str, **options: Any) -> Any:
        settings = one.connection_pool.connection_kwargs
        said = found[settings["host"], settings["port"]]
        if isinstance(said, Exception):
            raise said
        return said(command) if callable(said) else said

    monkeypatch.setattr(topology, "_ask", ask)
    return found


AWAY = redis_errors.ConnectionError("away")


def node(
    owner: Address, *, epoch: int = 1, replica: Address | None = None, fails: int = 0
) -> Callable[..., Any]:
    """Answer as a node that knows of one master with all slots, and of others of which some fail."""
    there = [owner] if replica is None else [owner, replica]

    def said(command: tuple[str, ...]) -> Any:
        if command == ("CLUSTER SLOTS",):
            return [[0, 16383, *([host.encode(), port, host.encode()] for host, port in there)]]
        mine = {"node_id": owner[0], "epoch": str(epoch), "flags": "master", "slots": [["0", "16383"]]}
        failed = {"node_id": "x", "epoch": "0", "flags": "master,fail", "slots": [["1"]]}
        return {"mine": mine} | {str(number): failed for number in range(fails)}

    return said


def cluster(*seeds: Address) -> ClusterTopology:
    return ClusterTopology(client, seeds, "the Cluster")


def test_a_node_that_is_away_is_passed_over(answers: Answers) -> None:
    answers.update({A: AWAY, B: node(C)})
    with closing(cluster(A, B)) as found:
        assert found.holding(KEY).address == C
        assert [one.address for one in found.masters()] == [C]


def test_who_has_not_heard_of_the_newest_change_is_not_believed(answers: Answers) -> None:
    answers.update({A: node(A, epoch=5), B: node(B, epoch=7), C: node(A, epoch=5)})
    with closing(cluster(B, A)) as found:
        assert found.holding(KEY) == Server(client(B), B, term=7)
        answers[B] = AWAY
        found._order, found._doubt = [A, B], True
        answers[A] = node(A, epoch=5)
        answers[C] = node(B, epoch=7)
        found._seeds = (A, C)
        assert found.holding(KEY).address == B


def test_a_node_that_is_cut_off_from_most_of_the_others_is_asked_last(answers: Answers) -> None:
    answers.update({A: node(A, fails=2), B: node(B)})
    with closing(cluster(A, B)) as found:
        assert found.holding(KEY).address == A  # of equal age, the first: nobody knows better
        answers[B] = node(B, epoch=2)
        found.mark_stale(found.holding(KEY))
        assert found.holding(KEY).address == B


def test_a_master_that_was_something_else_meanwhile_is_another_server(answers: Answers) -> None:
    answers[A] = node(A, epoch=1)
    with closing(cluster(A)) as found:
        before = found.holding(KEY)
        found.mark_stale()
        assert found.holding(KEY) == before
        answers[A] = node(A, epoch=3)
        found.mark_stale()
        assert found.holding(KEY) != before


def test_a_slot_that_has_moved_is_where_its_node_says(answers: Answers) -> None:
    answers[A] = node(A)
    with closing(cluster(A)) as found:
        found.holding(KEY)
        found.moved(slot_of(KEY), B)
        other = Keys("another").meta
        assert (found.holding(KEY).address, found.holding(other).address) == (B, A)


def test_replicas_of_a_master_are_known(answers: Answers) -> None:
    answers[A] = node(A, replica=B)
    with closing(cluster(A)) as found:
        assert [one.address for one in found.replicas_of(found.holding(KEY))] == [B]


def test_nodes_that_the_others_hold_for_dead_are_lost(answers: Answers) -> None:
    nodes = {
        "a:1@11": {"node_id": "a", "epoch": "1", "flags": "myself,master", "slots": [["0", "16383"]]},
        "b:2@12": {"node_id": "b", "epoch": "0", "flags": "slave,fail?", "slots": []},
        "c:3@13": {"node_id": "c", "epoch": "0", "flags": "master,fail", "slots": []},
        "d:4@14": {"node_id": "d", "epoch": "0", "flags": "slave", "slots": []},
        ":0@0": {"node_id": "e", "epoch": "0", "flags": "master,fail,noaddr", "slots": []},
    }
    slots = [[0, 16383, [b"a", 1, b"a"], [b"b", 2, b"b"]]]
    answers[A] = lambda command: (
        slots
        if command == ("CLUSTER SLOTS",)
        else {place.partition("@")[0]: row for place, row in nodes.items()}
    )
    with closing(cluster(A)) as found:
        assert [one.address for one in found.replicas_of(found.holding(KEY))] == [B]
        assert [one.address for one in found.lost()] == [C]


def test_with_nobody_to_ask_it_is_an_error_that_may_pass(answers: Answers) -> None:
    answers.update({A: AWAY, B: TimeoutError("silent")})
    with closing(cluster(A, B)) as found, pytest.raises(redis_errors.ConnectionError, match="away; silent"):
        found.holding(KEY)


def test_a_single_server_is_no_cluster(answers: Answers) -> None:
    answers[A] = redis_errors.ResponseError("This instance has cluster support disabled")
    with closing(cluster(A)) as found, pytest.raises(ServerUnsuitable, match="write redis://a:1"):
        found.holding(KEY)


# Sentinels


def watched(address: Address, *, epoch: int = 1, down: bool = False) -> dict[str, Any]:
    state = {"ip": address[0], "port": address[1], "config-epoch": epoch, "is_master": True}
    return {"mymaster": state | {"is_sdown": down, "is_odown": False}}


def trio(service: str = "mymaster") -> SentinelTopology:
    return SentinelTopology(client, map(client, (A, B)), service, "the Sentinels")


def test_the_first_sentinel_that_answers_says_who_is_master(answers: Answers) -> None:
    answers.update({A: AWAY, B: watched(C, epoch=2)})
    with closing(trio()) as found:
        assert found.holding(KEY) == Server(client(C), C, term=2)


def test_a_sentinel_that_has_not_heard_of_the_newest_master_is_not_believed(answers: Answers) -> None:
    answers.update({A: watched(B, epoch=4), B: AWAY})
    with closing(trio()) as found:
        assert found.holding(KEY).address == B
        answers.update({A: watched(C, epoch=3), B: watched(B, epoch=4)})
        found.mark_stale()
        assert found.holding(KEY).address == B


@pytest.mark.parametrize("silence", [AWAY, watched(C, epoch=9, down=True)])
def test_while_no_sentinel_knows_a_master_the_last_one_stays(
    answers: Answers, silence: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answers.update({A: watched(C), B: AWAY})
    with closing(trio()) as found:
        before = found.holding(KEY)
        answers.update({A: silence, B: silence})
        for _ in range(2):
            found.mark_stale()
            assert found.holding(KEY) == before
    assert caplog.text.count("no Sentinel knows the master now") == 1


def test_with_no_sentinel_at_all_nobody_begins(answers: Answers) -> None:
    answers.update({A: AWAY, B: AWAY})
    with closing(trio()) as found, pytest.raises(redis_errors.ConnectionError, match="no Sentinel knows"):
        found.holding(KEY)


def test_a_service_that_no_sentinel_watches_is_named_with_those_that_they_do(answers: Answers) -> None:
    answers.update({A: watched(C), B: watched(C)})
    with closing(trio("pong")) as found, pytest.raises(ServerUnsuitable, match="'pong', but mymaster"):
        found.holding(KEY)


def test_a_server_is_no_sentinel(answers: Answers) -> None:
    answers[A] = redis_errors.ResponseError("unknown command 'SENTINEL'")
    with closing(trio()) as found, pytest.raises(ServerUnsuitable, match="a:1 is no Sentinel"):
        found.holding(KEY)


def known(address: Address, *, run_id: str = "", **flags: Any) -> dict[str, Any]:
    there = {
        "ip": address[0],
        "port": address[1],
        "runid": run_id,
        "is_sdown": False,
        "is_disconnected": False,
    }
    return there | flags


def sentinel(run_id: str, *others: dict[str, Any], refusal: str = "", quorum: int = 2) -> Callable[..., Any]:
    """Answer as a Sentinel that knows others."""

    def said(command: tuple[str, ...]) -> Any:
        if command[0] == "SENTINEL CKQUORUM" and refusal:
            raise redis_errors.ResponseError(refusal)
        return {
            "SENTINEL MYID": run_id.encode(),
            "SENTINEL MASTER": {"quorum": quorum},
            "SENTINEL SENTINELS": list(others),
            "SENTINEL SLAVES": [
                known(A),
                known(B, is_sdown=True),
                known(C, **{"master-link-status": "err"}),
            ],
        }.get(command[0])

    return said


def test_sentinels_are_counted_by_who_they_are_and_not_by_how_they_are_reached(answers: Answers) -> None:
    other, third = known(("10.0.0.2", 2), run_id="2"), known(C, run_id="3")
    answers.update(
        {A: sentinel("1", other, third), B: sentinel("2", known(("10.0.0.1", 1), run_id="1"), third)}
    )
    with closing(trio()) as found:
        assert found.watch() == topology.SentinelView(silent=[], total=3, alive=3, needed=2, refusal="")


def test_a_sentinel_that_does_not_answer_is_named_whoever_misses_it(answers: Answers) -> None:
    answers.update(
        {A: sentinel("1", known(B, run_id="2"), known(C, run_id="3", is_sdown=True), quorum=3), B: AWAY}
    )
    with closing(trio()) as found:
        assert found.watch() == topology.SentinelView(
            silent=["b:2", "c:3"], total=3, alive=1, needed=3, refusal=""
        )
        answers[A] = sentinel("1", known(B, run_id="2"), refusal="NOQUORUM 1 usable Sentinels")
        assert found.watch().refusal == "a:1 says NOQUORUM 1 usable Sentinels"


def test_a_sentinel_that_another_one_misses_is_not_waited_for(answers: Answers) -> None:
    answers.update({A: sentinel("1", known(B, run_id="2", is_sdown=True)), B: AssertionError("it was asked")})
    with closing(trio()) as found:
        assert found.watch() == topology.SentinelView(silent=["b:2"], total=2, alive=1, needed=2, refusal="")


def test_replicas_that_sentinels_miss_are_lost(answers: Answers) -> None:
    answers.update({A: AWAY, B: sentinel("2")})
    with closing(trio()) as found:
        assert [one.address for one in found.lost()] == [B, C]
