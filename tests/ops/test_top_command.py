"""`rlbroker top` on a terminal: what it shows, what keys do, and that it restores the terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest
from executable import RLBROKER, rlbroker, start
from planted import BEHIND, DEAD, DILIGENT, POISONER, TWIN, Planted, plant
from screens import Screen
from test_live_run_commands import documented, keys_of

from rlbroker.local.embedded_server import RedisServer


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server for this file alone: a test stops it for a while."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def planted(server: RedisServer) -> Iterator[Planted]:
    with plant(server) as planted:
        yield planted


#: A shell that runs a command as a job, prints its exit code when Ctrl-Z stops it, and continues it after Enter.
SHELL = ("bash", "-c", 'set -m; "$0" "$@"; echo "stopped with $?"; read -r; fg >/dev/null')


def open_top(planted: Planted, *arguments: str, shell: tuple[str, ...] = ()) -> Screen:
    command = [*shell, RLBROKER, "top", "--run", planted.run, *arguments]
    # As Python's readline sets it.
    return Screen(command, columns=110, rows=30, RLBROKER_REDIS_URL=planted.url, LINES="24")


def rows_of(screen: Screen) -> dict[str, list[str]]:
    """Return the words of the table's lines by worker id, in the order of the lines."""
    return {words[0]: words for line in screen.lines if (words := line.split()) and words[0].isdecimal()}


def test_it_shows_the_run_and_obeys_keys_and_restores_the_terminal(planted: Planted) -> None:
    with open_top(planted, shell=SHELL) as screen:
        screen.shows("q quit")
        rows = rows_of(screen)
        assert list(rows) == [str(worker) for worker in (DILIGENT, BEHIND, DEAD, TWIN, POISONER)]
        assert rows[str(BEHIND)][1:4] == ["alive", "3", "17"]
        assert rows[str(DEAD)][1] == "away"
        assert "workers 4 of 5 alive" in screen.text
        assert "✗ the server has maxmemory-policy allkeys-lru" in screen.text
        assert "id▲" in screen.text

        screen.type("s")
        screen.until(
            "the stalest worker is first", lambda: list(rows_of(screen))[:2] == [str(DEAD), str(BEHIND)]
        )
        assert "stale▼" in screen.text
        screen.type("r")
        screen.until("the stalest worker is last", lambda: list(rows_of(screen))[-1] == str(DEAD))
        screen.type("\x1bOD\x1bOD")
        screen.shows("state▲")
        screen.type("/away\r")
        screen.until("only the dead worker is shown", lambda: list(rows_of(screen)) == [str(DEAD)])
        screen.type("\x1b")
        screen.until("all workers are shown", lambda: len(rows_of(screen)) == 5)
        screen.type("ff")
        screen.until("the worker without findings is hidden", lambda: str(DILIGENT) not in rows_of(screen))
        screen.type("?")
        screen.shows("any key closes the help")
        screen.type("x")
        screen.until("the table is shown again", lambda: len(rows_of(screen)) == 4)
        screen.type("-")
        screen.shows("every 1 s")
        screen.type(" ")
        screen.shows("paused")

        screen.resize(60, 12)
        screen.until("it fits", lambda: len(rows_of(screen)) == 4 and "q quit" in screen.lines[11])
        assert max(map(len, screen.lines)) <= 60

        screen.type("\x1a")
        screen.shows("stopped with 148")
        assert screen.restored
        before = len(screen.sent)
        screen.type("\n")
        screen.until("it is drawn again", lambda: b"q quit" in screen.sent[before:])
        assert not screen.restored

        screen.type("q")
        assert screen.ends() == 0
        assert screen.restored


def test_a_signal_restores_the_terminal(planted: Planted) -> None:
    with open_top(planted) as screen:
        screen.shows("q quit")
        screen.process.terminate()
        assert screen.ends() == 143
        assert screen.restored
        assert b"Traceback" not in screen.sent


def test_a_bug_restores_the_terminal() -> None:
    program = """
from rlbroker.ops.cli.top.terminal import Terminal
with Terminal(colors=True) as terminal:
    terminal.draw([[("drawn", "red")]])
    terminal.read_key(10.0, lambda: False)
    raise ArithmeticError("a bug")
"""
    with Screen([sys.executable, "-c", program], 80, 24) as screen:
        screen.shows("drawn")
        screen.type("x")
        assert screen.ends() == 1
        assert screen.restored
        assert "ArithmeticError: a bug" in screen.text


@pytest.mark.parametrize("kind", ["of-no-such-type", "dumb"])
def test_a_terminal_on_which_nothing_can_be_drawn_is_refused_with_advice(planted: Planted, kind: str) -> None:
    command = [RLBROKER, "top", "--run", planted.run]
    with Screen(command, columns=110, rows=30, RLBROKER_REDIS_URL=planted.url, TERM=kind) as screen:
        assert screen.ends() == 2
        assert "use `rlbroker status --watch`" in screen.text


def test_while_the_server_is_silent_the_stale_view_stays(planted: Planted, server: RedisServer) -> None:
    assert server.pid
    with open_top(planted, "--timeout", "0.5", "--interval", "0.1", "--no-color") as screen:
        screen.shows("q quit")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            screen.shows("no answer: cannot reach")
            assert f"{BEHIND} alive" in screen.text
            screen.type("s")
            screen.shows("stale▼")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        screen.until("the server answers again", lambda: "no answer" not in screen.text)
        screen.type("\x03")
        assert screen.ends() == 130
        assert screen.restored
    assert not re.search(rb"\x1b\[[0-9;]*[1-9][0-9;]*m", screen.sent), "--no-color"


def test_a_pipe_gets_one_view_as_text(planted: Planted) -> None:
    done = rlbroker(
        "top", "--sort", "stale", "--filter", "trouble", "--interval", "0.1", RLBROKER_REDIS_URL=planted.url
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    ids = [words[0] for line in done.stdout.splitlines() if (words := line.split()) and words[0].isdecimal()]
    assert ids[:2] == [str(DEAD), str(BEHIND)]
    assert str(DILIGENT) not in ids


def test_json_is_one_line_per_refresh_with_the_documented_keys(planted: Planted) -> None:
    with start("top", "--json", "--interval", "0.2", RLBROKER_REDIS_URL=planted.url) as process:
        assert process.stdout is not None
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    assert second["at"] > first["at"]
    assert second["workers"][str(BEHIND)]["staleness"] == 17
    assert first["workers"][str(POISONER)]["batches_per_second"] is None
    assert second["workers"][str(POISONER)]["batches_per_second"] == 0.0
    found, page = set(keys_of(second)), documented("top")
    assert len(page) > 10
    assert {key for key in found if not any(key == one or key.startswith(f"{one}.") for one in page)} == set()
    assert {key for key in page if not any(key == one for one in found)} == set()
