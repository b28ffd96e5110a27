"""Commands in RESP, the server's protocol, in pieces for a socket: large arguments are not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hiredis import pack_command

#: A part of an argument, or all of it.
Piece = bytes | memoryview

#: An argument of a command, and one in several pieces.
Argument = str | bytes | int | float | memoryview
Pieces = tuple[Piece, ...]

#: A command with its arguments.
Command = Sequence[Argument | Pieces]

#: Larger pieces are not copied. For a smaller one, a copy costs less than a system call of its own.
COPY_BYTES = 128 << 10


def pack_commands(commands: Sequence[Command], *, piece_bytes: int) -> Iterator[Piece]:
    """Yield what to send for some commands, in pieces of limited size.

    >>> b"".join(pack_commands([("SCRIPT LOAD", 1), ("GET", (b"a", b"b"))], piece_bytes=100))
    b'*3\\r\\n$6\\r\\nSCRIPT\\r\\n$4\\r\\nLOAD\\r\\n$1\\r\\n1\\r\\n*2\\r\\n$3\\r\\nGET\\r\\n$2\\r\\nab\\r\\n'
    """
    ready: list[Piece] = []  # joined before they are sent
    size = 0
    for command in commands:
        for piece in _pack(command):
            if len(piece) > COPY_BYTES and isinstance(piece, memoryview):
                yield from _split(b"".join(ready), piece_bytes)
                ready, size = [], 0
                yield from _split(piece, piece_bytes)
            else:
                ready.append(piece)
                size += len(piece)
        if size >= piece_bytes:
            yield from _split(b"".join(ready), piece_bytes)
            ready, size = [], 0
    yield from _split(b"".join(ready), piece_bytes)


def _pack(command: Sequence[Any]) -> Sequence[Piece]:
    words = (*command[0].split(), *command[1:])
    pack: Callable[[Any], bytes] = pack_command
    try:
        return (pack(tuple([one if one.__class__ in _PLAIN else _plain(one) for one in words])),)
    except _InPieces:
        packed: list[Piece] = [b"*%d\r\n" % len(words)]
        for word in words:
            pieces = word if isinstance(word, tuple) else (_encoded(word),)
            packed += (b"$%d\r\n" % sum(map(len, pieces)), *map(_view_if_large, pieces), b"\r\n")
        return packed


#: What hiredis packs safely. It crashes if a signal handler raises an exception while it packs a number.
_PLAIN = frozenset((str, bytes))


class _InPieces(Exception):
    """A command has an argument in pieces."""


def _plain(word: Argument | Pieces) -> str | bytes:
    if isinstance(word, tuple):
        raise _InPieces
    if isinstance(word, (str, int, float)):
        return str(word)
    if isinstance(word, (bytes, memoryview)):
        return bytes(word)
    raise TypeError(f"{type(word).__name__} cannot be an argument of a command")


def _encoded(word: Argument) -> bytes:
    plain = _plain(word)
    return plain.encode() if isinstance(plain, str) else plain


def _view_if_large(piece: Piece) -> Piece:
    return memoryview(piece) if len(piece) > COPY_BYTES else piece


def _split(whole: Piece, piece_bytes: int) -> Iterator[Piece]:
    if len(whole) <= piece_bytes:
        if whole:
            yield whole
        return
    view = memoryview(whole)
    for start in range(0, len(whole), piece_bytes):
        yield view[start : start + piece_bytes]
