"""Which versions of the weights are stored, and how; reading changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields
from rlbroker.weights.manifest import Manifest as Manifest
from rlbroker.weights.manifest import StoredForm as StoredForm
from rlbroker.weights.manifest import cheapest_path

#: What PTTL says of a key that is not there, and of one that stays.
_GONE, _STAYS = -2, -1


@dataclass(frozen=True)
class FormSummary:
    """One way in which a version is stored.

    Attributes:
        form: how.
        state: `latest`; `needed`, as others are differences to it; `expiring`, as newer ones have superseded it;
            `damaged` if a part of it is missing though it should stay; `gone` if it should not.
        expires_seconds: how long all of it is still there; None if it stays, or is not whole any more.
        reachable: whether the version can be read from here on: it is whole, and so is what it is a difference to.
    """

    form: StoredForm
    state: Literal["latest", "needed", "expiring", "damaged", "gone"]
    expires_seconds: float | None
    reachable: bool


@dataclass(frozen=True)
class StoredWeights:
    """What is stored of a run's weights.

    Attributes:
        pointer: what the server says of the latest version; None before the first.
        forms: what it names, by version; also what was named before the latest came.
    """

    pointer: Manifest | None
    forms: tuple[FormSummary, ...]

    @property
    def versions(self) -> list[int]:
        """Numbers of the versions that can be read."""
        return sorted({one.form.version for one in self.forms if one.reachable})

    def path(self, version: int) -> list[StoredForm]:
        """Give what to download, in order, to come to a version.

        Raises:
            WireError: it is not stored, or not any more.
        """
        return cheapest_path([one.form for one in self.forms if one.reachable], version)


def look_at_weights(connection: Connection, keys: Keys) -> StoredWeights:
    """Look which versions are stored.

    Raises:
        WireError: the pointer to the latest version cannot be read.
        PeerError: the server refused, or could not be reached in time.
    """
    pointer = Manifest.from_fields(text_fields(connection.execute("HGETALL", keys.weights)))
    if pointer is None:
        return StoredWeights(None, ())
    forms = sorted((*pointer.dropped, *pointer.forms), key=lambda form: (form.version, form.base))
    names = [keys.upload(form.upload, form.chunks) for form in forms]
    left = iter(connection.execute_all([("PTTL", key) for some in names for key in some]))
    found: list[FormSummary] = []
    for form, some in zip(forms, names, strict=True):
        times = [int(next(left)) for _ in some]
        whole = _GONE not in times
        ends = [time / 1000 for time in times if time != _STAYS]
        found.append(
            FormSummary(
                form=form,
                state=_state(pointer, form, whole),
                expires_seconds=min(ends, default=None) if whole else None,
                reachable=whole and _leads(form, found),
            )
        )
    return StoredWeights(pointer, tuple(found))


def _state(
    pointer: Manifest, form: StoredForm, whole: bool
) -> Literal["latest", "needed", "expiring", "damaged", "gone"]:
    if form in pointer.dropped:
        return "expiring" if whole else "gone"
    if not whole:
        return "damaged"
    return "latest" if form.version == pointer.version else "needed"


def _leads(form: StoredForm, before: Sequence[FormSummary]) -> bool:
    """Whether a form is no difference, or one to a version that can be read; earlier versions come first."""
    return not form.base or any(one.reachable and one.form.version == form.base for one in before)
