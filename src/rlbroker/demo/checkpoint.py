"""What a learner that is moved, or dies, goes on from: one file, always whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rlbroker.errors import InvalidArgument


class Checkpoint:
    """A file that holds a training run's state."""

    def __init__(self, path: Path) -> None:
        """Name the file, which need not be there.

        Raises:
            InvalidArgument: it could not be written.
        """
        if not os.access(path.absolute().parent, os.W_OK):
            raise InvalidArgument(
                f"no checkpoint can be kept in {path}: {path.parent} is no writable directory"
            )
        self._path = path

    def load(self) -> dict[str, Any] | None:
        """Give what was saved last; None before the first time.

        Raises:
            InvalidArgument: something else is in that file.
        """
        if not self._path.exists():
            return None
        try:
            state = torch.load(self._path, weights_only=True)  # so nothing in it is executed
            return {name: state[name] for name in ("env_id", "policy", "optimizer", "progress", "marks")}
        except Exception as error:
            raise InvalidArgument(
                f"{self._path} is no checkpoint of `rlbroker learner`, or a damaged one: {error}"
            ) from error

    def save(self, state: dict[str, Any]) -> None:
        """Put a newer state in place of the older, in one step."""
        beside = self._path.with_name(f"{self._path.name}.new")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a machine that goes down may leave an empty file under the name
        beside.replace(self._path)
