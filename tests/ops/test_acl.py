"""The rights of each role on a server with the users of `rlbroker acl`: all that it needs, and nothing else.

Tested on the embedded server; with `scripts/test --all-servers` on Redis 6.2 and 7.0, too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import wait_until
from crashed import end_at_once
from executable import rlbroker
from guarded import RUN, VERSIONS, WORKERS, GuardedServer

from rlbroker import AccessDenied, Fenced, WorkerClient, WorkerCommunicator
from rlbroker.backend.keys import Keys
from rlbroker.backend.missing_rights import is_missing_right
from rlbroker.backend.scripts import Script
from rlbroker.control.acknowledgements import ACKNOWLEDGE
from rlbroker.control.commands import RESTORE_COMMAND, SEND
from rlbroker.control.ledger import SETTLE
from rlbroker.membership.heartbeat import BEAT, LEAVE, REJOIN
from rlbroker.membership.roster import ALIVE, END_RUN, FORGET, OPEN
from rlbroker.membership.worker_ids import REGISTER
from rlbroker.ops.acl import _LEARNER, _WORKER
from rlbroker.ops.prune import PRUNE
from rlbroker.weights.commit import COMMIT

KEYS = Keys(RUN)
LEARNER, OBSERVER = f"{RUN}-learner", f"{RUN}-observer"

#: Large enough to be stored as a delta.
SIZE = 40_000


def worker_user(worker: int) -> str:
    return f"{RUN}-worker-{worker}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "planted" in metafunc.fixturenames:
        kinds = metafunc.config.getoption("--servers").split(",")
        metafunc.parametrize("planted", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def planted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuardedServer]:
    """A run in which each role has done everything that it can do, and which no process changes any more."""
    with GuardedServer(request.param, tmp_path_factory.mktemp(request.param)) as server:
        exercise_all_roles(server)
        yield server


def exercise_all_roles(server: GuardedServer) -> None:
    def learner(**settings: Any) -> WorkerCommunicator:
        return WorkerCommunicator(
            WORKERS, redis_url=server.url(LEARNER), run=RUN, host_cache=False, **settings
        )

    def worker(number: int, **settings: Any) -> WorkerClient:
        return WorkerClient(
            server.url(worker_user(number)), RUN, worker_id=number, host_cache=False, **settings
        )

    admin = server.client("admin")
    weights = {"w": np.arange(SIZE, dtype=np.float32)}
    bad = {"data": b"?", "version": 1, "rows": 1, "raw_bytes": 1, "stored_bytes": 1, "sent_at": 0}
    with learner(max_queue_size=4, acknowledge="manual", take_over_seconds=0.5) as comm:
        first, second = worker(0, level="learner"), worker(1, when_full="drop_oldest")
        for _ in range(3):  # full, and as deltas
            weights["w"][::1000] += 1.0
            comm.send_model_weights(weights)
        for client, batches in ((first, 2), (second, 7)):
            client.load_weights({})
            for number in range(batches):
                client.send_experiences({"number": np.full(3, number)})
        commands = comm.send_control_command("reset"), comm.send_control_command("resume", worker_ids=[1])
        wait_until("both workers obey", lambda: [first.poll({}), second.poll({})] and all_done(*commands))
        pairs = wait_until("batches arrive", lambda: comm.collect_experiences(timeout=1.0))
        wait_until("the learner renews its pending entries", lambda: calls(admin, "xclaim"))
        comm.acknowledge(pairs)
        server.client(worker_user(1)).xadd(KEYS.experiences(1), bad, id=f"{second.incarnation}-100")

        def dead() -> Any:
            comm.acknowledge(comm.collect_experiences(timeout=0.1))
            return comm.dead_letters()

        comm.retry_dead_letters(wait_until("a batch is dead", dead))
        comm.purge_dead_letters(wait_until("it is dead again", dead))
        admin.sadd(KEYS.workers, "invalid")
        wait_until("the invalid id is removed", lambda: not admin.sismember(KEYS.workers, "invalid"))
        comm._maintenance.housekeep()
        third = worker(1)
        with pytest.raises(Fenced):
            wait_until("the second worker is fenced", lambda: second.poll({}) and False)
        admin.flushall()
        wait_until(
            "the run is restored", lambda: admin.hget(KEYS.weights, "version") and len(comm.workers()) == 2
        )
        for client in (first, third):
            client.poll({})
            client.close()
        second.close()
        comm._check()
    pruned = rlbroker("prune", "--run", RUN, "--yes", RLBROKER_REDIS_URL=server.url(LEARNER))
    assert (pruned.returncode, admin.keys("*")) == (0, []), pruned.stdout + pruned.stderr
    with learner(lease_seconds=0.2, forget_seconds=0.3) as comm, worker(1) as client:
        silent = worker(0)
        comm.send_model_weights(weights)
        client.load_weights({})
        client.send_experiences({"number": 1})
        comm.collect_experiences(timeout=5.0)
        silent._heartbeat._thread.stop(5.0)
        wait_until("the silent worker is forgotten", lambda: admin.hget(KEYS.life(0), "member") == b"0")
        silent.close()
        comm._check()
    client = worker(0)  # it stays a member, and is silent
    client._heartbeat._thread.stop(5.0)
    for part in (client._subscriber, client._inbox):
        part.stop(5.0)
    end_at_once(client)
    for key in admin.scan_iter():  # no key may expire during the tests
        admin.persist(key)


def calls(client: Any, command: str) -> bool:
    return f"cmdstat_{command}" in client.info("commandstats")


def all_done(*commands: Any) -> bool:
    return all(outcome.state == "done" for command in commands for outcome in command.outcomes().values())


def test_each_role_has_the_rights_that_it_needs(planted: GuardedServer) -> None:
    done = planted.client("admin").info("commandstats")
    refused = {
        name: one for name, one in done.items() if one.get("rejected_calls") and name not in _MAY_BE_REFUSED
    }
    assert not refused


#: redis-py sends CLIENT SETINFO to every server, and ignores its refusal.
_MAY_BE_REFUSED = {"cmdstat_client|setinfo", "cmdstat_client"}


def test_no_role_has_a_right_that_it_does_not_use(planted: GuardedServer) -> None:
    used = {name.removeprefix("cmdstat_") for name in planted.client("admin").info("commandstats")}
    used |= {name.partition("|")[0] for name in used}
    given = {rule.removeprefix("+") for rule in (*_LEARNER, *_WORKER) if rule[0] == "+" and rule[1] != "@"}
    if planted.kind == "redis-6.2":  # which counts subcommands with their command
        given = {name.partition("|")[0] for name in given}
    # Needed on a database other than 0, with RESP3, with replicas, or after the loss of a single script.
    assert given - used == {"select", "hello", "wait"} - used


DENIED_TO_ALL: list[tuple[Any, ...]] = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("CONFIG", "GET", "*"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "me", "on"),
    ("KEYS", "*"),
    ("MONITOR",),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("CLIENT", "LIST"),
    ("DEBUG", "SLEEP", "0"),
    ("SLOWLOG", "RESET"),
    ("SCRIPT", "FLUSH"),
    ("EVAL", "return 1", 0),
    ("MIGRATE", "127.0.0.1", "1", KEYS.meta, "0", "1"),
    ("RESTORE", KEYS.life(0), "0", b"?"),
    ("RENAME", KEYS.life(0), "other"),
    ("COPY", KEYS.life(0), "other"),
    ("SET", "other", "1"),
    ("HSET", "rlb:{other}:meta", "epoch", "9"),
    ("PUBLISH", "other", "1"),
    ("SUBSCRIBE", "other"),
]

WORKER_READS_NOT: list[tuple[Any, ...]] = [
    ("XRANGE", KEYS.experiences(1), "-", "+"),
    ("XREAD", "STREAMS", KEYS.experiences(1), "0"),
    ("XREADGROUP", "GROUP", "learner", "me", "STREAMS", KEYS.experiences(0), ">"),
    ("HGETALL", KEYS.counts(1)),
    ("HGETALL", KEYS.heartbeat(1)),
    ("HGETALL", KEYS.life(1)),
    ("XRANGE", KEYS.acknowledgements(1), "-", "+"),
    ("XRANGE", KEYS.dead(1), "-", "+"),
    ("XRANGE", KEYS.missed, "-", "+"),
    ("HGETALL", KEYS.pending),
    ("HGETALL", KEYS.ledger(1)),
    ("HGETALL", "rlb:{other}:meta"),
    ("GET", "other"),
    ("SCAN", "0"),
]

WORKER_WRITES_NOT: list[tuple[Any, ...]] = [
    ("SCRIPT", "LOAD", "return 1"),
    ("FUNCTION", "LOAD", "#!lua name=mine\nredis.register_function('f', function() return 1 end)"),
    ("PUBLISH", KEYS.notify, "99"),
    ("SET", KEYS.chunk("1-1-1", 1), "mine"),
    ("XADD", KEYS.experiences(1), "*", "data", "1"),
    ("XADD", KEYS.acknowledgements(1), "*", "event", "left"),
    ("XADD", KEYS.again(0), "*", "data", "1"),
    ("XADD", KEYS.missed, "*", "worker", "1"),
    ("HSET", KEYS.life(1), "incarnation", "9"),
    ("HSET", KEYS.heartbeat(1), "host", "9"),
    ("HSET", KEYS.counts(1), "delivered", "9"),
    ("HSET", KEYS.epochs(1), "epoch", "9"),
    ("HSET", KEYS.ledger(1), "settled", "9"),
    ("HSET", KEYS.pending, "a:1", "1 1-1"),
    ("XACK", KEYS.experiences(0), "learner", "1-1"),
    ("XGROUP", "DESTROY", KEYS.experiences(0), "learner"),
    ("XTRIM", KEYS.experiences(0), "MAXLEN", "0"),
    ("SREM", KEYS.workers, "1"),
    ("PERSIST", KEYS.heartbeat(0)),
]

#: Writes that only the read-only keys of Redis 7 and newer prevent.
WORKER_ONLY_READS: list[tuple[Any, ...]] = [
    ("HSET", KEYS.weights, "version", "99"),
    ("DEL", KEYS.weights),
    ("HSET", KEYS.meta, "epoch", "99"),
    ("HDEL", KEYS.meta, "epoch"),
    ("PEXPIRE", KEYS.meta, "1"),
    ("XADD", KEYS.control, "*", "event", "command"),
    ("XDEL", KEYS.control, "1-1"),
    ("DEL", KEYS.chunk("1-1-1", 1)),
    ("PEXPIRE", KEYS.chunk("1-1-1", 1), "1"),
    ("DEL", KEYS.workers),
    ("PEXPIRE", KEYS.workers, "1"),
    ("HSET", KEYS.ledger(0), "settled", "99"),
    ("HSET", KEYS.epochs(0), "epoch", "99"),
    ("SADD", KEYS.meta, "1"),
]


def refuses(client: Any, command: tuple[Any, ...]) -> bool:
    try:
        client.execute_command(*command)
    except redis.exceptions.NoPermissionError:
        return True
    except redis.ResponseError as error:
        if re.search(
            "unknown command|DEBUG command not allowed", str(error), re.IGNORECASE
        ):  # FUNCTION on 6.2
            return True
        raise
    return False


def allowed(server: GuardedServer, user: str, commands: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return those of the commands that the user is allowed to run."""
    with server.client(user) as client:
        return [command for command in commands if not refuses(client, command)]


