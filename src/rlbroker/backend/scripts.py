"""Lua scripts: read from the package's `.lua` files, and loaded into the servers' script caches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Self

from rlbroker.backend.error_mapping import missing_scripts_error
from rlbroker.backend.resp import Argument
from rlbroker.errors import AccessDenied

#: Sends a command to one server, and returns the reply.
SendCommand = Callable[[Sequence[Argument]], Any]

#: A line of a script that is replaced by another file of the package.
_INCLUDE = re.compile(r"^-- include: (\S+)\n", re.MULTILINE)


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
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], arguments: Sequence[Argument] = ()) -> tuple[Argument, ...]:
        """Return the command that runs the script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


@cache
def _read(path: str) -> str:
    text = files("rlbroker").joinpath(path).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: _read(found[1]), text)


class ScriptLoader:
    """Loads scripts into the caches of servers, and remembers the scripts that a connection has used.

    A server may lack a script that was loaded before: a replica after a failover, a node to which a slot was moved, or
    a server that was restarted.
    """

    def __init__(self, address: str) -> None:
        """Start with no scripts. The address names the servers in messages."""
        self._address = address
        self._used: dict[str, Script] = {}

    @property
    def used(self) -> list[Script]:
        """The scripts that the connection has used."""
        return list(self._used.values())

    def remember(self, script: Script) -> None:
        """Note a script that is about to run."""
        self._used[script.sha] = script

    def load(self, send: SendCommand, scripts: Iterable[Script]) -> None:
        """Load scripts into the cache of the server that `send` sends to."""
        for script in scripts:
            send(("SCRIPT LOAD", script.text))

    def load_missing(self, send: SendCommand, scripts: Sequence[Script]) -> None:
        """Load scripts into the cache of a server that lacks any of them."""
        if not all(send(("SCRIPT EXISTS", *(script.sha for script in scripts)))):
            self.load(send, scripts)

    def reload(self, send: SendCommand) -> None:
        """Load the used scripts into the cache of a server that lacks one; raise `RunLost` if this user may not."""
        try:
            self.load(send, self.used)
        except AccessDenied as error:
            raise missing_scripts_error(self._address) from error
