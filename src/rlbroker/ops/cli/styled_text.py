"""Text on a terminal: its width in columns, text cut or padded to a width, and text in colour. Pure."""

from __future__ import annotations

#: A part of a line, and its style: names from `_CODES`, such as `bold red`.
Piece = tuple[str, str]

#: Terminal codes by the names that rich gives them.
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
    """Return the number of terminal columns that text takes; East Asian letters and emoji take two each.

    >>> [cell_width(text) for text in ("abc", "世界", "e\\u0301")]
    [3, 4, 1]
    """
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """Return text that takes exactly `width` columns: padded with spaces, or cut with `…` at the end.

    >>> [fit(text, 4) for text in ("ab", "abcde", "世界人")]
    ['ab  ', 'abc…', '世… ']
    >>> fit("7", 3, right=True)
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


def add_style(text: str, style: str) -> str:
    """Return text with the terminal's codes for a style.

    >>> add_style("away", "bold red")
    '\\x1b[1;31maway\\x1b[0m'
    """
    return f"\x1b[{';'.join(_CODES[word] for word in style.split())}m{text}\x1b[0m" if style else text
