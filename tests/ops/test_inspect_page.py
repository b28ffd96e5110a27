"""docs/inspect.md is right: its commands, run against the run that it describes, answer what it shows."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
from conftest import wait_until
from executable import environment
from planted import BEHIND, DILIGENT, Planted, plant

from rlbroker import QueueFull, WorkerCommunicator
from rlbroker.backend.replies import text_fields
from rlbroker.local.embedded_server import RedisServer
from rlbroker.metrics.history import Sample

PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"

#: Ended, and there to be deleted.
OVER = "breakout"

QUEUE_SIZE = 4

#: Redis commands that change nothing, and the two that the page says to be changes.
LOOKING = {
    *("hget", "hgetall", "hkeys", "hmget", "hvals", "ttl", "info", "time"),
    *("xlen", "xpending", "xrange", "xrevrange", "smembers"),
    *("client list", "config get", "memory usage"),
}
CHANGING = {"config set", "unlink"}

#: Fields whose numbers differ from run to run: which versions a worker happens to get, and what clocks, compression
#: and load decide.
NUMBERS = (
    "alive|applied_total|away|collected_stored_bytes|dead_bytes|event|from|learner_pid|missed|missed:superseded|pid"
    "|published_stored_bytes|removed_bytes|skips_in_a_row|stored_bytes|to|worker"
)
#: Fields that name this machine.
WORDS = "fenced_process|host|learner_host"

#: A field and its value in one line, as `"name" => "value"` or `name=value`, and the name alone, in a line before.
_BOTH = re.compile(rf'((?: *\d+# )?"?({NUMBERS}|{WORDS})"?(?: => |=))(.*)')
_NAME = re.compile(rf'[ \d)]*"({NUMBERS})"')
_PLACE = re.compile(r"[ \d)]*")
_INDEX = re.compile(r" *\d+# ")
#: Commands of whose answers no number stays the same.
_RESTLESS = re.compile(r"\b(ttl|time|memory|info|client|unlink|sample)\b")


@contextmanager
def looked_at(server: RedisServer) -> Iterator[Planted]:
    """Make what the page describes.

    Besides the planted trouble: worker 0 failed a command, and one batch of it is in the learner's hands; the queue
    of worker 1 is full, and it waited for room. Another run has ended.
    """
    with WorkerCommunicator(1, redis_url=server.url, run=OVER) as over:
        over.send_model_weights({"w": np.zeros(10, np.float32)})
    with plant(server, max_queue_size=QUEUE_SIZE) as planted:
        learner, diligent, behind = planted.learner, planted.workers[DILIGENT], planted.workers[BEHIND]
        random = np.random.default_rng(0)
        batches = [{"observations": random.standard_normal((128, 4), dtype=np.float32)} for _ in range(8)]
        for batch in batches[:3]:
            diligent.send_experiences(batch)
        pairs = learner.collect_experiences(timeout=5.0)
        while len(pairs) < 3:
            pairs += learner.collect_experiences(timeout=5.0)
        learner.acknowledge(pairs[:2])
        for batch in batches[3:7]:
            behind.send_experiences(batch)
        with pytest.raises(QueueFull):
            behind.send_experiences(batches[7], timeout=0.2)

        def settled() -> bool:
            missed = learner.missed_updates()
            return all(missed[worker].behind == 0 for worker in planted.workers if worker != BEHIND)

        wait_until("what the others missed is on record", settled)
        diligent.on_command("set_map", _fail)
        learner.send_control_command("set_map", {"map": "E1M1"}, worker_ids=[DILIGENT]).wait(5.0)
        with redis.Redis.from_url(server.url) as client:

            def written() -> bool:
                beats = [text_fields(client.hgetall(planted.keys.heartbeat(worker))) for worker in (0, 1)]
                if [beat["sent"] for beat in beats] != ["3", "4"] or float(beats[1]["room_seconds"]) == 0:
                    return False
                ((entry_id, fields),) = client.xrevrange(planted.keys.history(1), count=1)
                sample = Sample.from_fields(entry_id.decode(), text_fields(fields))
                assert sample is not None
                figures = (sample.waiting, sample.in_hand, sample.delivered, sample.lost, sample.running[0])
                return figures == (4, 1, 2, 1, 20) and sample.room_seconds > 0

            wait_until("heartbeats and history say it", written)
        yield planted


def _fail(_: object) -> None:
    raise RuntimeError("no such map")


def shown(page: str) -> list[tuple[str, list[str]]]:
    """Give each command of the page, without its prompt, and the lines that it answers."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return [(command, lines) for command, lines in found if not command.startswith("export ")]


def answers(commands: list[str], url: str) -> list[list[str]]:
    """Type the commands into one shell, and give the lines that each answers."""
    typed = "".join(f"{{ {command}\n}} 2>&1\nprintf '\\036'\n" for command in commands)
    done = subprocess.run(
        ["bash", "-c", typed],
        env=environment(RLBROKER_REDIS_URL=url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    parts = done.stdout.replace("\r", "").split("\036")
    assert len(parts) == len(commands) + 1, done.stdout
    return [part.splitlines() for part in parts[:-1]]


def masked(command: str, lines: list[str]) -> list[str]:
    """Give lines without what differs from run to run; the fields of a hash are in no order."""
    found, name_before = list[str](), False
    for line in lines:
        text = re.sub(r'"RLBW.*', '"RLBW…', line)  # binary: the page shows its beginning
        text = re.sub(r"\b\d{13}\b", "<ms>", text)
        text = re.sub(r"\b([0-9a-f]{32}|[0-9a-f]{12})\b", "<hex>", text)
        text = re.sub(r"\d+\.\d+(e-\d+)?|\d+e-\d+", "<decimal>", text)
        text = re.sub(r"(\d+-<ms>-)\d+", r"\1#", text)  # an upload: how often it was tried does not matter
        both, place = _BOTH.fullmatch(text), _PLACE.match(text)
        assert place
        if both:
            text = both[1] + ("…" if re.fullmatch(WORDS, both[2]) else _numberless(both[3]))
        elif name_before:
            text = place[0] + _numberless(text[place.end() :])
        elif _RESTLESS.search(command):
            text = " ".join(_numberless(text).split())
        name_before = _NAME.fullmatch(line) is not None
        found.append(_INDEX.sub("", text, count=1))
    hash_or_info = any(_INDEX.match(line) for line in lines) or " info " in command
    return sorted(found) if hash_or_info else found


def _numberless(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def test_the_page_shows_what_redis_cli_answers() -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed: apt install redis-tools")
    page = shown(PAGE.read_text())
    assert len(page) > 30
    with RedisServer(bind="127.0.0.1") as server, looked_at(server):
        assert server.network_url  # as redis-cli takes it
        real = answers([command for command, _ in page], server.network_url)
    wrong = []
    for (command, lines), answered in zip(page, real, strict=True):
        page_says, it_says = masked(command, lines), masked(command, answered)
        if page_says != it_says:
            diff = difflib.unified_diff(page_says, it_says, "docs/inspect.md", "redis-cli", lineterm="", n=1)
            wrong.append("\n".join([f"$ {command}", *diff, "in full:", *answered]))
    assert not wrong, "\n\n".join(wrong)


def test_the_page_takes_nothing_from_a_run() -> None:
    commands = "\n".join(command for command, _ in shown(PAGE.read_text()))
    two_words = "client|config|memory"
    called = re.findall(rf"\brc (?:--raw )?((?:(?:{two_words}) )?[a-z]+)\b", commands)
    called += re.findall(r"\bredis-cli .* ([a-z]+)$", commands, re.MULTILINE)
    assert {*called} == LOOKING | CHANGING
