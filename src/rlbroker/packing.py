"""Commands as the bytes that a server reads, in pieces for a socket: large arguments are not copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

#: A part of an argument, or all of it.
Piece = bytes | memoryview

#: What a command consists of, and one argument in several pieces.
Argument = str | bytes | int | float | memoryview
Pieces = tuple[Piece, ...]

#: Larger pieces are sent from where they are; a smaller one costs less to copy than to send apart.
COPY_BYTES = 128 << 10

#: Shorter arguments are written with their length in one go.
_SHORT_BYTES = 256


def packed(commands: Sequence[Sequence[Argument | Pieces]], *, piece_bytes: int) -> Iterator[Piece]:
    """Give what to send for some commands, in pieces of about so many bytes at most.

    >>> b"".join(packed([("SCRIPT LOAD", 1), ("GET", (b"a", b"b"))], piece_bytes=100))
    b'*3\\r\\n$6\\r\\nSCRIPT\\r\\n$4\\r\\nLOAD\\r\\n$1\\r\\n1\\r\\n*2\\r\\n$3\\r\\nGET\\r\\n$2\\r\\nab\\r\\n'
    """
    ready: list[Piece] = []  # joined before they are sent
    size = 0
    for name, *arguments in commands:
        words: list[Argument | Pieces] = str(name).split()  # type: ignore[assignment] # a list of text
        words += arguments
        ready.append(b"*%d\r\n" % len(words))
        for word in words:
            if not isinstance(word, tuple):
                plain = word.encode() if isinstance(word, str) else word
                if not isinstance(plain, (bytes, memoryview)):
                    plain = repr(plain).encode()
                if len(plain) < _SHORT_BYTES:
                    ready += (b"$%d\r\n" % len(plain), plain, b"\r\n")
                    continue
                word = (plain,)
            ready.append(b"$%d\r\n" % sum(map(len, word)))
            for piece in word:
                if len(piece) > COPY_BYTES:
                    yield b"".join(ready)
                    ready, size = [], 0
                    whole = memoryview(piece)
                    for start in range(0, len(whole), piece_bytes):
                        yield whole[start : start + piece_bytes]
                    continue
                ready.append(piece)
                size += len(piece)
                if size >= piece_bytes:
                    yield b"".join(ready)
                    ready, size = [], 0
            ready.append(b"\r\n")
    if ready:
        yield b"".join(ready)
