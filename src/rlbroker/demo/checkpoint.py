"""The checkpoint file from which a restarted learner continues training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from rlbroker.errors import InvalidArgument


class Checkpoint:
    """A file with the state of a training run. It is replaced atomically, so it is always complete."""

    def __init__(self, path: Path) -> None:
        """Check that the file can be written. It need not exist.

        Raises:
            InvalidArgument: the file's directory does not exist or is not writable.
        """
        if not os.access(path.absolute().parent, os.W_OK):
            raise InvalidArgument(
                f"the checkpoint cannot be written to {path}: {path.parent} is not a writable directory"
            )
        self._path = path

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last, or None if the file does not exist.

        Raises:
            InvalidArgument: the file is not a checkpoint, or it is damaged.
        """
        if not self._path.exists():
            return None
        try:
            state = torch.load(self._path, weights_only=True)  # refuses pickled code
            return {name: state[name] for name in ("env_id", "policy", "optimizer", "progress", "marks")}
        except Exception as error:
            raise InvalidArgument(
                f"{self._path} is not a checkpoint of `rlbroker learner`, or it is damaged: {error}"
            ) from error

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file's state atomically."""
        temporary = self._path.with_name(f"{self._path.name}.new")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave an empty file
        temporary.replace(self._path)
