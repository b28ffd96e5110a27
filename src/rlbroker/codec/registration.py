"""Makes torch and JAX know `Batch`: as a pytree node, and to `torch.load` as a safe class.

Neither is imported for this. Whichever is imported before rlbroker is told at once, the other one while it is imported
later: a program that resumes calls `torch.load` before it has made a client, and imports may be in any order.
Only a finder on `sys.meta_path` learns of such an import; it finds nothing, and never raises.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from rlbroker.codec.refusals import first_line
from rlbroker.types import Batch

logger = logging.getLogger("rlbroker")


def register_batch() -> None:
    """Register `Batch` with the libraries that are imported, and with others when they are."""
    _WATCHER.register()
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)


class _ImportWatcher:
    """A finder of modules that finds none: it looks at each import whether a library has come."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[str, Callable[[Any], object]]] = {
            "torch.utils._pytree": ("register_pytree_node", _register_torch_node),
            "torch.serialization": ("add_safe_globals", _register_safe_classes),
            "jax.tree_util": ("register_pytree_with_keys", _register_jax_node),
        }

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find nothing; register with the libraries that have been imported since the last call."""
        if name.startswith(("torch", "jax")):
            self.register()

    def register(self) -> None:
        """Register with the libraries that have been imported, once each."""
        for name, (function, register) in list(self._waiting.items()):
            module = sys.modules.get(name)
            if _is_complete(module, function):
                entry = self._waiting.pop(name, None)
                if entry:  # no other thread was faster
                    try:
                        register(module)
                    except Exception as error:  # noqa: BLE001 - it must not end the import of that library
                        logger.warning("%s does not know rlbroker.Batch: %s", name, first_line(error))


def _is_complete(module: Any, function: str) -> bool:
    """Return whether a module has a function, and is not being imported: it may lack what the function needs."""
    try:
        return hasattr(module, function) and not getattr(module.__spec__, "_initializing", False)
    except Exception:  # noqa: BLE001 - a stand-in for the module may do anything
        return False


def _register_safe_classes(serialization: Any) -> None:
    """Let `torch.load(weights_only=True)` read batches, and the arrays of numbers in them."""
    import numpy as np  # torch has imported it; the command line, which needs neither, starts faster

    from rlbroker.codec.dtypes import ML_DTYPES, NUMPY_DTYPES

    scalars: list[type[np.generic]] = []
    with suppress(ImportError):
        import ml_dtypes  # here, because a program that resumes loads before it has met an array of these

        scalars = [getattr(ml_dtypes, name) for name in ML_DTYPES if hasattr(ml_dtypes, name)]
    functions = [np.array(0).__reduce__()[0], np.float32(0).__reduce__()[0]]
    dtypes = {type(dtype) for dtype in (*NUMPY_DTYPES.values(), *map(np.dtype, scalars))}
    serialization.add_safe_globals([Batch, np.ndarray, np.dtype, *functions, *dtypes, *scalars])


def _register_torch_node(pytree: Any) -> None:
    pytree.register_pytree_node(
        Batch,
        lambda batch: (list(batch.values()), list(batch)),
        lambda values, keys: Batch(zip(keys, values, strict=True)),
        serialized_type_name="rlbroker.Batch",
        flatten_with_keys_fn=lambda batch: (
            [(pytree.MappingKey(key), value) for key, value in batch.items()],
            list(batch),
        ),
    )


def _register_jax_node(tree_util: Any) -> None:
    tree_util.register_pytree_with_keys(
        Batch,
        lambda batch: (
            [(tree_util.DictKey(key), batch[key]) for key in _sort_as_jax(batch)],
            _sort_as_jax(batch),
        ),
        lambda keys, values: Batch(zip(keys, values, strict=True)),
        lambda batch: ([batch[key] for key in _sort_as_jax(batch)], _sort_as_jax(batch)),
    )


def _sort_as_jax(keys: Iterable[Any]) -> tuple[Any, ...]:
    """Return keys in the order of JAX, which sorts those of dictionaries; integers come before text."""
    return tuple(sorted(keys, key=lambda key: (isinstance(key, str), key)))


_WATCHER = _ImportWatcher()
