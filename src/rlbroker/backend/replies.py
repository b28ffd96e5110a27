"""Redis's replies as plain values, whatever shape redis-py gave them: it depends on protocol and version."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

#: As Python writes seconds; no more digits than make sense.
_SECONDS: Final = re.compile(r"[0-9]{1,13}(\.[0-9]{1,17})?(e-[0-9]{2})?")


def text_fields(reply: Any) -> dict[str, str]:
    """Give a hash or a stream entry's fields as text, from a list of pairs or a dictionary of bytes."""
    if isinstance(reply, dict):
        return {_text(name): _text(value) for name, value in reply.items()}
    flat = list(reply or ())
    return {_text(name): _text(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}


def info_fields(reply: bytes) -> dict[str, str]:
    """Give what INFO says, as the server sends it."""
    lines = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


#: Key of a stream, and ids and fields of entries in it.
StreamEntries = tuple[str, list[tuple[str, dict[bytes, bytes] | None]]]


def stream_entries(reply: Any) -> list[StreamEntries]:
    """Give (key, [(entry id, fields), …]) from XREAD or XREADGROUP, whatever shape redis-py chose for them.

    Fields are None for an entry that was deleted while it was pending.
    """
    if not reply:
        return []
    streams = reply.items() if isinstance(reply, dict) else reply
    found = []
    for key, entries in streams:
        # RESP3 wraps the entries of a stream once more, an empty list of them too.
        first = entries[0] if entries else None
        if isinstance(first, list) and (not first or isinstance(first[0], (list, tuple))):
            entries = first
        found.append((_text(key), [(_text(entry_id), _fields(fields)) for entry_id, fields in entries]))
    return found


def _fields(reply: Any) -> dict[bytes, bytes] | None:
    if isinstance(reply, list):  # as the server sends them
        reply = dict(zip(reply[::2], reply[1::2], strict=True))
    return reply or None


def server_seconds(reply: Any) -> float:
    """Give the server's clock from TIME, seconds since the epoch."""
    seconds, microseconds = reply
    return int(seconds) + int(microseconds) / 1e6


def whole_number(text: str) -> int | None:
    """Give a number that a worker wrote; None for anything else, as workers are not trusted."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def number_in(reply: bytes | None) -> int | None:
    """Give the number in a field that a server sent, 0 where there is none; None where that is no number."""
    return whole_number(str(reply or b"0", "ascii", "replace"))


def seconds_number(text: str) -> float | None:
    """Give seconds that a worker wrote; None for anything else, as workers are not trusted."""
    return float(text) if _SECONDS.fullmatch(text) else None


def pending_count(reply: Any) -> int:
    """Give the number of pending entries from XPENDING's summary, in either of redis-py's shapes."""
    return int(reply["pending"] if isinstance(reply, dict) else reply[0])


def consumer_pending(reply: Any, consumers: Collection[str]) -> int:
    """Give how many entries are pending for some consumers, from XPENDING's summary."""
    rows = reply["consumers"] if isinstance(reply, dict) else reply[3] or ()
    pairs = [(row["name"], row["pending"]) if isinstance(row, dict) else row for row in rows]
    return sum(int(count) for name, count in pairs if _text(name) in consumers)


def pending_rows(reply: Any) -> list[tuple[str, str, int, int]]:
    """Give (id, consumer, idle milliseconds, deliveries) from XPENDING with a range."""
    rows = []
    for row in reply or ():
        if isinstance(row, dict):
            row = row["message_id"], row["consumer"], row["time_since_delivered"], row["times_delivered"]
        rows.append((_text(row[0]), _text(row[1]), int(row[2]), int(row[3])))
    return rows


def pending_summary(reply: Any) -> tuple[int, tuple[int, int]]:
    """Give how many entries are pending, and the place of the first, from XPENDING's summary."""
    found = [reply["pending"], reply["min"]] if isinstance(reply, dict) else reply
    return int(found[0]), entry_place(_text(found[1])) if found[1] else (0, 0)


def group_position(reply: Any, group: str) -> tuple[int, int]:
    """Give the place of the last entry that a group has delivered, from XINFO GROUPS."""
    groups = [text_fields(one) for one in reply]
    return next((entry_place(one["last-delivered-id"]) for one in groups if one["name"] == group), (0, 0))


def newest_place(reply: Any) -> tuple[int, int]:
    """Give the place of the last entry that a stream ever had, from XINFO STREAM."""
    return entry_place(text_fields(reply)["last-generated-id"])


def entry_place(entry_id: str | bytes) -> tuple[int, int]:
    """Give an entry's id as what can be compared: for a batch, incarnation and sequence."""
    first, _, second = _text(entry_id).partition("-")
    return int(first), int(second)


def entry_id(text: str) -> str:
    """Give a stream entry's id, checked.

    Raises:
        ValueError: it is none.
    """
    first, second = entry_place(text)
    return f"{first}-{second}"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
