"""How much room text takes on a terminal, and text that takes just so much. Pure."""

from __future__ import annotations

#: A part of a line, and its style.
Piece = tuple[str, str]

#: Colours and weights by the names that rich has for them.
_CODES = {
    "bold": "1",
    "dim": "2",
    "reverse": "7",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}


def cell_width(text: str) -> int:
    """Give the columns that text takes; Asian letters and pictures take two.

    >>> [cell_width(text) for text in ("abc", "世界", "e\\u0301")]
    [3, 4, 1]
    """
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fitted(text: str, width: int, *, right: bool = False) -> str:
    """Give text that takes just so many columns: with spaces behind it, or before it; or cut, which shows.

    >>> [fitted(text, 4) for text in ("ab", "abcde", "世界人")]
    ['ab  ', 'abc…', '世… ']
    >>> fitted("7", 3, right=True)
    '  7'
    """
    missing = width - cell_width(text)
    if missing >= 0:
        return " " * missing + text if right else text + " " * missing
    if width < 1:
        return ""
    if text.isascii():
        return text[: width - 1] + "…"
    from rich.cells import set_cell_size

    return set_cell_size(set_cell_size(text, width - 1).rstrip() + "…", width)


def styled(text: str, style: str) -> str:
    """Give text in a colour, with the codes that terminals understand.

    >>> styled("away", "bold red")
    '\\x1b[1;31maway\\x1b[0m'
    """
    return f"\x1b[{';'.join(_CODES[word] for word in style.split())}m{text}\x1b[0m" if style else text
