"""Tests of the rows and reports: ratios, targets, the order of samples, and the file formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.measure import Row, interleaved
from benchmarks.report import COLUMNS, format_cells, format_markdown, format_ratio, save_report

pytestmark = pytest.mark.unit


def make_row(
    ours: list[float],
    theirs: list[float],
    *,
    higher_is_better: bool = False,
    target: float | None = None,
    note: str = "",
) -> Row:
    return Row("work", "peer", "wanted", ours, theirs, "s", higher_is_better, target, note)


def test_the_ratio_is_the_ratio_of_the_medians() -> None:
    assert make_row([1.0, 100.0, 2.0], [4.0, 4.0, 0.0]).ratio == 0.5


@pytest.mark.parametrize(("ours", "theirs"), [([], [1.0]), ([1.0], []), ([1.0], [0.0])])
def test_without_samples_of_both_sides_there_is_no_ratio_and_no_result(
    ours: list[float], theirs: list[float]
) -> None:
    incomplete = make_row(ours, theirs, target=1.0, note="it is not installed")
    assert (incomplete.ratio, incomplete.met) == (None, None)
    assert format_cells(incomplete)["ratio"] == format_cells(incomplete)["met"] == "–"
    assert format_cells(incomplete)["note"] == "it is not installed"


@pytest.mark.parametrize(
    ("higher_is_better", "ours", "met"),
    [
        (False, 1.2, True),
        (False, 1.3, True),
        (False, 1.4, False),
        (True, 1.2, False),
        (True, 1.3, True),
        (True, 1.4, True),
    ],
)
def test_a_target_is_a_minimum_or_a_maximum(higher_is_better: bool, ours: float, met: bool) -> None:
    assert make_row([ours], [1.0], higher_is_better=higher_is_better, target=1.3).met is met


def test_a_row_without_a_target_is_neither_met_nor_missed() -> None:
    assert make_row([1.0], [1.0]).met is None


def test_the_ratio_of_a_wanted_speed_up_is_shown_inverted() -> None:
    assert format_ratio(make_row([0.5], [14.0], target=1 / 25)) == "28.0× less"
    assert format_ratio(make_row([1.2], [1.0], target=1.3)) == "1.20×"
    assert format_ratio(make_row([5.0], [1.0], target=4.0, higher_is_better=True)) == "5.00×"


def test_contenders_warm_up_once_and_the_first_one_changes_each_round() -> None:
    calls: list[str] = []

    def contender(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = interleaved({name: lambda name=name: contender(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert samples == {"a": [4.0, 9.0], "b": [5.0, 7.0], "c": [6.0, 8.0]}


def test_the_markdown_has_a_line_for_each_row_and_describes_the_machine() -> None:
    text = format_markdown([make_row([1.0], [2.0], target=0.9, note="a|b"), make_row([], [])], {"cores": 2})
    lines = text.splitlines()
    assert lines[0] == "| " + " | ".join(COLUMNS) + " |"
    assert lines[2] == "| work | peer | 1.00 | 2.00 | s | 2.00× less | wanted | yes | a\\|b |"
    assert len([line for line in lines if line.startswith("|")]) == 4
    assert "cores 2" in lines[-1]


def test_the_json_has_every_sample_and_the_results(tmp_path: Path) -> None:
    paths = save_report([make_row([1.0, 3.0], [2.0], target=0.5)], {"cores": 2}, tmp_path / "new", "weights")
    assert [path.name for path in paths] == ["weights.json", "weights.md", "weights.png"]
    found = json.loads(paths[0].read_text())
    assert found["facts"] == {"cores": 2}
    assert found["rows"][0]["ours"] == [1.0, 3.0]
    assert (found["rows"][0]["ratio"], found["rows"][0]["met"]) == (1.0, False)
    assert paths[2].read_bytes().startswith(b"\x89PNG")
