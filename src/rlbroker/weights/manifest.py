"""The manifest of the latest version, stored in the hash `weights`: its stored forms, and the cheapest path to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self

import xxhash

from rlbroker.backend.keys import Keys
from rlbroker.backend.replies import stored_integer, stored_seconds
from rlbroker.codec.signing import IMAGE, WEIGHTS, NotSigned, SigningKey
from rlbroker.errors import WireError

#: A chunk is closed once it holds this much. Values of 1 to 4 MB move fastest through Redis.
CHUNK_BYTES = 1 << 20

#: The most deltas between a full version and the latest one, and so the most that a new worker applies.
MAX_DELTAS: Final = 32

#: The most stored forms that a reader accepts in one manifest.
_MAX_FORMS: Final = 1000

#: The most chunks that a reader accepts in one manifest. It lists their keys before it reads the first of them.
_MAX_CHUNKS: Final = 1 << 20

#: Characters of the hash of one chunk.
HASH_LENGTH: Final = 64

#: Uploads and digests become part of the names of keys and files.
_NAME: Final = re.compile("[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class StoredForm:
    """One way in which a version is stored. Chunk 0 holds the header, chunks 1 to `chunks` the segments.

    Attributes:
        version: the version.
        base: the version that this form is a delta to; 0 for a full form.
        upload: the name in the keys of its chunks: `<version>-<epoch>-<attempt>`, or any other unique name.
        chunks: chunks that hold segments.
        stored_bytes: bytes of all its chunks, the header included.
        digest: xxh3_128 of the header, which holds the digest of each segment.
        hashes: SHA-256 of each chunk, the header first, joined; empty without a signing key.
        signature: signature of all of the above and of the run's name; empty without a signing key.
    """

    version: int
    base: int
    upload: str
    chunks: int
    stored_bytes: int
    digest: str
    hashes: str = field(default="", repr=False)
    signature: str = ""

    def chunk_keys(self, keys: Keys) -> list[str]:
        """Return the keys of the header and of the chunks."""
        return keys.upload(self.upload, self.chunks)

    def hash_of(self, chunk: int) -> str:
        """Return the signed hash of a chunk."""
        return self.hashes[chunk * HASH_LENGTH : (chunk + 1) * HASH_LENGTH]

    def signed(self, key: SigningKey, run: str) -> Self:
        """Return a signed copy."""
        return replace(self, signature=key.sign(WEIGHTS, *self._signed_fields(run)))

    def check(self, key: SigningKey, run: str) -> None:
        """Raise `NotSigned` unless this form was signed with the key, for this run."""
        key.check(self.signature, WEIGHTS, *self._signed_fields(run))
        if len(self.hashes) != (self.chunks + 1) * HASH_LENGTH:
            raise NotSigned("its signature is for another number of chunks")

    def name_of_image(self, key: SigningKey | None, run: str) -> str:
        """Return the name of the decoded version in a host cache, unique to this form.

        With a signing key, the name cannot be computed without that key. An image that is found under it was therefore
        written by a process that has the key.
        """
        if key is None:
            return f"{self.upload}-{self.digest}"
        secret = key.sign(IMAGE, run, self.base, self.upload, self.hashes).partition(":")[2]
        return f"{self.upload}-{secret}"

    def _signed_fields(self, run: str) -> tuple[str | int | bytes, ...]:
        """Return what the signature covers. The hashes cover every stored byte."""
        numbers = self.version, self.base, self.upload, self.chunks, self.stored_bytes
        return run, *numbers, self.digest, self.hashes

    def to_text(self) -> str:
        """Return one word that people can read and `from_text` parses.

        >>> StoredForm(7, 6, "7-1764-2", 1, 512, "c0ffee").to_text()
        '7:6:7-1764-2:1:512:c0ffee'
        """
        return f"{self.version}:{self.base}:{self.upload}:{self.chunks}:{self.stored_bytes}:{self.digest}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse what `to_text` returned; raise ValueError for anything else."""
        version, base, upload, chunks, stored_bytes, digest = text.split(":")
        numbers = map(stored_integer, (version, base, chunks, stored_bytes))
        form = cls(next(numbers), next(numbers), upload, next(numbers), next(numbers), digest)
        if not 0 <= form.base < form.version or form.chunks < 0 or form.stored_bytes < 0:
            raise ValueError(f"impossible numbers in {text!r:.100}")
        if not _NAME.fullmatch(upload) or not _NAME.fullmatch(digest):
            raise ValueError(f"impossible names in {text!r:.100}")
        return form


