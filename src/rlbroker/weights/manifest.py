"""What the `weights` hash says of the latest version: its stored forms, and the cheapest way to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self

import xxhash

from rlbroker.codec.signing import IMAGE, WEIGHTS, NotSigned, SigningKey
from rlbroker.errors import WireError

#: A chunk is closed once it holds this much. Values of 1 to 4 MB move fastest through Redis.
CHUNK_BYTES = 1 << 20

#: The most deltas that lead from a full version to the latest one, and so the most that a new worker applies.
MAX_DELTAS: Final = 32

#: The most stored forms that a pointer may name; what a reader accepts.
_MAX_FORMS: Final = 1000

#: The most chunks of all of them together; what a reader accepts. It lists them before it asks for the first.
_MAX_CHUNKS: Final = 1 << 20

#: Characters of one hash of a chunk.
HASH_LENGTH: Final = 64

#: Uploads and digests become part of the names of keys and files.
_NAME: Final = re.compile("[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class StoredForm:
    """One way in which a version is stored. Chunk 0 holds the header, chunks 1 to `chunks` its segments.

    Attributes:
        version: which version it is.
        base: the version that it is a difference to; 0 for one that is whole.
        upload: names its chunks: `<version>-<epoch>-<attempt>`, or anything else that is used once.
        chunks: chunks that hold segments.
        stored_bytes: bytes of its chunks, header included.
        digest: xxh3_128 of the header, which holds the digest of each segment.
        hashes: SHA-256 of each chunk, the header's first, joined; empty where nothing is signed.
        signature: of all that, and of the run; empty where nothing is signed.
    """

    version: int
    base: int
    upload: str
    chunks: int
    stored_bytes: int
    digest: str
    hashes: str = field(default="", repr=False)
    signature: str = ""

    def hash_of(self, chunk: int) -> str:
        """Give the hash of a chunk, as it is signed."""
        return self.hashes[chunk * HASH_LENGTH : (chunk + 1) * HASH_LENGTH]

    def signed(self, key: SigningKey, run: str) -> Self:
        """Give this with a signature."""
        return replace(self, signature=key.sign(WEIGHTS, *self._facts(run)))

    def check(self, key: SigningKey, run: str) -> None:
        """Check that a learner with this key has stored it, as this version of this run.

        Raises:
            NotSigned: it did not.
        """
        key.check(self.signature, WEIGHTS, *self._facts(run))
        if len(self.hashes) != (self.chunks + 1) * HASH_LENGTH:
            raise NotSigned("its signature is for another number of chunks")

    def name_of_image(self, key: SigningKey | None, run: str) -> str:
        """Give what the decoded version is called in a cache: no other one has this name.

        With a key nobody can tell it who lacks the key: what is found under it was put there by one who has it.
        """
        if key is None:
            return f"{self.upload}-{self.digest}"
        secret = key.sign(IMAGE, run, self.base, self.upload, self.hashes).partition(":")[2]
        return f"{self.upload}-{secret}"

    def _facts(self, run: str) -> tuple[str | int | bytes, ...]:
        """Give what is signed. The hashes bind each byte that is stored."""
        numbers = self.version, self.base, self.upload, self.chunks, self.stored_bytes
        return run, *numbers, self.digest, self.hashes

    def to_text(self) -> str:
        """Give it as one word, for people and for `from_text`.

        >>> Form(7, 6, "7-1764-2", 1, 512, "c0ffee").to_text()
        '7:6:7-1764-2:1:512:c0ffee'
        """
        return f"{self.version}:{self.base}:{self.upload}:{self.chunks}:{self.stored_bytes}:{self.digest}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read the word that `to_text` made; ValueError for anything else."""
        version, base, upload, chunks, stored_bytes, digest = text.split(":")
        form = cls(int(version), int(base), upload, int(chunks), int(stored_bytes), digest)
        if not 0 <= form.base < form.version or form.chunks < 0 or form.stored_bytes < 0:
            raise ValueError(f"impossible numbers in {text!r:.100}")
        if not _NAME.fullmatch(upload) or not _NAME.fullmatch(digest):
            raise ValueError(f"impossible names in {text!r:.100}")
        return form