def test_a_worker_writes_and_reads_only_its_own_keys(planted: GuardedServer) -> None:
    before = planted.everything()
    denied = DENIED_TO_ALL + WORKER_READS_NOT + WORKER_WRITES_NOT
    if planted.has_read_only_keys:
        denied += WORKER_ONLY_READS
    assert allowed(planted, worker_user(0), denied) == []
    assert planted.everything() == before


def test_an_observer_cannot_write(planted: GuardedServer) -> None:
    before = planted.everything()
    writes = [
        *DENIED_TO_ALL,
        *WORKER_WRITES_NOT,
        ("EVALSHA", BEAT.sha, 0),
        ("HSET", KEYS.life(0), "incarnation", "9"),
    ]
    if planted.has_read_only_keys:
        writes += WORKER_ONLY_READS
    assert allowed(planted, OBSERVER, writes) == []
    assert planted.everything() == before


def test_a_learner_has_no_rights_beyond_its_run(planted: GuardedServer) -> None:
    before = planted.everything()
    assert (
        allowed(planted, LEARNER, [*DENIED_TO_ALL, ("GET", "other"), ("HGETALL", "rlb:{other}:meta")]) == []
    )
    assert planted.everything() == before


def keys_of(script: Script, worker: int) -> list[str]:
    """Return the keys with which a script would harm a worker, or the run."""
    own = {
        OPEN: [KEYS.meta],
        END_RUN: [KEYS.meta],
        ALIVE: [KEYS.meta],
        COMMIT: [KEYS.meta, KEYS.weights, KEYS.control, KEYS.notify],
        SEND: [KEYS.meta, KEYS.workers, KEYS.control, KEYS.pending, KEYS.outcomes("abc"), KEYS.life(worker)],
        RESTORE_COMMAND: [KEYS.meta, KEYS.control, KEYS.pending, KEYS.outcomes("abc")],
        SETTLE: [KEYS.meta, KEYS.acknowledgements(worker), KEYS.ledger(worker), KEYS.missed, KEYS.pending],
        FORGET: [KEYS.life(worker), KEYS.acknowledgements(worker), KEYS.weights, KEYS.meta],
        PRUNE: [KEYS.meta, KEYS.workers],
        LEAVE: [KEYS.life(worker), KEYS.heartbeat(worker), KEYS.acknowledgements(worker), KEYS.weights],
        BEAT: [KEYS.life(worker), KEYS.workers, KEYS.heartbeat(worker), KEYS.meta],
        REJOIN: [KEYS.life(worker), KEYS.workers, KEYS.weights, KEYS.heartbeat(worker)],
        ACKNOWLEDGE: [KEYS.acknowledgements(worker)],
        REGISTER: [
            *(KEYS.life(worker), KEYS.workers, KEYS.acknowledgements(worker), KEYS.weights, KEYS.control),
            *(KEYS.meta, KEYS.heartbeat(worker), KEYS.ledger(worker)),
        ],
    }
    return own[script]


