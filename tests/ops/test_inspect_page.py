"""docs/inspect.md is right: its commands, on the run that it describes, print what it shows."""

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

#: A run that has ended, for the commands that delete it.
ENDED_RUN = "breakout"

QUEUE_SIZE = 4

#: Redis commands that change nothing, and the two that the page marks as changes.
READING = {
    *("hget", "hgetall", "hkeys", "hmget", "hvals", "ttl", "info", "time"),
    *("xlen", "xpending", "xrange", "xrevrange", "smembers"),
    *("client list", "config get", "memory usage"),
}
CHANGING = {"config set", "unlink"}

#: Fields whose numbers differ from run to run: they depend on timing, clocks, compression and load.
NUMBER_FIELDS = (
    "alive|applied_total|away|collected_stored_bytes|dead_bytes|event|from|learner_pid|missed|missed:superseded|pid"
    "|published_stored_bytes|removed_bytes|skips_in_a_row|stored_bytes|to|worker"
)
#: Fields that name this machine.
HOST_FIELDS = "fenced_process|host|learner_host"

#: A field and its value in one line, as `"name" => "value"` or `name=value`, and a name alone, before its value.
_FIELD = re.compile(rf'((?: *\d+# )?"?({NUMBER_FIELDS}|{HOST_FIELDS})"?(?: => |=))(.*)')
_NAME = re.compile(rf'[ \d)]*"({NUMBER_FIELDS})"')
_INDENT = re.compile(r"[ \d)]*")
_INDEX = re.compile(r" *\d+# ")
#: Commands whose numbers all differ from run to run.
_VARYING = re.compile(r"\b(ttl|time|memory|info|client|unlink|sample)\b")


@contextmanager
def make_run(server: RedisServer) -> Iterator[Planted]:
    """Make the run that the page describes.

    Besides the planted faults, worker 0 failed a command, and one batch of it is pending. The queue of worker 1 is
    full, and it waited for room. Another run has ended.
    """
    with WorkerCommunicator(1, redis_url=server.url, run=ENDED_RUN) as ended:
        ended.send_model_weights({"w": np.zeros(10, np.float32)})
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

        def is_recorded() -> bool:
            missed = learner.missed_updates()
            return all(missed[worker].behind == 0 for worker in planted.workers if worker != BEHIND)

        wait_until("what the others missed is recorded", is_recorded)
        diligent.on_command("set_map", _fail)
        learner.send_control_command("set_map", {"map": "E1M1"}, worker_ids=[DILIGENT]).wait(5.0)
        with redis.Redis.from_url(server.url) as client:

            def is_written() -> bool:
                beats = [text_fields(client.hgetall(planted.keys.heartbeat(worker))) for worker in (0, 1)]
                if [beat["sent"] for beat in beats] != ["3", "4"] or float(beats[1]["room_seconds"]) == 0:
                    return False
                ((entry_id, fields),) = client.xrevrange(planted.keys.history(1), count=1)
                sample = Sample.from_fields(entry_id.decode(), text_fields(fields))
                assert sample is not None
                values = (sample.waiting, sample.in_hand, sample.delivered, sample.lost, sample.running[0])
                return values == (4, 1, 2, 1, 20) and sample.room_seconds > 0

            wait_until("heartbeats and history are written", is_written)
        yield planted


def _fail(_: object) -> None:
    raise RuntimeError("no such map")


def parse_commands(page: str) -> list[tuple[str, list[str]]]:
    """Return each command of the page, without its prompt, and its output lines."""
    commands: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            else:
                commands[-1][1].append(line)
    return [(command, lines) for command, lines in commands if not command.startswith("export ")]


def run_commands(commands: list[str], url: str) -> list[list[str]]:
    """Run the commands in one shell, and return the output lines of each."""
    script = "".join(f"{{ {command}\n}} 2>&1\nprintf '\\036'\n" for command in commands)
    done = subprocess.run(
        ["bash", "-c", script],
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


def mask(command: str, lines: list[str]) -> list[str]:
    """Return lines without what differs from run to run; the fields of a hash are sorted."""
    masked, name_before = list[str](), False
    for line in lines:
        text = re.sub(r'"RLBW.*', '"RLBW…', line)  # binary: the page shows its beginning
        text = re.sub(r"\b\d{13}\b", "<ms>", text)
        text = re.sub(r"\b([0-9a-f]{32}|[0-9a-f]{12})\b", "<hex>", text)
        text = re.sub(r"\d+\.\d+(e-\d+)?|\d+e-\d+", "<decimal>", text)
        text = re.sub(r"(\d+-<ms>-)\d+", r"\1#", text)  # an upload: the number of its tries varies
        field, indent = _FIELD.fullmatch(text), _INDENT.match(text)
        assert indent
        if field:
            text = field[1] + ("…" if re.fullmatch(HOST_FIELDS, field[2]) else _mask_numbers(field[3]))
        elif name_before:
            text = indent[0] + _mask_numbers(text[indent.end() :])
        elif _VARYING.search(command):
            text = " ".join(_mask_numbers(text).split())
        name_before = _NAME.fullmatch(line) is not None
        masked.append(_INDEX.sub("", text, count=1))
    hash_or_info = any(_INDEX.match(line) for line in lines) or " info " in command
    return sorted(masked) if hash_or_info else masked


def _mask_numbers(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def test_the_page_shows_what_redis_cli_prints() -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed: apt install redis-tools")
    page = parse_commands(PAGE.read_text())
    assert len(page) > 30
    with RedisServer(bind="127.0.0.1") as server, make_run(server):
        assert server.network_url  # redis-cli takes no other URL
        actual = run_commands([command for command, _ in page], server.network_url)
    wrong = []
    for (command, lines), output in zip(page, actual, strict=True):
        documented, printed = mask(command, lines), mask(command, output)
        if documented != printed:
            diff = difflib.unified_diff(documented, printed, "docs/inspect.md", "redis-cli", lineterm="", n=1)
            wrong.append("\n".join([f"$ {command}", *diff, "in full:", *output]))
    assert not wrong, "\n\n".join(wrong)


def test_the_commands_of_the_page_change_nothing_but_the_marked_ones() -> None:
    commands = "\n".join(command for command, _ in parse_commands(PAGE.read_text()))
    two_words = "client|config|memory"
    used = re.findall(rf"\brc (?:--raw )?((?:(?:{two_words}) )?[a-z]+)\b", commands)
    used += re.findall(r"\bredis-cli .* ([a-z]+)$", commands, re.MULTILINE)
    assert {*used} == READING | CHANGING