@dataclass(frozen=True)
class Manifest:
    """The commit of one version.

    Attributes:
        latest: how the latest version is stored.
        others: what else is there: the full version that a chain of deltas begins with, these deltas, and the
            latest version as a whole where `latest` is a delta.
        raw_bytes: bytes of its tensors.
        chunk_bytes: a chunk was closed once it held this much.
        codec: `blosc2` or `raw`.
        published: when, the learner's clock, seconds since the epoch.
        dropped: what was there before and is to expire.
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
        """Number of the latest version."""
        return self.latest.version

    @property
    def upload(self) -> str:
        """Name of its upload."""
        return self.latest.upload

    @property
    def kind(self) -> Literal["full", "delta"]:
        """Whether it is stored as a difference to the version before."""
        return "delta" if self.latest.base else "full"

    @property
    def base(self) -> int:
        """The version that it is a difference to; 0 for none."""
        return self.latest.base

    @property
    def stored_bytes(self) -> int:
        """Bytes that a worker downloads which has the version before."""
        return self.latest.stored_bytes

    @property
    def forms(self) -> tuple[StoredForm, ...]:
        """Everything that is stored and must stay."""
        return (*self.others, self.latest)

    @property
    def new_forms(self) -> tuple[StoredForm, ...]:
        """How the latest version is stored: as `latest`, and perhaps as a whole too."""
        return tuple(form for form in self.forms if form.version == self.version)

    def signed(self, key: SigningKey, run: str) -> Self:
        """Give the pointer with the latest version signed; what it rests on was signed before."""
        others = (one.signed(key, run) if one.version == self.version else one for one in self.others)
        return replace(self, latest=self.latest.signed(key, run), others=tuple(others))

    def check(self, key: SigningKey, run: str) -> None:
        """Check that a learner with this key has stored everything that it names.

        Raises:
            NotSigned: something was stored by somebody else.
        """
        if not any(form.signature for form in self.forms):
            raise NotSigned(
                "its signature is missing: the learner signs nothing; this process wants signatures: give the learner "
                f"the same key (id {key.id})"
            )
        for form in (self.latest, *self.others):
            form.check(key, run)

    def numbered(self, version: int) -> Self:
        """Give the pointer under another version number."""
        before = self.version
        others = [replace(one, version=version) if one.version == before else one for one in self.others]
        return replace(self, latest=replace(self.latest, version=version), others=tuple(others))

    def to_fields(self) -> dict[str, str]:
        """Give the fields of the hash."""
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
        """Read the fields of the hash; None if nothing was published yet.

        Raises:
            WireError: the hash is not what a learner writes.
        """
        if "version" not in found:
            return None
        try:
            latest = ("version", "base", "upload", "chunks", "stored_bytes", "digest")
            signatures = _signatures(found.get("signatures", ""))
            pointer = cls(
                latest=_with(signatures, StoredForm.from_text(":".join(found[name] for name in latest))),
                others=tuple(_with(signatures, form) for form in _forms(found["others"])),
                raw_bytes=int(found["raw_bytes"]),
                chunk_bytes=int(found["chunk_bytes"]),
                codec=found["codec"],
                published=float(found["published"]),
                dropped=tuple(_with(signatures, form) for form in _forms(found["dropped"])),
            )
            if sum(form.chunks for form in (*pointer.forms, *pointer.dropped)) > _MAX_CHUNKS:
                raise ValueError("too many chunks")
            return pointer
        except (KeyError, ValueError) as error:
            raise WireError(f"the pointer to the latest weights cannot be read: {error!r}") from error

    def path(self, held: int = 0) -> list[StoredForm]:
        """Give what to download and apply, in order, to come to the latest version with the fewest bytes.

        Args:
            held: the version that the worker has decoded already; 0 for none. With the latest there is nothing to do.

        Raises:
            WireError: no way leads there.
        """
        return cheapest_path(self.forms, self.version, held)


def cheapest_path(forms: Iterable[StoredForm], version: int, held: int = 0) -> list[StoredForm]:
    """Give what to download and apply, in order, to come to a version with the fewest bytes; see `Manifest.path`.

    Raises:
        WireError: no way leads there.
    """
    ways: dict[int, tuple[int, list[StoredForm]]] = {0: (0, []), held: (0, [])}
    for form in sorted(forms, key=lambda form: form.version):
        if form.base in ways and form.version != held:
            bytes_before, before = ways[form.base]
            way = bytes_before + form.stored_bytes, [*before, form]
            ways[form.version] = min(ways.get(form.version, way), way, key=lambda way: way[0])
    if version not in ways:
        raise WireError(f"nothing that is stored leads to version {version}")
    return ways[version][1]


def kept(
    latest: StoredForm, whole: StoredForm | None, before: Sequence[StoredForm]
) -> tuple[StoredForm, ...]:
    """Choose what else stays stored once `latest` is published.

    From the newest full version on everything is needed. Of the deltas that lead there, those stay that together
    with the needed ones are smaller than a full version: for workers that are late, and would need that one else.

    Args:
        latest: the new version.
        whole: the same version stored as a whole too, if it is.
        before: what the pointer named until now.
    """
    full = whole or (latest if not latest.base else None)
    found = [whole] if whole else []
    bytes_left, wanted = full.stored_bytes if full else 0, latest.base
    for form in sorted(before, key=lambda form: form.version, reverse=True):
        if full is None and not form.base:
            full, bytes_left = form, form.stored_bytes - sum(one.stored_bytes for one in found)
            found.append(form)
        elif form.base and form.version == wanted:
            if full is not None:
                bytes_left -= form.stored_bytes
                if bytes_left < 0 or len(found) >= MAX_DELTAS:
                    break
            found.append(form)
            wanted = form.base
    return tuple(sorted(found, key=lambda form: form.version))


def needs_whole(latest: StoredForm, before: Sequence[StoredForm]) -> bool:
    """Whether a version that is stored as a difference is due to be stored as a whole too.

    That is so once the differences since the last whole one are many, or twice as large together as it is: a new
    worker downloads at most some three times the bytes of a full version.
    """
    full = max((form for form in before if not form.base), key=lambda form: form.version)
    deltas = [form.stored_bytes for form in before if form.version > full.version] + [latest.stored_bytes]
    return len(deltas) >= MAX_DELTAS or sum(deltas) >= 2 * full.stored_bytes


def group(stored_bytes: Iterable[int], chunk_bytes: int) -> Iterator[range]:
    """Give for each chunk the segments it holds: whole ones, in order, until there is enough.

    Publisher and subscriber do the same sum, so the layout need not be sent.

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
    """Give the digest of a header, as the pointer has it."""
    return xxhash.xxh3_128_hexdigest(header)


def _signatures(text: str) -> dict[str, tuple[str, str]]:
    """Give signature and hashes by upload."""
    words = text.split(" ") if text else []
    if len(words) > 2 * _MAX_FORMS:
        raise ValueError(f"{len(words)} signatures")
    found = {}
    for word in words:
        upload, key_id, signature, hashes = word.split(":")
        found[upload] = f"{key_id}:{signature}", hashes
    return found


def _with(signatures: Mapping[str, tuple[str, str]], form: StoredForm) -> StoredForm:
    signature, hashes = signatures.get(form.upload, ("", ""))
    return replace(form, signature=signature, hashes=hashes) if signature else form


def _forms(text: str) -> tuple[StoredForm, ...]:
    words = text.split(" ") if text else []
    if len(words) > _MAX_FORMS:
        raise ValueError(f"{len(words)} stored forms")
    return tuple(StoredForm.from_text(word) for word in words)
