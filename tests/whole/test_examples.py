"""The examples run as a reader runs them, and print what the text around them claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RealServer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str, url: str | None = None) -> str:
    """Return what the example prints. It must exit with 0 in time, and print nothing on stderr.

    The half with queues may print on stderr: on a busy machine the interpreter's semaphore tracker sometimes reports
    a semaphore of theirs that is already gone.
    """
    environment = {
        key: text for key, text in os.environ.items() if key not in ("RLBROKER_REDIS_URL", "REDIS_URL")
    }
    environment |= {"RLBROKER_REDIS_URL": url} if url else {}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "before" in arguments or done.stderr == ""
    return done.stdout


def count_loaded(output: str) -> dict[int, int]:
    found = re.findall(r"worker (\d): loaded (\d+) updates", output)
    return {int(worker): int(count) for worker, count in found}


def count_published(output: str) -> int:
    """Return how many updates the learner published. By then the policy must have improved."""
    found = re.search(r"(\d+) updates published, mean reward (\S+) at first and (\S+) at last", output)
    assert found is not None, output
    assert float(found[3]) > max(0.7, float(found[2]))
    return int(found[1])


def list_missed(output: str) -> dict[int, set[int]]:
    """Return the versions that are listed as missed, by worker."""
    found: dict[int, set[int]] = {}
    worker = -1
    for line in output.splitlines():
        if heading := re.match(r"missed updates of worker (\d)", line):
            worker = int(heading[1])
            found[worker] = set()
        elif line.startswith("    "):
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
                found[worker] |= set(range(int(first), int(last or first) + 1))
    return found


def test_the_queues_of_multiprocessing_cannot_tell_what_was_missed_or_obeyed() -> None:
    output = run_example("from_multiprocessing.py", "before")
    assert count_loaded(output).keys() == {0, 1}
    assert count_loaded(output)[1] < count_published(output)
    assert "stop: cannot tell" in output
    assert "missed updates: cannot tell" in output
    assert re.search(r"^the length of the model queues: \[-?\d, -?\d\]$", output, re.MULTILINE)


@pytest.mark.parametrize("where", ["embedded", "given"])
def test_rlbroker_lists_every_update_that_was_missed_and_each_stop(
    where: str, real_server: RealServer
) -> None:
    output = run_example(
        "from_multiprocessing.py", "after", url=real_server.url if where == "given" else None
    )
    assert "stop: worker 0 done, worker 1 done\n" in output
    missed = list_missed(output)
    assert count_loaded(output).keys() == missed.keys() == {0, 1}
    for worker, count in count_loaded(output).items():
        assert count + len(missed[worker]) == count_published(output)
    assert bool(list(real_server.client.scan_iter("rlb:{from-multiprocessing-*"))) == (where == "given")


@pytest.mark.parametrize("where", ["embedded", "given"])
def test_ppo_in_rounds_learns_the_same_weights_as_in_a_single_process(
    where: str, real_server: RealServer
) -> None:
    options = ("--updates", "20", "--seed", "3")
    alone = run_example("ppo_rounds.py", "single", *options)
    assert (
        run_example("ppo_rounds.py", "rounds", *options, url=real_server.url if where == "given" else None)
        == alone
    )
    first, last = (float(found) for found in re.findall(r"return +(\S+)", alone))
    assert last > first


@pytest.mark.timeout(180)  # JAX compiles, in three processes
@pytest.mark.parametrize("where", ["embedded", "given"])
def test_a_policy_in_jax_learns_from_workers_of_other_processes(where: str, real_server: RealServer) -> None:
    url = real_server.url if where == "given" else None
    output = run_example("jax_policy.py", "15", url=url)
    found = re.search(r"learned: (\S+) steps at first, (\S+) at last$", output.rstrip())
    assert found is not None, output
    assert float(found[1]) < 40
    assert float(found[2]) > 80
    assert "version 15: " in output
    assert bool(list(real_server.client.scan_iter("rlb:{jax-policy-*"))) == (where == "given")
