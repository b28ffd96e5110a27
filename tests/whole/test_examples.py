"""The examples run as a reader would run them, and say what the text around them claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RealServer

FROM_MULTIPROCESSING = Path(__file__).parents[2] / "examples" / "from_multiprocessing.py"


def run_example(*arguments: str, url: str | None = None) -> str:
    """Give what the example prints; it must end well and in time, and ours without a word on stderr.

    For the queues' half that cannot be asked: at exit, on a busy machine, the interpreter's own tracker of
    semaphores now and then reports one of theirs that is gone already.
    """
    environment = {
        key: text for key, text in os.environ.items() if key not in ("RLBROKER_REDIS_URL", "REDIS_URL")
    }
    environment |= {"RLBROKER_REDIS_URL": url} if url else {}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FROM_MULTIPROCESSING), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "before" in arguments or done.stderr == ""
    return done.stdout


def loaded(said: str) -> dict[int, int]:
    found = re.findall(r"worker (\d): loaded (\d+) updates", said)
    return {int(worker): int(count) for worker, count in found}


def published(said: str) -> int:
    """Give how many updates the learner published; the policy must have learned something by then."""
    found = re.search(r"(\d+) updates published, mean reward (\S+) at first and (\S+) at last", said)
    assert found is not None, said
    assert float(found[3]) > max(0.7, float(found[2]))
    return int(found[1])


def listed(said: str) -> dict[int, set[int]]:
    """Give the versions that are listed as missed, by worker."""
    found: dict[int, set[int]] = {}
    worker = -1
    for line in said.splitlines():
        if heading := re.match(r"missed updates of worker (\d)", line):
            worker = int(heading[1])
            found[worker] = set()
        elif line.startswith("    "):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
                found[worker] |= set(range(int(first), int(last or first) + 1))
    return found


def test_queues_cannot_tell_what_was_missed() -> None:
    said = run_example("before")
    assert loaded(said).keys() == {0, 1}
    assert loaded(said)[1] < published(said)
    assert "missed updates: cannot tell" in said
    assert re.search(r"the length of the model queues: \[-?\d, -?\d\]$", said.rstrip())


@pytest.mark.parametrize("where", ["embedded", "given"])
def test_rlbroker_lists_every_update_that_was_missed(where: str, real_server: RealServer) -> None:
    said = run_example("after", url=real_server.url if where == "given" else None)
    missed = listed(said)
    assert loaded(said).keys() == missed.keys() == {0, 1}
    for worker, count in loaded(said).items():
        assert count + len(missed[worker]) == published(said)
    assert bool(list(real_server.client.scan_iter("rlb:{from-multiprocessing-*"))) == (where == "given")
