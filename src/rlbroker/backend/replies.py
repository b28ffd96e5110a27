"""Parses Redis's replies into plain values, for every protocol and version, and checks untrusted data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import redis

from rlbroker.errors import InvalidArgument, PeerError, RlbrokerError, WireError, WrongKeyType, raise_again

#: A number of seconds as Python writes it, with a reasonable number of digits.
_SECONDS: Final = re.compile(r"[0-9]{1,13}(\.[0-9]{1,17})?(e-[0-9]{2})?")

#: Two numbers of 64 bits.
_LONGEST_ID: Final = 41

#: How much of an error's text a message repeats.
_SHOWN_CHARACTERS: Final = 120

#: The key of a stream, with the id and the fields of each entry.
StreamEntries = tuple[str, list[tuple[str, dict[bytes, bytes] | None]]]

# Shapes: redis-py returns lists or dictionaries, depending on protocol and version.


def shaped(client: redis.Redis, command: Sequence[Any], reply: Any) -> Any:
    """Return a raw reply in the shape that redis-py's client would return, such as a dictionary; INFO stays text."""
    if command[0] == "INFO" or isinstance(reply, PeerError):
        return reply
    shapes: Any = client.response_callbacks
    shape = shapes.get(command[0])
    if shape is None:
        return reply
    if command[0] == "XPENDING" and len(command) > 3:  # with a range it lists entries, without one a summary
        return shape(reply, parse_detail=True)
    return shape(reply)


