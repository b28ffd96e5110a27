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
        packed = _pack(command)
        for piece in (packed,) if isinstance(packed, bytes) else packed:
            if len(piece) > COPY_BYTES:
                yield from _split(b"".join(ready), piece_bytes)
                yield from _split(piece, piece_bytes)
                ready, size = [], 0
            else:
                ready.append(piece)
                size += len(piece)
        if size >= piece_bytes:
            yield from _split(b"".join(ready), piece_bytes)
            ready, size = [], 0
    if ready:
        yield b"".join(ready)


def _pack(command: Sequence[Any]) -> bytes | list[Piece]:
    """Return a packed command, in pieces if one of its arguments is."""
    words = command[0].split()
    for word in command[1:]:
        kind = type(word)
        if kind is str or kind is bytes:
            words.append(word)
        elif kind is tuple:
            return _pack_pieces((*command[0].split(), *command[1:]))
        else:
            words.append(_plain(word))
    pack: Callable[[Any], bytes] = pack_command
    return pack(tuple(words))


def _pack_pieces(words: Sequence[Any]) -> list[Piece]:
    packed: list[Piece] = [b"*%d\r\n" % len(words)]
    for word in words:
        pieces = word if isinstance(word, tuple) else (_plain(word),)
        pieces = tuple(one.encode() if isinstance(one, str) else one for one in pieces)
        packed += (b"$%d\r\n" % sum(map(len, pieces)), *pieces, b"\r\n")
    return packed


def _plain(word: Argument) -> str | bytes:
    """Return an argument as text or bytes: hiredis crashes if a signal handler raises while it packs a number."""
    if isinstance(word, (int, float, str)):
        return str(word)
    if isinstance(word, (bytes, memoryview)):
        return bytes(word)
    raise TypeError(f"{type(word).__name__} cannot be an argument of a command")


def _split(whole: Piece, piece_bytes: int) -> Iterator[Piece]:
    if len(whole) <= piece_bytes:
        if whole:
            yield whole
        return
    view = memoryview(whole)
    for start in range(0, len(whole), piece_bytes):
        yield view[start : start + piece_bytes]