FAR = "9999999999999"

#: The fingerprint of no keys, with which `prune` compares nothing: SHA-1 of an empty list.
NOTHING = hashlib.sha1(b"\x90").hexdigest()

#: Placeholders for the epoch of the learner and for the incarnation of worker 1.
EPOCH, INCARNATION = "<epoch>", "<incarnation>"

ATTACKS: dict[str, tuple[Script, list[Any]]] = {
    "open": (OPEN, ["1", "learner", "1", "max_queue_size", "1"]),
    "end run": (END_RUN, [EPOCH, "", "learner"]),
    "alive": (ALIVE, ["learner_seen", "1"]),
    "publish": (COMMIT, [EPOCH, FAR, "9-9-9", "-", "-", "version", FAR]),
    "command": (SEND, [EPOCH, "abc", "60", "-1", "1", INCARNATION, "", "name", "stop", "data", ""]),
    "command-again": (
        RESTORE_COMMAND,
        [EPOCH, "abc", "60", "1", "1", "1", "waiting", "name", "stop", "data", ""],
    ),
    "settle": (SETTLE, [EPOCH, "1-1", "1", "60", "9", "0", "0", "settled", "9"]),
    "acknowledge": (ACKNOWLEDGE, ["", f"{FAR}-1", "event", "left", "version", "9"]),
    "give-up": (FORGET, ["0", "0"]),
    "prune": (PRUNE, ["0", NOTHING, "pruned"]),
    "leave": (LEAVE, ["1", "me:1"]),
    "beat": (BEAT, ["1", FAR, "token", "1000", "me:1", "version", "9"]),
    "rejoin": (REJOIN, ["1", FAR, FAR, "token", "1000"]),
    "register": (REGISTER, ["1", "5", "0", "token", "1"]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_worker_cannot_use_the_scripts_of_others(planted: GuardedServer, attack: str) -> None:
    if not planted.has_read_only_keys and attack in ("open", "alive", "publish", "end run", "prune"):
        pytest.skip("before Redis 7 a worker can write what it can read; `rlbroker acl` warns of it")
    script, arguments = ATTACKS[attack]
    epoch = planted.client("admin").hget(KEYS.meta, "epoch")
    incarnation = planted.client("admin").hget(KEYS.life(1), "incarnation")
    arguments = [{EPOCH: epoch, INCARNATION: incarnation}.get(one, one) for one in arguments]
    planted.client(LEARNER).script_load(script.text)
    before = planted.everything()
    with planted.client(worker_user(0)) as client:
        try:
            client.execute_command(*script.call(keys_of(script, 1), arguments))
        except redis.ResponseError as error:
            if not (is_missing_right(f"{error}") or isinstance(error, redis.exceptions.NoPermissionError)):
                raise
    assert planted.everything() == before


def test_a_worker_cannot_take_the_id_of_another(planted: GuardedServer) -> None:
    with pytest.raises(AccessDenied):
        WorkerClient(planted.url(worker_user(0)), RUN, worker_id=1)
    with pytest.raises(AccessDenied, match="--shared"):
        WorkerClient(planted.url(worker_user(0)), RUN)


def test_an_observer_can_run_every_command_that_reads(planted: GuardedServer) -> None:
    for command in (
        ["status"],
        ["workers"],
        ["missed"],
        ["check"],
        ["doctor"],
        ["runs"],
        ["weights", "list"],
        ["experiences"],
        ["control", "list"],
        ["dead", "list"],
    ):
        done = (
            rlbroker(*command, "--run", RUN, RLBROKER_REDIS_URL=planted.url(OBSERVER))
            if command[0] != "runs"
            else rlbroker(*command, RLBROKER_REDIS_URL=planted.url(OBSERVER))
        )
        output = done.stdout + done.stderr
        assert not re.search("lacks rights" if command == ["doctor"] else "may not", output), (
            f"{command}: {output}"
        )


def test_a_client_without_a_password_is_refused(planted: GuardedServer) -> None:
    for url in ("redis://127.0.0.1", f"redis://{LEARNER}:wrong@127.0.0.1"):
        with pytest.raises(AccessDenied):
            WorkerCommunicator(1, redis_url=f"{url}:{planted.port}/0", run=RUN)


def test_the_rules_fit_the_version_of_the_server(planted: GuardedServer) -> None:
    def rules(*options: str) -> Any:
        done = rlbroker(
            "acl", *planted.acl_options, "--json", *options, RLBROKER_REDIS_URL=planted.url(OBSERVER)
        )
        return json.loads(done.stdout)

    assert rules() == rules("--server-version", VERSIONS[planted.kind])


def test_shared_workers_take_any_free_id(tmp_path: Path) -> None:
    with GuardedServer("embedded", tmp_path, "--shared") as server:
        assert "each can read and write" in server.notes
        with WorkerCommunicator(2, redis_url=server.url(LEARNER), run=RUN) as comm:
            url = server.url(f"{RUN}-workers")
            with WorkerClient(url, RUN) as first, WorkerClient(url, RUN) as second:
                comm.send_model_weights({"w": 1})
                second.load_weights({})
                assert [first.worker_id, second.worker_id] == [0, 1]
        assert allowed(server, f"{RUN}-workers", DENIED_TO_ALL + WORKER_ONLY_READS) == []


def test_users_can_be_added_to_a_running_server(tmp_path: Path, planted: GuardedServer) -> None:
    options = ("--run", "second", "--workers", "1", "--secrets", str(tmp_path), "--setuser")
    done = rlbroker("acl", *options, RLBROKER_REDIS_URL=planted.url(OBSERVER))
    assert "1 new" not in done.stderr
    assert "3 new passwords" in done.stderr
    admin = planted.client("admin")
    for line in done.stdout.splitlines():
        assert admin.execute_command(*shlex.split(line)) in (True, b"OK", "OK")
    try:
        password = (tmp_path / "second-learner").read_text().strip()
        url = f"redis://second-learner:{password}@127.0.0.1:{planted.port}/0"
        with WorkerCommunicator(1, redis_url=url, run="second") as comm:
            assert comm.send_model_weights({"w": 1}).version == 1
        with pytest.raises(AccessDenied):
            WorkerCommunicator(1, redis_url=url, run=RUN)
    finally:
        for name in ("learner", "worker-0", "observer"):
            admin.acl_deluser(f"second-{name}")
        admin.delete(*admin.keys("rlb:{second}:*"))


def test_passwords_are_created_once_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    def print_users(*more: str) -> Any:
        options = (
            "--run",
            RUN,
            "--workers",
            "2",
            "--secrets",
            str(tmp_path / "new"),
            "--server-version",
            "7.2",
        )
        return rlbroker("acl", *options, *more)

    first, second = print_users(), print_users()
    assert (first.returncode, first.stdout) == (0, second.stdout)
    assert "0 new passwords, 5 existing" in second.stderr
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert (modes, stat.S_IMODE((tmp_path / "new").stat().st_mode)) == ({0o600}, 0o700)
    assert not [path for path in (tmp_path / "new").iterdir() if path.read_text().strip() in first.stdout]
    (tmp_path / "new" / "admin").write_text("")
    assert "must hold one line, the password" in print_users().stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((), "--secrets"),
        (("--secrets", "/dev/null/x"), "--secrets"),
        (("--secrets", "s", "--server-version", "new"), "--server-version"),
        (("--secrets", "s", "--server-version", "5.0"), "6.2 or newer"),
        (("--secrets", "s", "--run", "a b"), "run"),
    ],
)
def test_invalid_options_are_named(options: tuple[str, ...], named: str, tmp_path: Path) -> None:
    more = () if "--server-version" in options else ("--server-version", "7.2")
    done = rlbroker(
        "acl", *(one.replace("s", str(tmp_path)) if one == "s" else one for one in options), *more
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