def text_fields(reply: Any) -> dict[str, str]:
    """Return the fields of a hash or stream entry as text, from a flat list of pairs or a dictionary of bytes."""
    if isinstance(reply, dict):
        return {_text(name): _text(value) for name, value in reply.items()}
    flat = list(reply or ())
    return {_text(name): _text(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}


def info_fields(reply: bytes) -> dict[str, str]:
    """Return the fields of an INFO reply, from the text that the server sends."""
    lines = (line.partition(":") for line in reply.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def stream_entries(reply: Any) -> list[StreamEntries]:
    """Return (key, [(entry id, fields), …]) from a reply to XREAD or XREADGROUP.

    Fields are None for an entry that was deleted while it was pending.
    """
    if not reply:
        return []
    streams = reply.items() if isinstance(reply, dict) else reply
    found = []
    for key, entries in streams:
        # RESP3 wraps the entries of a stream in one more list, even if there are none.
        first = entries[0] if entries else None
        if isinstance(first, list) and (not first or isinstance(first[0], (list, tuple))):
            entries = first
        found.append((_text(key), [(_text(entry_id), _fields(fields)) for entry_id, fields in entries]))
    return found


def _fields(reply: Any) -> dict[bytes, bytes] | None:
    if isinstance(reply, list):  # the raw reply of the server
        reply = dict(zip(reply[::2], reply[1::2], strict=True))
    return reply or None


def server_seconds(reply: Any) -> float:
    """Return the server's clock from a reply to TIME, in seconds since the Unix epoch."""
    seconds, microseconds = reply
    return int(seconds) + int(microseconds) / 1e6


def pending_count(reply: Any) -> int:
    """Return the number of pending entries from XPENDING's summary."""
    return int(reply["pending"] if isinstance(reply, dict) else reply[0])


def consumer_pending(reply: Any, consumers: Collection[str]) -> int:
    """Return how many entries are pending for some consumers, from XPENDING's summary."""
    rows = reply["consumers"] if isinstance(reply, dict) else reply[3] or ()
    pairs = [(row["name"], row["pending"]) if isinstance(row, dict) else row for row in rows]
    return sum(int(count) for name, count in pairs if _text(name) in consumers)


def pending_rows(reply: Any) -> list[tuple[str, str, int, int]]:
    """Return (entry id, consumer, idle milliseconds, deliveries) from a reply to XPENDING with a range."""
    rows = []
    for row in reply or ():
        if isinstance(row, dict):
            row = row["message_id"], row["consumer"], row["time_since_delivered"], row["times_delivered"]
        rows.append((_text(row[0]), _text(row[1]), int(row[2]), int(row[3])))
    return rows


def pending_summary(reply: Any) -> tuple[int, tuple[int, int]]:
    """Return the number of pending entries and the place of the first, from XPENDING's summary."""
    found = [reply["pending"], reply["min"]] if isinstance(reply, dict) else reply
    return int(found[0]), entry_place(_text(found[1])) if found[1] else (0, 0)


def group_position(reply: Any, group: str) -> tuple[int, int]:
    """Return the place of the last entry delivered to a consumer group, from a reply to XINFO GROUPS."""
    positions = {one["name"]: one["last-delivered-id"] for one in map(text_fields, reply)}
    return entry_place(positions[group]) if group in positions else (0, 0)


def newest_place(reply: Any) -> tuple[int, int]:
    """Return the place of the newest entry ever added to a stream, from a reply to XINFO STREAM."""
    return entry_place(text_fields(reply)["last-generated-id"])


def entry_place(entry_id: str | bytes) -> tuple[int, int]:
    """Return an entry's id as a pair that can be compared: for a batch, its incarnation and sequence number."""
    text = _text(entry_id)
    if len(text) > _LONGEST_ID or not text.isascii():
        raise ValueError(f"{text!r:.40} is not the id of an entry")
    first, _, second = text.partition("-")
    return int(first), int(second)


def entry_id(text: str) -> str:
    """Return a stream entry's id in its normal form; raise ValueError if the text is not an entry id."""
    first, second = entry_place(text)
    return f"{first}-{second}"


# Values that a worker or another program wrote, which are not trusted.


def whole_number(text: str) -> int | None:
    """Return the number in a text that a worker wrote; None unless it is a number of at most 19 digits."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def number_in(reply: bytes | None) -> int | None:
    """Return the number in a field's value, 0 if the field is missing; None if the value is not a number."""
    return whole_number(str(reply or b"0", "ascii", "replace"))


def stored_integer(value: str | bytes | int | None, default: int | None = None) -> int:
    """Return the number in a field's value, or the default for a missing field.

    This and `stored_seconds` are the only readers of numbers that the learner or rlbroker's scripts wrote, and that
    must be right. Use them within `parsing`.

    Raises:
        ValueError: the value is not a whole number of at most 19 digits, or it is missing and there is no default.
    """
    if value is None and default is not None:
        return default
    number = whole_number(_text(value))
    if number is None:
        raise ValueError(f"{_text(value)!r:.40} is not a whole number")
    return number


def stored_seconds(value: str | bytes | float | None) -> float:
    """Return the number of seconds in a field's value.

    Raises:
        ValueError: the value is not a plain number.
    """
    number = seconds_number(_text(value))
    if number is None:
        raise ValueError(f"{_text(value)!r:.40} is not a number of seconds")
    return number


def seconds_number(text: str) -> float | None:
    """Return the seconds in a text that a worker wrote; None if it is not a plain number."""
    return float(text) if _SECONDS.fullmatch(text) else None


@contextmanager
def parsing(key: str) -> Iterator[None]:
    """Turn errors in parsing a key's value within this block into `WireError`: another program wrote the value."""
    try:
        yield
    except InvalidArgument as error:  # settings that no learner accepts
        raise _foreign_data(key, error) from error
    except RlbrokerError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise _foreign_data(key, error) from error


def _foreign_data(key: str, error: Exception) -> WireError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return WireError(
        f"{key} holds data that rlbroker does not write ({reason[:_SHOWN_CHARACTERS]}); another program uses this key"
    )


def default_if_wrong_type(reply: Any, default: Any) -> Any:
    """Return the reply about a key that a worker writes, or the default if the key has the wrong type.

    Raise any other `PeerError`.
    """
    if isinstance(reply, WrongKeyType):
        return default
    if isinstance(reply, PeerError):
        raise_again(reply)
    return reply


def raise_first_error(replies: Iterable[Any]) -> list[Any]:
    """Return the replies as a list, or raise the first `PeerError` among them."""
    found = list(replies)
    refusal = first_error(found)
    if refusal is not None:
        raise_again(refusal)
    return found


def first_error(replies: Iterable[Any]) -> PeerError | None:
    """Return the first `PeerError` among replies, if there is one.

    A loop: an interrupt while a generator is deleted would be lost.
    """
    for reply in replies:
        if isinstance(reply, PeerError):
            return reply
    return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
