"""What `rlbroker top` draws, and what its keys do, without a terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_findings import RUN

from rlbroker.ops.cli.styled_text import Piece, cell_width
from rlbroker.ops.cli.top.key_bindings import INTERVALS, ViewState, press_key, select_workers
from rlbroker.ops.cli.top.table import COLUMNS, SORT_COLUMNS
from rlbroker.ops.cli.top.view import (
    DrawOptions,
    Outage,
    clamp_scroll,
    draw_screen,
    draw_sparkline,
    draw_text,
)
from rlbroker.ops.inspect.findings import Finding
from rlbroker.ops.inspect.watch import SERIES, RunView, WorkerLine

pytestmark = pytest.mark.unit

PLAIN = DrawOptions()


def worker_line(worker: int, **changes: Any) -> WorkerLine:
    fields: dict[str, Any] = {
        "state": "alive",
        "version": 20,
        "staleness": 0,
        "batches_per_second": 1.5,
        "waiting": 1,
        "in_hand": 0,
        "lost": 0,
        "missed": 0,
        "unpolled_seconds": 0.1,
        "room_share": 0.0,
        "last_seen_seconds": 0.5,
        "process": f"node-{worker % 3}:{1000 + worker}",
        "troubled": False,
    }
    return WorkerLine(worker, **fields | changes)


def run_view(*lines: WorkerLine, findings: int = 0, **series: list[float | None]) -> RunView:
    all_findings = [
        Finding(
            "warning", "worker_behind", number, f"worker {number} is behind", f"rlbroker workers {number}"
        )
        for number in range(findings)
    ]
    values = {name: [0.0, 1.0, 2.0] for name in SERIES} | series
    return RunView(RUN, all_findings, lines, values, current=True)


def draw(
    view: RunView,
    state: ViewState | None = None,
    columns: int = 110,
    rows: int = 34,
    options: DrawOptions = PLAIN,
) -> list[str]:
    state = clamp_scroll(state or ViewState(), view, columns, rows)
    return [text_of(pieces) for pieces in draw_screen(view, state, columns, rows, options)]


def text_of(pieces: list[Piece]) -> str:
    return "".join(text for text, _ in pieces)


def worker_ids(view: RunView, state: ViewState) -> list[int]:
    return [line.worker for line in select_workers(view, state)]


def after(keys: str | list[str], state: ViewState | None = None) -> ViewState:
    state = state or ViewState()
    for key in keys:
        state = press_key(state, key)
    return state


# What is drawn


@pytest.mark.parametrize("columns", [1, 20, 60, 110])
@pytest.mark.parametrize("rows", [1, 5, 12, 34])
@pytest.mark.parametrize("workers", [0, 1, 1000])
def test_the_view_fits_a_terminal_of_any_size(columns: int, rows: int, workers: int) -> None:
    seen = run_view(*(worker_line(worker, process="世界" * worker) for worker in range(workers)), findings=5)
    for state in (
        ViewState(),
        ViewState(help_shown=True),
        ViewState(typing=True, search="x" * 200),
        ViewState(top_row=10**6),
    ):
        drawn = draw(seen, state, columns, rows)
        assert len(drawn) == rows
        assert max(map(cell_width, drawn)) <= columns


def test_a_small_terminal_shows_workers_first() -> None:
    drawn = draw(run_view(*(worker_line(worker) for worker in range(64)), findings=5), columns=60, rows=12)
    assert sum(one.split()[0].isdecimal() for one in drawn if one.split()) == 7
    assert "worker 0 is behind  and 4 more" in "\n".join(drawn)
    assert "stale" in drawn[3]
    assert "process" not in drawn[3]


def test_the_sort_column_is_never_omitted() -> None:
    for name in SORT_COLUMNS:
        assert any(
            f"{name}{mark}" in one
            for mark in "▲▼"
            for one in draw(run_view(worker_line(1)), ViewState(sort=name), 60)
        )


def test_findings_are_shown_with_their_hint_and_the_number_of_those_that_do_not_fit() -> None:
    many = [worker_line(worker) for worker in range(64)]
    drawn = "\n".join(draw(run_view(*many, findings=5)))
    assert "! worker 0 is behind  rlbroker workers 0\n" in drawn
    assert "! worker 1 is behind  rlbroker workers 1\n" in drawn
    assert "and 3 more: rlbroker status" in drawn
    assert "worker 2 is behind" not in drawn
    assert "worker 2 is behind" in "\n".join(draw(run_view(*many, findings=3)))


def test_findings_use_the_lines_that_workers_do_not_need() -> None:
    drawn = "\n".join(draw(run_view(worker_line(0), findings=9)))
    assert "worker 8 is behind" in drawn
    assert "more" not in drawn


def test_text_from_workers_cannot_control_the_terminal() -> None:
    hostile = worker_line(1, process="\x1b[2J\x1b]0;title\x07\n\u202ehost:1")
    for drawn in (
        draw(run_view(hostile)),
        [text_of(pieces) for pieces in draw_text(run_view(hostile), ViewState(), 110, PLAIN)],
    ):
        assert "title" in "".join(drawn)
        for one in drawn:
            assert not {"\x07", "\n", "\u202e", "\x1b"} & set(one)


def test_a_stale_view_shows_its_age_and_the_reason() -> None:
    options = DrawOptions(outage=Outage(12.0, "cannot reach redis://host:6379/0"))
    first, second, *_ = draw(run_view(worker_line(0)), options=options)
    assert "12 s old" in first
    assert second.startswith("no answer: cannot reach redis://host:6379/0")


def test_outdated_metrics_are_not_shown() -> None:
    now = run_view(worker_line(0), batches_per_second=[1.0, 52_700.0])
    assert "batches/s   52.7k" in "\n".join(draw(now))
    assert "batches/s       -" in "\n".join(draw(replace(now, current=False)))


def test_a_worker_that_left_has_no_current_values() -> None:
    left = worker_line(3, state="left", version=None, staleness=None, last_seen_seconds=None, process="")
    (row,) = (one for one in draw(run_view(left)) if one.split()[:1] == ["3"])
    assert row.split() == ["3", "left", "1", "0", "0", "0", "0.1", "s"]


def test_the_bar_is_full_for_the_stalest_worker() -> None:
    rows = draw(
        run_view(worker_line(0, staleness=0), worker_line(1, staleness=20), worker_line(2, staleness=40))
    )
    bars = {one.split()[0]: one.count("█") for one in rows if one.strip()[:1].isdecimal()}
    assert bars == {"0": 0, "1": 4, "2": 8}


def test_a_sparkline_shows_the_newest_values_up_to_its_top() -> None:
    assert draw_sparkline([0.0] * 5, 3) == "▁▁▁"
    assert draw_sparkline([5.0, 1.0, 4.0, 8.0], 3) == "▁▄█"
    assert draw_sparkline([0.5], 3, top=1.0) == "▄"
    assert draw_sparkline([None, 1.0], 3) == " █"
    assert draw_sparkline([1.0], 0) == ""


def test_a_pipe_gets_all_workers() -> None:
    seen = run_view(*(worker_line(worker) for worker in range(300)))
    drawn = [text_of(pieces) for pieces in draw_text(seen, ViewState(), 160, PLAIN)]
    assert sum(one.split()[0].isdecimal() for one in drawn if one.split()) == 300
    assert not any("q quit" in one or "every" in one for one in drawn[1:])


# What keys do


def test_workers_can_be_ordered_by_any_column_and_unknown_values_come_last() -> None:
    seen = run_view(
        worker_line(2, staleness=5),
        worker_line(0, staleness=1),
        worker_line(1, staleness=None, state="left"),
        worker_line(3, staleness=9),
    )
    assert worker_ids(seen, ViewState(sort="id")) == [0, 1, 2, 3]
    assert worker_ids(seen, ViewState(sort="stale")) == [3, 2, 0, 1]
    assert worker_ids(seen, ViewState(sort="stale", reverse=True)) == [0, 2, 3, 1]
    for column in COLUMNS:
        if column.key:
            assert sorted(worker_ids(seen, after(column.key))) == [0, 1, 2, 3]
            assert after(column.key).sort == column.name


def test_arrow_keys_cycle_through_the_columns() -> None:
    assert after(["right"]).sort == SORT_COLUMNS[1]
    assert after(["left"]).sort == SORT_COLUMNS[-1]
    assert after(["right"] * len(SORT_COLUMNS)).sort == SORT_COLUMNS[0]
    assert after("sr") == replace(ViewState(), sort="stale", reverse=True)
    assert after("srv").reverse is False


def test_workers_are_filtered_by_state_trouble_and_text() -> None:
    seen = run_view(
        worker_line(0, process="node-a:7"),
        worker_line(1, state="away", troubled=True),
        worker_line(12, process="node-b:100"),
    )
    assert worker_ids(seen, after("f")) == [0, 12]
    assert worker_ids(seen, after("ff")) == [1]
    assert worker_ids(seen, after("fff")) == [0, 1, 12]
    assert worker_ids(seen, after(["/", *"NODE-B", "enter"])) == [12]
    assert worker_ids(seen, after(["/", "1"])) == [1, 12]
    assert worker_ids(seen, after(["/", *"away"])) == [1]
    assert worker_ids(seen, after(["/", "7", "backspace", "1", "2"])) == [12]


def test_keys_typed_into_the_filter_do_nothing_else() -> None:
    state = after(["/", *"qrs ", "left"])
    assert (state.quit, state.sort, state.reverse, state.paused, state.search) == (
        *(False, "id", False, False),
        "qrs ",
    )
    assert press_key(state, "escape") == ViewState()
    assert press_key(press_key(state, "enter"), "q").quit


def test_scrolling_stops_at_the_last_worker() -> None:
    seen = run_view(*(worker_line(worker) for worker in range(100)))

    def scrolled(*keys: str) -> ViewState:
        state = clamp_scroll(ViewState(), seen, 110, 34)
        for key in keys:
            state = clamp_scroll(press_key(state, key), seen, 110, 34)
        return state

    fits = scrolled().page_rows
    assert fits == 34 - 10
    assert [
        scrolled(*keys).top_row for keys in (("down",), ("up",), ("page down",), ("page down", "up"))
    ] == [
        *(1, 0, fits),
        fits - 1,
    ]
    assert scrolled("end").top_row == scrolled(*["page down"] * 9).top_row == 100 - fits
    assert scrolled("end", "home").top_row == 0
    drawn = draw(seen, scrolled("end"))
    assert drawn[-2].split()[0] == "99"
    assert drawn[-1].endswith(f"{101 - fits}-100 of 100")


def test_the_interval_has_an_upper_and_a_lower_limit() -> None:
    assert after("+").interval == 0.2
    assert after("-").interval == 1.0
    assert after("+" * 50).interval == INTERVALS[0]
    assert after("-" * 50).interval == INTERVALS[-1]
    assert after("+", ViewState(interval=0.7)).interval == 0.5
    assert after("-", ViewState(interval=3600.0)).interval == 3600.0


def test_any_key_closes_the_help_and_only_q_does_more() -> None:
    assert "reverse the order" in "\n".join(draw(run_view(worker_line(0)), after("?")))
    assert after("?s") == ViewState()
    assert after("?q").quit
