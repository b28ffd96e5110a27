"""Loads received weights into a torch module or a dictionary: all of it is changed, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from inspect import CO_VARARGS
from types import FrameType
from typing import Any, Protocol

from rlbroker.codec.foreign import is_empty
from rlbroker.errors import UnsupportedType, WeightsMismatch
from rlbroker.weights.dictionary_write import DictionaryFill, DictionaryWrite
from rlbroker.weights.target_memory import gradients_are_on, turn_gradients


class Write(Protocol):
    """The write of one load: it was checked, and can be repeated."""

    def run(self) -> str:
        """Write everything; return what is wrong with the result, if anything."""

    def undo(self) -> None:
        """Put the old values back. They are saved only if the write can fail."""

    def explain(self, error: Exception) -> str:
        """Return what an error of `run` means."""


def check_target(target: Any) -> None:
    """Raise `UnsupportedType` unless the target is a module or a dictionary."""
    torch = sys.modules.get("torch")
    if not isinstance(target, MutableMapping) and not (torch and isinstance(target, torch.nn.Module)):
        raise UnsupportedType(
            f"weights are loaded into a torch.nn.Module or a dictionary, not a {type(target).__name__}; "
            "give an empty dictionary, which is filled"
        )


def load(weights: Any, target: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Load weights into a target; see `Load`."""
    Load(weights, target, metadata).run()


class Load:
    """One load of weights into a target, which keeps its tensors, arrays and dtypes: all of it is changed, or nothing.

    What can fail is checked before the first write. A write that stops all the same is undone and repeated, and
    completes if an interrupt had stopped it. If it stops again, the model refuses the weights, and its old values are
    put back. They are saved only where the write can fail, as a copy of every model would double the time and the
    memory.

    Attributes:
        target: the module or dictionary.
        done: whether the target has the weights.
    """

    def __init__(self, weights: Any, target: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Prepare a load; nothing is checked or written yet.

        Args:
            weights: the received weights; they are neither changed nor kept.
            target: a `torch.nn.Module` or a dictionary. An empty dictionary is filled; in any other, tensors and
                arrays are overwritten in place and other values are replaced.
            metadata: `_metadata` of the state dict that was sent; None if it had none.
        """
        self.target, self.done = target, False
        self._weights, self._metadata = weights, metadata
        self._fills = isinstance(target, MutableMapping) and is_empty(target)
        #: Kept after an interrupt, as it has the old values.
        self._write: Write | None = None
        self._error: WeightsMismatch | None = None

    def run(self) -> None:
        """Load the weights, or complete a load that was interrupted.

        Raises:
            WeightsMismatch: the weights do not fit; the target is unchanged.
            UnsupportedType: the target is neither a module nor a dictionary.
            BaseException: an interrupt. The weights are loaded if `done`; otherwise `run` must be called again, as the
                target may have a part of them.
        """
        computes_gradients = gradients_are_on()
        try:
            self._attempt()
        except BaseException as error:
            if self._is_verdict(error):
                raise
            self._repeat(error)
            if _is_interrupt(error):
                raise
        finally:
            # An interrupt between the two halves of torch.no_grad(), here or in torch, would leave the thread without.
            turn_gradients(on=computes_gradients)

    def _repeat(self, first: BaseException) -> None:
        """Begin again from the old state, as an interrupt and a failure look alike: torch wraps both."""
        if self.done:
            return
        self._undo()
        try:
            self._attempt()
        except BaseException as second:
            if self._is_verdict(second):
                raise
            self._undo()
            if not isinstance(second, Exception) or _is_interrupt(second):
                raise
            if not _is_interrupt(first):
                self._refuse(self._write.explain(second) if self._write else _describe(second), second)

    def _undo(self) -> None:
        if self._write:
            self._write.undo()

    def _is_verdict(self, error: BaseException) -> bool:
        """Return whether an error says what is wrong with the weights or the target, which has its old values."""
        is_ours = isinstance(error, (WeightsMismatch, UnsupportedType))
        return error is self._error or (self._write is None and is_ours)

    def _attempt(self) -> None:
        if self._error:
            raise self._error
        if self.done:
            return
        if self._write is None:
            self._write = self._plan()
        problem = self._write.run()
        if problem:
            self._write.undo()
            self._refuse(problem)
        self.done = True

    def _plan(self) -> Write:
        """Check the weights and the target."""
        check_target(self.target)
        if not isinstance(self._weights, Mapping):
            raise WeightsMismatch(f"the weights are a {type(self._weights).__name__}, not a dictionary")
        if self._fills:
            return DictionaryFill(self._weights, self.target)
        if isinstance(self.target, MutableMapping):
            return DictionaryWrite(self._weights, self.target)
        from rlbroker.weights.module_write import ModuleWrite  # needs torch, of which the target is a module

        return ModuleWrite(self._weights, self.target, self._metadata)

    def _refuse(self, reason: str, cause: Exception | None = None) -> None:
        """Raise WeightsMismatch, here and in every later call of `run`."""
        self._error = WeightsMismatch(f"the received weights do not fit the model: {reason}")
        raise self._error from cause


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _is_interrupt(error: BaseException) -> bool:
    """Return whether a signal handler raised an error. Only handlers are called with the frame that they interrupt."""
    if not isinstance(error, Exception):
        return True
    place = error.__traceback__
    while place is not None:
        code, values = place.tb_frame.f_code, place.tb_frame.f_locals
        number = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & CO_VARARGS)
        for name in code.co_varnames[:number]:
            value = values.get(name)
            given = value if type(value) is tuple else (value,)  # a handler may not name its arguments
            if FrameType in map(type, given):
                return True
        place = place.tb_next
    return False
