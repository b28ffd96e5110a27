"""Lua scripts, read from the package's `.lua` files. A channel loads those that a server lacks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Self

from rlbroker.backend.resp import Argument

#: A line of a script that is replaced by another file of the package.
_INCLUDE = re.compile(r"^-- include: (\S+)\n", re.MULTILINE)

#: The scripts that were called, for servers that lack them: a replica after a failover, a node to which a slot was
#: moved, or a server that was restarted.
_scripts_by_sha: dict[Any, Script] = {}


@dataclass(frozen=True)
class Script:
    """A Lua script. Every script of rlbroker is idempotent: running it again with the same arguments does no harm."""

    name: str
    text: str

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a script from a path in the package, such as `weights/lua/commit.lua`.

        A line `-- include: PATH` in it is replaced by that file.
        """
        return cls(path.rpartition("/")[2].removesuffix(".lua"), _read(path))

    @cached_property
    def sha(self) -> str:
        """SHA-1 of the text: the name under which the server caches the script."""
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        _scripts_by_sha[sha] = self
        return sha

    def call(self, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> tuple[Argument, ...]:
        """Return the command that runs the script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


@cache
def _read(path: str) -> str:
    text = files("rlbroker").joinpath(path).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: _read(found[1]), text)


def loading_commands(commands: Iterable[Sequence[Any]]) -> list[tuple[str, str]]:
    """Return the commands that load the scripts that some commands call."""
    called = {command[1]: None for command in commands if command[0] == "EVALSHA"}
    return [("SCRIPT LOAD", _scripts_by_sha[sha].text) for sha in called if sha in _scripts_by_sha]
