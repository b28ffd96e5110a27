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

#: Larger pieces are not copied. For a smaller one, a copy costs less than a system call of its own.
COPY_BYTES = 128 << 10

#: An empty argument in RESP.
_EMPTY = b"$0\r\n\r\n"


def pack_commands(commands: Sequence[Sequence[Argument | Pieces]], *, piece_bytes: int) -> Iterator[Piece]:
    """Yield what to send for some commands, in pieces of limited size. Each command's last argument may be in pieces.

    >>> b"".join(pack_commands([("SCRIPT LOAD", 1), ("GET", (b"a", b"b"))], piece_bytes=100))
    b'*3\\r\\n$6\\r\\nSCRIPT\\r\\n$4\\r\\nLOAD\\r\\n$1\\r\\n1\\r\\n*2\\r\\n$3\\r\\nGET\\r\\n$2\\r\\nab\\r\\n'
    """
    ready: list[Piece] = []  # joined before they are sent
    size = 0
    for command in commands:
        *before, last = command
        if not isinstance(last, tuple):
            ready.append(_pack(command))
            size += len(ready[-1])
        else:
            ready.append(_pack((*before, b""))[: -len(_EMPTY)] + b"$%d\r\n" % sum(map(len, last)))
            for piece in last:
                if len(piece) > COPY_BYTES:
                    yield b"".join(ready)
                    ready, size = [], 0
                    whole = memoryview(piece)
                    for start in range(0, len(whole), piece_bytes):
                        yield whole[start : start + piece_bytes]
                else:
                    ready.append(piece)
                    size += len(piece)
            ready.append(b"\r\n")
        if size >= piece_bytes:
            yield from _split(ready, piece_bytes)
            ready, size = [], 0
    yield from _split(ready, piece_bytes)


def _pack(command: Sequence[Any]) -> bytes:
    words: Any = (*command[0].split(), *command[1:])
    pack: Callable[[Any], bytes] = pack_command
    try:
        return pack(words)
    except TypeError:
        return pack(tuple(bytes(word) if isinstance(word, memoryview) else word for word in words))


def _split(ready: list[Piece], piece_bytes: int) -> Iterator[Piece]:
    whole = b"".join(ready)
    if len(whole) <= piece_bytes:
        yield whole
        return
    view = memoryview(whole)
    for start in range(0, len(whole), piece_bytes):
        yield view[start : start + piece_bytes]
