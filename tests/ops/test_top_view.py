"""What `rlbroker top` shows, and what keys do to it, without a terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_findings import RUN

from rlbroker.ops.cli.styled_text import cell_width
from rlbroker.ops.cli.top.key_bindings import INTERVALS, State, chosen, pressed
from rlbroker.ops.cli.top.keyboard import keys
from rlbroker.ops.cli.top.table import COLUMNS, SORTS
from rlbroker.ops.cli.top.view import Look, Trouble, frame, page, settled, sparkline
from rlbroker.ops.inspect.findings import Finding
from rlbroker.ops.inspect.watch import SERIES, RunView, WorkerLine

pytestmark = pytest.mark.unit

PLAIN = Look(colors=False)


def line(worker: int, **changes: Any) -> WorkerLine:
    usual: dict[str, Any] = {
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
    return WorkerLine(worker, **usual | changes)


def view(*lines: WorkerLine, findings: int = 0, **series: list[float | None]) -> RunView:
    found = [
        Finding(
            "warning", "worker_behind", number, f"worker {number} is behind", f"rlbroker workers {number}"
        )
        for number in range(findings)
    ]
    values = {name: [0.0, 1.0, 2.0] for name in SERIES} | series
    return RunView(RUN, found, lines, values, current=True)


def shown(
    view: RunView, state: State | None = None, columns: int = 110, rows: int = 34, look: Look = PLAIN
) -> list[str]:
    return frame(view, settled(state or State(), view, columns, rows), columns, rows, look)


def ids(view: RunView, state: State) -> list[int]:
    return [one.worker for one in chosen(view, state)]


def after(typed: str | list[str], state: State | None = None) -> State:
    found = state or State()
    for key in typed:
        found = pressed(found, key)
    return found


# What is shown


@pytest.mark.parametrize("columns", [1, 20, 60, 110])
@pytest.mark.parametrize("rows", [1, 5, 12, 34])
@pytest.mark.parametrize("workers", [0, 1, 1000])
def test_it_fits_any_terminal(columns: int, rows: int, workers: int) -> None:
    seen = view(*(line(worker, process="世界" * worker) for worker in range(workers)), findings=5)
    for state in (State(), State(helping=True), State(typing=True, text="x" * 200), State(top=10**6)):
        drawn = shown(seen, state, columns, rows)
        assert len(drawn) == rows
        assert max(map(cell_width, drawn)) <= columns


def test_a_short_and_narrow_terminal_shows_workers_before_anything_else() -> None:
    drawn = shown(view(*(line(worker) for worker in range(64)), findings=5), columns=60, rows=12)
    assert sum(one.split()[0].isdecimal() for one in drawn if one.split()) == 7
    assert "worker 0 is behind  and 4 more" in "\n".join(drawn)
    assert "stale" in drawn[3]
    assert "process" not in drawn[3]


def test_the_column_that_orders_is_never_left_out() -> None:
    for name in SORTS:
        assert any(
            f"{name}{mark}" in one for mark in "▲▼" for one in shown(view(line(1)), State(sort=name), 60)
        )


def test_what_is_wrong_is_shown_with_what_to_type_and_how_much_more_there_is() -> None:
    crowd = [line(worker) for worker in range(64)]
    drawn = "\n".join(shown(view(*crowd, findings=5)))
    assert "! worker 0 is behind  rlbroker workers 0\n" in drawn
    assert "! worker 1 is behind  rlbroker workers 1\n" in drawn
    assert "and 3 more: rlbroker status" in drawn
    assert "worker 2 is behind" not in drawn
    assert "worker 2 is behind" in "\n".join(shown(view(*crowd, findings=3)))


def test_what_is_wrong_gets_the_lines_that_workers_do_not_need() -> None:
    drawn = "\n".join(shown(view(line(0), findings=9)))
    assert "worker 8 is behind" in drawn
    assert "more" not in drawn


def test_what_workers_write_does_not_steer_the_terminal() -> None:
    hostile = line(1, process="\x1b[2J\x1b]0;title\x07\n\u202ehost:1")
    for drawn in (shown(view(hostile), look=Look()), page(view(hostile), State(), 110, Look())):
        assert "title" in "".join(drawn)
        for one in drawn:
            assert not {"\x07", "\n", "\u202e"} & set(one)
            assert "\x1b[2J" not in one
            assert "\x1b]" not in one


def test_without_colours_there_are_no_codes() -> None:
    seen = view(line(0, state="away", lost=3, staleness=50), findings=3)
    assert not any("\x1b" in one for one in shown(seen))
    assert any("\x1b[31m" in one for one in shown(seen, look=Look()))


def test_an_old_view_says_how_old_it_is_and_why() -> None:
    look = Look(colors=False, trouble=Trouble(12.0, "cannot reach redis://host:6379/0"))
    first, second, *_ = shown(view(line(0)), look=look)
    assert "as 12 s ago" in first
    assert second.startswith("no answer: cannot reach redis://host:6379/0")


def test_figures_that_are_not_of_now_are_not_shown_as_such() -> None:
    now = view(line(0), batches_per_second=[1.0, 52_700.0])
    assert "batches/s   52.7k" in "\n".join(shown(now))
    assert "batches/s       -" in "\n".join(shown(replace(now, current=False)))


def test_who_left_has_no_figures_of_now() -> None:
    gone = line(3, state="left", version=None, staleness=None, last_seen_seconds=None, process="")
    (row,) = (one for one in shown(view(gone)) if one.split()[:1] == ["3"])
    assert row.split() == ["3", "left", "1", "0", "0", "0", "0.1", "s"]


def test_the_bar_is_full_for_who_is_furthest_behind() -> None:
    rows = shown(view(line(0, staleness=0), line(1, staleness=20), line(2, staleness=40)))
    bars = {one.split()[0]: one.count("█") for one in rows if one.strip()[:1].isdecimal()}
    assert bars == {"0": 0, "1": 4, "2": 8}


def test_a_sparkline_shows_the_newest_and_its_top() -> None:
    assert sparkline([0.0] * 5, 3) == "▁▁▁"
    assert sparkline([5.0, 1.0, 4.0, 8.0], 3) == "▁▄█"
    assert sparkline([0.5], 3, top=1.0) == "▄"
    assert sparkline([None, 1.0], 3) == " █"
    assert sparkline([1.0], 0) == ""


def test_a_pipe_gets_all_workers() -> None:
    drawn = page(view(*(line(worker) for worker in range(300))), State(), 160, PLAIN)
    assert sum(one.split()[0].isdecimal() for one in drawn if one.split()) == 300
    assert not any("q quit" in one or "every" in one for one in drawn[1:])


# What is typed


def test_workers_are_ordered_by_any_column_and_the_unknown_come_last() -> None:
    seen = view(
        line(2, staleness=5),
        line(0, staleness=1),
        line(1, staleness=None, state="left"),
        line(3, staleness=9),
    )
    assert ids(seen, State(sort="id")) == [0, 1, 2, 3]
    assert ids(seen, State(sort="stale")) == [3, 2, 0, 1]
    assert ids(seen, State(sort="stale", reverse=True)) == [0, 2, 3, 1]
    for column in COLUMNS:
        if column.letter:
            assert sorted(ids(seen, after(column.letter))) == [0, 1, 2, 3]
            assert after(column.letter).sort == column.name


def test_arrows_go_through_the_columns_and_around() -> None:
    assert after(["right"]).sort == SORTS[1]
    assert after(["left"]).sort == SORTS[-1]
    assert after(["right"] * len(SORTS)).sort == SORTS[0]
    assert after("sr") == replace(State(), sort="stale", reverse=True)
    assert after("srv").reverse is False


def test_workers_are_chosen_by_state_trouble_and_text() -> None:
    seen = view(
        line(0, process="node-a:7"), line(1, state="away", troubled=True), line(12, process="node-b:100")
    )
    assert ids(seen, after("f")) == [0, 12]
    assert ids(seen, after("ff")) == [1]
    assert ids(seen, after("fff")) == [0, 1, 12]
    assert ids(seen, after(["/", *"NODE-B", "enter"])) == [12]
    assert ids(seen, after(["/", "1"])) == [1, 12]
    assert ids(seen, after(["/", *"away"])) == [1]
    assert ids(seen, after(["/", "7", "backspace", "1", "2"])) == [12]


def test_what_is_typed_into_the_filter_is_no_command() -> None:
    state = after(["/", *"qrs ", "left"])
    assert (state.over, state.sort, state.reverse, state.paused, state.text) == (
        *(False, "id", False, False),
        "qrs ",
    )
    assert pressed(state, "escape") == State()
    assert pressed(pressed(state, "enter"), "q").over


def test_scrolling_ends_where_the_workers_do() -> None:
    seen = view(*(line(worker) for worker in range(100)))

    def scrolled(*typed: str) -> State:
        state = settled(State(), seen, 110, 34)
        for key in typed:
            state = settled(pressed(state, key), seen, 110, 34)
        return state

    fits = scrolled().page
    assert fits == 34 - 10
    assert [scrolled(*typed).top for typed in (("down",), ("up",), ("page down",), ("page down", "up"))] == [
        *(1, 0, fits),
        fits - 1,
    ]
    assert scrolled("end").top == scrolled(*["page down"] * 9).top == 100 - fits
    assert scrolled("end", "home").top == 0
    drawn = shown(seen, scrolled("end"))
    assert drawn[-2].split()[0] == "99"
    assert drawn[-1].endswith(f"{101 - fits}-100 of 100")


def test_the_pace_has_an_upper_and_a_lower_end() -> None:
    assert after("+").interval == 0.2
    assert after("-").interval == 1.0
    assert after("+" * 50).interval == INTERVALS[0]
    assert after("-" * 50).interval == INTERVALS[-1]
    assert after("+", State(interval=0.7)).interval == 0.5
    assert after("-", State(interval=3600.0)).interval == 3600.0


def test_help_ends_with_any_key_that_does_nothing_else() -> None:
    assert "the other way round" in "\n".join(shown(view(line(0)), after("?")))
    assert after("?s") == State()
    assert after("?q").over


def test_keys_come_in_pieces() -> None:
    sent = "\x1b[5~"
    for cut in range(1, len(sent)):
        first, rest = keys(sent[:cut], more=True)
        assert (first, keys(rest + sent[cut:])[0]) == ([], ["page up"])
    assert keys("\x1b[99~x") == (["x"], "")
    assert keys("\x1bq") == (["escape", "q"], "")
    assert keys("\x1b[")[0] == []