@dataclass(frozen=True)
class Manifest:
    """The latest version and everything that is stored to load it. Writing it is the commit of that version.

    Attributes:
        latest: the stored form of the latest version.
        others: the other forms that stay: the full version at the start of the chain of deltas, these deltas, and the
            full form of the latest version if `latest` is a delta and there is one.
        raw_bytes: bytes of the tensors of the latest version.
        chunk_bytes: a chunk was closed once it held this much.
        codec: `blosc2` or `raw`.
        published: time of publication by the learner's clock, seconds since the epoch.
        dropped: the forms that the manifest before this one named and that expire now.
    """

    latest: StoredForm
    others: tuple[StoredForm, ...]
    raw_bytes: int
    chunk_bytes: int
    codec: str
    published: float
    dropped: tuple[StoredForm, ...] = ()

    @property
    def version(self) -> int:
        """The latest version."""
        return self.latest.version

    @property
    def upload(self) -> str:
        """The name of the latest version's upload."""
        return self.latest.upload

    @property
    def kind(self) -> Literal["full", "delta"]:
        """The kind of the latest version's form."""
        return "delta" if self.latest.base else "full"

    @property
    def base(self) -> int:
        """The version that the latest one is a delta to; 0 for a full one."""
        return self.latest.base

    @property
    def stored_bytes(self) -> int:
        """Bytes that a worker downloads if it has the version before."""
        return self.latest.stored_bytes

    @property
    def forms(self) -> tuple[StoredForm, ...]:
        """All stored forms that stay."""
        return (*self.others, self.latest)

    @property
    def new_forms(self) -> tuple[StoredForm, ...]:
        """The forms of the latest version: `latest`, and possibly a full form as well."""
        return tuple(form for form in self.forms if form.version == self.version)

    def signed(self, key: SigningKey, run: str) -> Self:
        """Return a copy with the forms of the latest version signed; the other forms were signed before."""
        others = (one.signed(key, run) if one.version == self.version else one for one in self.others)
        return replace(self, latest=self.latest.signed(key, run), others=tuple(others))

    def check(self, key: SigningKey, run: str) -> None:
        """Raise `NotSigned` unless every form that stays was signed with the key, for this run."""
        if not any(form.signature for form in self.forms):
            raise NotSigned(
                "its signature is missing: the learner does not sign, but this process requires signatures; give the "
                f"learner the same key (id {key.id})"
            )
        for form in (self.latest, *self.others):
            form.check(key, run)

    def with_version(self, version: int) -> Self:
        """Return a copy in which the latest version has another number."""
        before = self.version
        others = [replace(one, version=version) if one.version == before else one for one in self.others]
        return replace(self, latest=replace(self.latest, version=version), others=tuple(others))

    def to_fields(self) -> dict[str, str]:
        """Return the fields of the hash."""
        return {
            "version": str(self.version),
            "upload": self.upload,
            "kind": self.kind,
            "base": str(self.latest.base),
            "raw_bytes": str(self.raw_bytes),
            "stored_bytes": str(self.stored_bytes),
            "chunks": str(self.latest.chunks),
            "chunk_bytes": str(self.chunk_bytes),
            "digest": self.latest.digest,
            "codec": self.codec,
            "published": f"{self.published:.3f}",
            "others": " ".join(form.to_text() for form in self.others),
            "dropped": " ".join(form.to_text() for form in self.dropped),
            "signatures": " ".join(
                f"{form.upload}:{form.signature}:{form.hashes}"
                for form in (*self.forms, *self.dropped)
                if form.signature
            ),
        }

    @classmethod
    def from_fields(cls, found: Mapping[str, str]) -> Self | None:
        """Parse the fields of the hash; return None if nothing was published yet.

        Raise `WireError` for fields that no learner writes.
        """
        if "version" not in found:
            return None
        try:
            latest = ("version", "base", "upload", "chunks", "stored_bytes", "digest")
            signatures = _parse_signatures(found.get("signatures", ""))
            manifest = cls(
                latest=_add_signature(
                    StoredForm.from_text(":".join(found[name] for name in latest)), signatures
                ),
                others=_parse_forms(found["others"], signatures),
                raw_bytes=stored_integer(found["raw_bytes"]),
                chunk_bytes=stored_integer(found["chunk_bytes"]),
                codec=found["codec"],
                published=stored_seconds(found["published"]),
                dropped=_parse_forms(found["dropped"], signatures),
            )
            if sum(form.chunks for form in (*manifest.forms, *manifest.dropped)) > _MAX_CHUNKS:
                raise ValueError("too many chunks")
            return manifest
        except (KeyError, ValueError) as error:
            raise WireError(f"the manifest of the latest weights cannot be read: {error!r}") from error

    def path(self, from_version: int = 0) -> list[StoredForm]:
        """Return the forms to download and apply, in order, that lead to the latest version with the fewest bytes.

        Args:
            from_version: the version that the worker has decoded; 0 for none. From the latest the path is empty.

        Raises:
            WireError: no stored form leads there.
        """
        return cheapest_path(self.forms, self.version, from_version)


