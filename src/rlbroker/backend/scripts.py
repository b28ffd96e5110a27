"""Lua scripts: read from the package's `.lua` files, with their includes, and known to the server by their hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Self

from rlbroker.backend.resp import Argument

#: A line of a script that stands for another file of the package.
_INCLUDE = re.compile(r"^-- include: (\S+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """A Lua script. Running it again with the same arguments does no harm; this holds for every script of rlbroker."""

    name: str
    text: str

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a script from the package.

        Args:
            path: the file, relative to the package, such as `weights/lua/commit.lua`. A line `-- include: PATH` in it
                is replaced by that file.
        """
        return cls(path.rpartition("/")[2].removesuffix(".lua"), _read(path))

    @cached_property
    def sha(self) -> str:
        """SHA-1 of the text: the name under which the server caches the script."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> tuple[Argument, ...]:
        """Return the command that runs the script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


def _read(path: str) -> str:
    text = files("rlbroker").joinpath(path).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: _read(found[1]), text)
