"""Tests of the demo's output: progress lines, the dashboard, the picture, the printed commands."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlbroker.demo.dashboard import Dashboard, JsonLines, PlainLines, StepRate, describe, open_view
from rlbroker.demo.launch import DemoSettings, build_commands, describe_inspection
from rlbroker.demo.plot import plot
from rlbroker.demo.training_progress import DemoWorkerStatus, Progress, Summary, parse_report

pytestmark = pytest.mark.unit

PROGRESS = Progress(
    seconds=2.0,
    seconds_left=58.0,
    steps=4_000,
    version=7,
    episodes=30,
    mean_return=123.4,
    target=475.0,
    returns=((3_000, 100.0), (4_000, 146.8)),
    batches=((1.5, 0, 1), (1.9, 1, 2)),
    queued=3,
    missed=5,
    workers=(DemoWorkerStatus(0, "hosta", 11, "alive", 6, 1), DemoWorkerStatus(1, "hostb", 12, "away", 5, 2)),
)
SUMMARY = Summary(
    env_id="CartPole-v1",
    outcome="solved",
    seconds=10.0,
    steps=80_000,
    episodes=600,
    versions=40,
    mean_return=476.0,
    target=475.0,
    mean_staleness=1.5,
    max_staleness=2,
    batches_produced=164,
    batches_delivered=161,
    batches_lost={"dropped_oldest": 3},
    missed={"left": 2},
)


def progress_at(seconds: float, steps: int = 0) -> Progress:
    return replace(PROGRESS, seconds=seconds, steps=steps)


@pytest.mark.parametrize("report", [PROGRESS, SUMMARY])
def test_a_report_survives_the_round_trip_through_json(report: Progress | Summary) -> None:
    line = report.to_json()
    assert "\n" not in line
    assert parse_report(line) == report


@pytest.mark.parametrize("line", ["", "hello", "12", "[]", "{}", '{"progress": 1}', "{"])
def test_other_output_is_not_parsed_as_a_report(line: str) -> None:
    assert parse_report(line) is None


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("solved", 0), ("trained", 0), ("not solved in time", 1), ("interrupted", 130), ("moved", 75)],
)
def test_each_outcome_has_its_exit_code(outcome: str, code: int) -> None:
    assert replace(SUMMARY, outcome=outcome).exit_code == code  # type: ignore[arg-type]


def test_without_a_terminal_the_view_is_plain_lines() -> None:
    assert isinstance(open_view("E", Console(file=io.StringIO())), PlainLines)


def test_a_log_is_flushed_during_training(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, open_view("E", Console(file=log)) as view:
        view.update(PROGRESS)
        assert "steps" in (tmp_path / "log").read_text()


def test_with_no_color_the_view_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(open_view("E", Console(file=io.StringIO(), force_terminal=True)), PlainLines)


def test_on_a_terminal_the_view_is_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_view("E", Console(file=io.StringIO(), force_terminal=True)), Dashboard)


def test_plain_lines_are_written_every_few_seconds_and_at_the_end() -> None:
    written: list[str] = []
    with PlainLines(written.append, seconds=5.0) as view:
        for seconds in (1.0, 2.0, 5.9, 6.0, 7.0, 8.0):
            view.update(progress_at(seconds))
    assert [line.split()[0] for line in written] == ["1.0", "6.0", "8.0"]
    with PlainLines(written.append, seconds=5.0) as view:
        view.update(progress_at(9.0))
    assert [line.split()[0] for line in written] == ["1.0", "6.0", "8.0", "9.0"], "a line was written twice"
    assert all(line.endswith("\n") and "\x1b" not in line for line in written)


def test_a_plain_line_has_all_numbers() -> None:
    written: list[str] = []
    PlainLines(written.append).update(PROGRESS)
    for part in ("4,000 steps", "version 7", "123.4", "staleness 1.5", "queue 3", "missed 5", "workers 2"):
        assert part in written[0]


def test_json_lines_have_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonLines() as view:
        view.update(PROGRESS)
    assert json.loads(capsys.readouterr().out)["progress"]["version"] == 7


def test_the_step_rate_is_that_of_the_last_seconds() -> None:
    step_rate = StepRate()
    assert step_rate.update(progress_at(1.0)) == 0.0
    assert step_rate.update(progress_at(2.0, 500)) == 500.0
    for second in range(3, 20):
        found = step_rate.update(progress_at(float(second), 1_000 * second))
    assert found == 1_000.0


def test_the_dashboard_shows_the_run_and_each_worker() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, no_color=True)
    with Dashboard("CartPole-v1", console) as view:
        view.update(replace(PROGRESS, mean_return=None, workers=()))
        view.update(PROGRESS)
        view.update(replace(PROGRESS, mean_return=475.0))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("CartPole-v1", "no worker yet", "hosta", "hostb", "away", "58 s left", "█", "4,000"):
        assert part in written


def test_a_summary_accounts_for_every_batch() -> None:
    text = describe(SUMMARY)
    assert text.startswith("Solved CartPole-v1 in 10.0 s")
    assert "164 produced = 161 delivered + 3 dropped_oldest" in text
    assert "40 versions published; missed by workers: 2 on leaving" in text
    assert "did not leave" not in text
    assert "workers that did not leave after the stop command: 1" in describe(
        replace(SUMMARY, workers_left=(1,))
    )


@pytest.mark.parametrize("history", [[], [PROGRESS], [PROGRESS, replace(PROGRESS, returns=(), batches=())]])
def test_the_picture_is_drawn_from_any_history(tmp_path: Path, history: list[Progress]) -> None:
    plot(tmp_path / "demo.png", history, "title")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_the_printed_commands_work_on_separate_machines() -> None:
    commands = build_commands(DemoSettings(workers=3, env_id="Acrobot-v1", seed=5), "demo-1", 60.0)
    assert list(commands) == ["learner", "worker-0", "worker-1", "worker-2"]
    assert " ".join(commands["worker-2"]) == (
        "rlbroker worker --run demo-1 --env Acrobot-v1 --seed 5 --worker-id 2"
    )
    assert " ".join(commands["learner"]) == (
        "rlbroker learner --run demo-1 --env Acrobot-v1 --seed 5 --workers 3 --minutes 1 --output demo.png"
    )


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("unix://me:pass%2Fword@/tmp/a%20b.sock?db=0", "redis-cli -s '/tmp/a b.sock' --user me HGETALL "),
        ("redis://me:pass%2Fword@host:7000/2", "redis-cli -u redis://host:7000/2 --user me HGETALL "),
        ("redis://host", "redis-cli -u redis://host HGETALL "),
    ],
)
def test_the_inspection_commands_fit_the_servers_url(url: str, command: str) -> None:
    text = describe_inspection(url, "demo-1", kept=True, embedded=True)
    assert f"{command}'rlb:{{demo-1}}:weights'" in text
    assert ("REDISCLI_AUTH=pass/word" in text) == ("pass" in url)
    assert "--keep-server" in describe_inspection(url, "demo-1", kept=False, embedded=True)


def test_the_password_of_another_server_is_not_shown() -> None:
    text = describe_inspection("redis://me:top-secret@host:6379/0", "demo-1", kept=True, embedded=False)
    assert "top-secret" not in text
    assert "redis-cli -u redis://host:6379/0 --user me" in text


def test_the_parent_process_imports_no_heavy_package() -> None:
    code = "import sys, rlbroker.demo.launch; print({'torch', 'gymnasium', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "set()\n"
