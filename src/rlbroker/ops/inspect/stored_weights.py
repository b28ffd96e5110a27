"""The stored versions of the weights: their forms, and when these expire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import text_fields
from rlbroker.weights.manifest import Manifest, StoredForm, cheapest_path

#: Replies of PTTL for a missing key, and for a key without expiry.
_MISSING, _PERMANENT = -2, -1


@dataclass(frozen=True)
class FormSummary:
    """One stored form of a version.

    Attributes:
        state: `latest`; `needed` as the base of a delta; `expiring` once newer forms have superseded it; `gone` if a
            chunk of an expiring form is missing; `damaged` if a chunk of another form is missing.
        expires_seconds: time until its first chunk expires; None if none does, or if it is not complete.
        reachable: whether the version can be read: the form is complete, and its bases are reachable.
    """

    form: StoredForm
    state: Literal["latest", "needed", "expiring", "damaged", "gone"]
    expires_seconds: float | None
    reachable: bool


@dataclass(frozen=True)
class StoredWeights:
    """The stored weights of a run.

    Attributes:
        manifest: the manifest of the latest version; None before the first.
        forms: the forms in the manifest by version, including those that are superseded.
    """

    manifest: Manifest | None
    forms: tuple[FormSummary, ...]

    @property
    def versions(self) -> list[int]:
        """The versions that can be read, sorted."""
        return sorted({one.form.version for one in self.forms if one.reachable})

    def path(self, version: int) -> list[StoredForm]:
        """Return the forms to download for a version, in order.

        Raises:
            WireError: the version is not stored (any more).
        """
        return cheapest_path([one.form for one in self.forms if one.reachable], version)


def read_stored_weights(connection: Connection, keys: Keys) -> StoredWeights:
    """Read which versions are stored.

    Raises:
        WireError: the manifest cannot be read.
    """
    manifest = Manifest.from_fields(text_fields(connection.execute("HGETALL", keys.weights)))
    if manifest is None:
        return StoredWeights(None, ())
    forms = sorted((*manifest.dropped, *manifest.forms), key=lambda form: (form.version, form.base))
    chunk_keys = [keys.upload(form.upload, form.chunks) for form in forms]
    ttls = iter(connection.execute_all([("PTTL", key) for names in chunk_keys for key in names]))
    summaries: list[FormSummary] = []
    for form, names in zip(forms, chunk_keys, strict=True):
        form_ttls = [int(next(ttls)) for _ in names]
        complete = _MISSING not in form_ttls
        ends = [ttl / 1000 for ttl in form_ttls if ttl != _PERMANENT]
        summaries.append(
            FormSummary(
                form=form,
                state=_form_state(manifest, form, complete),
                expires_seconds=min(ends, default=None) if complete else None,
                reachable=complete and _has_base(form, summaries),
            )
        )
    return StoredWeights(manifest, tuple(summaries))


def _form_state(
    manifest: Manifest, form: StoredForm, complete: bool
) -> Literal["latest", "needed", "expiring", "damaged", "gone"]:
    if form in manifest.dropped:
        return "expiring" if complete else "gone"
    if not complete:
        return "damaged"
    return "latest" if form.version == manifest.version else "needed"


def _has_base(form: StoredForm, before: Sequence[FormSummary]) -> bool:
    """Return whether a form is full, or its base is reachable; `before` has the forms of all earlier versions."""
    return not form.base or any(one.reachable and one.form.version == form.base for one in before)