def cheapest_path(forms: Iterable[StoredForm], version: int, from_version: int = 0) -> list[StoredForm]:
    """Return the forms that lead to a version with the fewest bytes; see `Manifest.path`.

    Raises:
        WireError: no stored form leads there.
    """
    paths: dict[int, tuple[int, list[StoredForm]]] = {0: (0, []), from_version: (0, [])}
    for form in sorted(forms, key=lambda form: form.version):
        if form.base in paths and form.version != from_version:
            bytes_before, before = paths[form.base]
            path = bytes_before + form.stored_bytes, [*before, form]
            paths[form.version] = min(paths.get(form.version, path), path, key=lambda path: path[0])
    if version not in paths:
        raise WireError(f"no stored form leads to version {version}")
    return paths[version][1]


def choose_others(
    latest: StoredForm, full: StoredForm | None, before: Sequence[StoredForm]
) -> tuple[StoredForm, ...]:
    """Choose which forms stay besides `latest` once it is published.

    The newest full form and all deltas after it are needed. Older deltas stay as long as they and the needed ones are
    together smaller than a full version: without them, a worker that is behind would download a full version.

    Args:
        latest: the new version's form.
        full: the new version's full form, if it is stored as a delta and in full.
        before: the forms of the previous manifest.
    """
    newest_full = full or (latest if not latest.base else None)
    others = [full] if full else []
    bytes_left, wanted = newest_full.stored_bytes if newest_full else 0, latest.base
    for form in sorted(before, key=lambda form: form.version, reverse=True):
        if newest_full is None and not form.base:
            newest_full, bytes_left = form, form.stored_bytes - sum(one.stored_bytes for one in others)
            others.append(form)
        elif form.base and form.version == wanted:
            if newest_full is not None:
                bytes_left -= form.stored_bytes
                if bytes_left < 0 or len(others) >= MAX_DELTAS:
                    break
            others.append(form)
            wanted = form.base
    return tuple(sorted(others, key=lambda form: form.version))


def needs_full(latest: StoredForm, before: Sequence[StoredForm]) -> bool:
    """Return whether a version that is stored as a delta must be stored as a full one too.

    It must be when there are many deltas since the last full form, or when they are twice as large as that form. So a
    new worker downloads at most about three times the bytes of a full version.
    """
    full = max((form for form in before if not form.base), key=lambda form: form.version)
    deltas = [form.stored_bytes for form in before if form.version > full.version] + [latest.stored_bytes]
    return len(deltas) >= MAX_DELTAS or sum(deltas) >= 2 * full.stored_bytes


def group(stored_bytes: Iterable[int], chunk_bytes: int) -> Iterator[range]:
    """Yield the segments of each chunk: whole segments, in order, until the chunk has `chunk_bytes`.

    Learner and worker compute the same ranges, so they are not stored.

    >>> list(group([4, 1, 1, 1, 5], chunk_bytes=3))
    [range(0, 1), range(1, 4), range(4, 5)]
    """
    first, size, last = 0, 0, -1
    for last, nbytes in enumerate(stored_bytes):
        size += nbytes
        if size >= chunk_bytes:
            yield range(first, last + 1)
            first, size = last + 1, 0
    if first <= last:
        yield range(first, last + 1)


def digest_of(header: bytes | memoryview) -> str:
    """Return the digest of a header, as in manifests."""
    return xxhash.xxh3_128_hexdigest(header)


def _parse_signatures(text: str) -> dict[str, tuple[str, str]]:
    """Return signature and hashes by upload."""
    words = text.split(" ") if text else []
    if len(words) > 2 * _MAX_FORMS:
        raise ValueError(f"{len(words)} signatures")
    found = {}
    for word in words:
        upload, key_id, signature, hashes = word.split(":")
        found[upload] = f"{key_id}:{signature}", hashes
    return found


def _parse_forms(text: str, signatures: Mapping[str, tuple[str, str]]) -> tuple[StoredForm, ...]:
    words = text.split(" ") if text else []
    if len(words) > _MAX_FORMS:
        raise ValueError(f"{len(words)} stored forms")
    return tuple(_add_signature(StoredForm.from_text(word), signatures) for word in words)


def _add_signature(form: StoredForm, signatures: Mapping[str, tuple[str, str]]) -> StoredForm:
    signature, hashes = signatures.get(form.upload, ("", ""))
    return replace(form, signature=signature, hashes=hashes) if signature else form
