"""Attacks with the password of an observer, which people and dashboards have. The attacker wants more than to read.

tests/ops/test_acl.py checks command by command what an observer may not do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from guarded import RUN, GuardedServer
from scene import KEYS, Scene

from rlbroker import AccessDenied, WorkerClient, WorkerCommunicator
from rlbroker.control.commands import SEND
from rlbroker.membership.roster import RESTORE_RUN

OBSERVER = f"{RUN}-observer"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with GuardedServer("embedded", tmp_path_factory.mktemp("guarded")) as server:
        scene = Scene(server)
        try:
            yield scene
        finally:
            scene.close()


def test_an_observer_cannot_take_part(scene: Scene) -> None:
    """Neither as a learner, nor as a worker, nor with what it can read: epochs, incarnations and hashes of scripts."""
    scene.check_works()
    url = scene.server.url(OBSERVER)
    with pytest.raises(AccessDenied):
        WorkerCommunicator(1, redis_url=url, run=RUN)
    with pytest.raises(AccessDenied):
        WorkerClient(url, RUN, worker_id=0)
    with scene.server.client(OBSERVER) as client:
        epoch = client.hget(KEYS.meta, "epoch")
        incarnation = client.hget(KEYS.life(1), "incarnation")
        keys = (KEYS.meta, KEYS.workers, KEYS.control, KEYS.pending, KEYS.outcomes("x"), KEYS.life(1))
        stop = SEND.call(keys, (epoch, "x", 60, -1, "1", incarnation, "", "name", "stop", "data", ""))
        slow = RESTORE_RUN.call((KEYS.meta, KEYS.workers), (1, "x", 0, "1" * 200_000, "a", "b"))
        for command in (stop, slow):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    scene.check_works()


def test_an_observer_learns_no_passwords(scene: Scene) -> None:
    scene.check_works()
    commands = (
        "ACL LIST",
        "ACL GETUSER admin",
        "ACL LOG",
        "CONFIG GET *",
        "CLIENT LIST",
        "MONITOR",
        "SLOWLOG GET",
    )
    with scene.server.client(OBSERVER) as client:
        for command in commands:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())
        seen = b"".join(client.dump(key) for key in scene.admin.keys("*"))
    for user in ("admin", f"{RUN}-learner", f"{RUN}-worker-1"):
        assert scene.server.password(user).encode() not in seen
    scene.check_works()
