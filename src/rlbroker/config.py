"""Settings: what callers may choose, checked once, and the only place that reads the environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Self, get_args

from rlbroker.errors import InvalidArgument

#: What a sender does when its queue is full.
WhenFull = Literal["block", "drop_oldest", "drop_newest"]

#: What a batch must have reached before it counts as safe.
Level = Literal["redis", "replica", "fsync", "learner"]

#: When a batch that `collect_experiences` returned counts as done.
Acknowledge = Literal["next", "manual"]

#: Whether, and in which directory, the processes of one host share weights.
HostCacheSetting = bool | str | Path

#: A key itself, or the file that holds it.
SigningKeySetting = str | bytes | Path

DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_RUN = "default"
URL_VARIABLES = ("RLBROKER_REDIS_URL", "REDIS_URL")
RUN_VARIABLE = "RLBROKER_RUN"

#: Who we are to the server, where its URL does not say it.
USERNAME_VARIABLE = "RLBROKER_REDIS_USERNAME"
PASSWORD_VARIABLE = "RLBROKER_REDIS_PASSWORD"
PASSWORD_FILE_VARIABLE = "RLBROKER_REDIS_PASSWORD_FILE"

#: Files for `rediss://`, where the URL does not name them.
TLS_CA_VARIABLE = "RLBROKER_TLS_CA_FILE"
TLS_CERTIFICATE_VARIABLE = "RLBROKER_TLS_CERTIFICATE_FILE"
TLS_KEY_VARIABLE = "RLBROKER_TLS_KEY_FILE"
TLS_VARIABLES = (TLS_CA_VARIABLE, TLS_CERTIFICATE_VARIABLE, TLS_KEY_VARIABLE)

#: The file with the key that signs weights and commands.
SIGNING_KEY_VARIABLE = "RLBROKER_SIGNING_KEY_FILE"

#: A shorter key could be guessed; `openssl rand -hex 32` makes 64 characters.
MIN_SIGNING_KEY_BYTES = 32

#: Set by a command that took a URL with a password out of its arguments.
URL_TYPED_VARIABLE = "RLBROKER_URL_TYPED"

#: Worker ids stay below this bound, so that a typing error cannot create lists of millions.
MAX_WORKER_ID = 65_535

#: The learner waits on each shard by a connection of its own.
MAX_SHARDS = 64

#: Longest time that a setting may name: about thirty years.
MAX_SECONDS = 1_000_000_000

#: Shortest lease, and shortest time after which a learner's batches go to another: signs of life take time.
MIN_LEASE_SECONDS = 0.1
MIN_TAKE_OVER_SECONDS = 0.5

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunSettings:
    """What the learner decides for the whole run; workers read it from the run's `meta` hash.

    Attributes:
        max_queue_size: batches that may wait in one worker's queue.
        max_queue_bytes: bytes of one worker's queue, batches in the learner's hands included.
        when_full: what a worker does when its queue is full, unless it chooses for itself.
        lease_seconds: a worker that was silent for longer is `away`.
        forget_seconds: a worker that was silent for longer no longer belongs to the run.
    """

    max_queue_size: int = 1000
    max_queue_bytes: int = 256 << 20
    when_full: WhenFull = "block"
    lease_seconds: float = 5.0
    forget_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        positive_int("max_queue_size", self.max_queue_size)
        positive_int("max_queue_bytes", self.max_queue_bytes)
        positive_seconds("lease_seconds", self.lease_seconds)
        positive_seconds("forget_seconds", self.forget_seconds)
        choice("when_full", self.when_full, get_args(WhenFull))
        if self.lease_seconds < MIN_LEASE_SECONDS:
            raise InvalidArgument(
                f"lease_seconds must be at least {MIN_LEASE_SECONDS:g}, as workers cannot give signs of life more "
                f"often; got {self.lease_seconds!r}"
            )
        if self.forget_seconds < self.lease_seconds:
            raise InvalidArgument("forget_seconds must not be shorter than lease_seconds")

    def to_fields(self) -> dict[str, str]:
        """Give the fields of the `meta` hash that carry these settings."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_fields(cls, found: Mapping[str, str]) -> Self:
        """Read the settings back from the fields of the `meta` hash; what is missing keeps its default."""
        kinds = {"int": int, "float": float}
        return cls(
            **{
                field.name: kinds.get(str(field.type), str)(found[field.name])
                for field in fields(cls)
                if field.name in found
            }
        )


@dataclass(frozen=True)
class SamplesPerInsert:
    """How often each batch is to be sampled, on average.

    Attributes:
        ratio: samples for each inserted batch; above 0.
        min_size: batches that must be inserted before the first sample; at least 1.
        error_buffer: how far sampling may run ahead of inserting, or behind, in samples. At least
            `max(1, ratio)`, and `(n + ratio) / 2` where n samples are drawn at once: otherwise both sides could
            come to wait for each other.
    """

    ratio: float
    min_size: int
    error_buffer: float

    def __post_init__(self) -> None:
        """Refuse settings with which both sides could come to wait for each other."""
        for name in ("ratio", "error_buffer"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InvalidArgument(
                    f"samples_per_insert: {name} must be a finite number above 0; got {value!r}"
                )
        whole = isinstance(self.min_size, int) and not isinstance(self.min_size, bool)
        if not whole or self.min_size < 1:
            raise InvalidArgument(
                f"samples_per_insert: min_size must be an integer of at least 1; got {self.min_size!r}"
            )
        least = max(1.0, self.ratio)
        if self.error_buffer < least:
            raise InvalidArgument(
                f"samples_per_insert: error_buffer must be at least max(1, ratio) = {least:g}; got "
                f"{self.error_buffer!r}, with which inserting and sampling would wait for each other"
            )


def redis_username() -> str | None:
    """Give who we are to the server, where its URL does not say it."""
    return os.environ.get(USERNAME_VARIABLE) or None


def redis_password() -> str | None:
    """Give the password for a server whose URL has none, from the environment or from the file that it names.

    Raises:
        InvalidArgument: it names both, or the file cannot be used.
    """
    password, path = os.environ.get(PASSWORD_VARIABLE), os.environ.get(PASSWORD_FILE_VARIABLE)
    if not path:
        return password or None
    if password:
        raise InvalidArgument(
            f"{PASSWORD_VARIABLE} and {PASSWORD_FILE_VARIABLE} are both set; unset one of them"
        )
    try:
        found = _secret_in(Path(path), PASSWORD_FILE_VARIABLE).decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"{PASSWORD_FILE_VARIABLE}: {path} is not text") from None
    if "\n" in found:
        raise InvalidArgument(
            f"{PASSWORD_FILE_VARIABLE}: {path} has more than one line; it must hold the password and nothing else"
        )
    return found


def _secret_in(path: Path, setting: str) -> bytes:
    """Give what a file holds; its last newline does not count. The setting is what names it, for errors."""
    try:
        found = path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise InvalidArgument(f"{setting}: cannot read {path}: {error.strerror or error}") from None
    if not found:
        raise InvalidArgument(f"{setting}: {path} is empty")
    return found


def tls_files() -> dict[str, str]:
    """Give the files that the environment names for TLS, by variable."""
    return {name: os.environ[name] for name in TLS_VARIABLES if os.environ.get(name)}


def signing_secret(given: SigningKeySetting | None = None) -> bytes | None:
    """Give the key that signs weights and commands: the argument, else what RLBROKER_SIGNING_KEY_FILE names.

    Args:
        given: the key itself as text or bytes, or the path of a file with it, whose last newline does not count.

    Raises:
        InvalidArgument: the key is too short, or its file cannot be used.
    """
    setting, path = "signing_key", given
    if given is None:
        found = os.environ.get(SIGNING_KEY_VARIABLE)
        if not found:
            return None
        setting, path = SIGNING_KEY_VARIABLE, Path(found)
    if isinstance(path, Path):
        key = _secret_in(path, setting)
    elif isinstance(path, str | bytes):
        key = path.encode() if isinstance(path, str) else path
    else:  # not the value itself: it may be a key of another type
        raise InvalidArgument(f"{setting} must be text, bytes or a Path; got {type(path).__name__}")
    if len(key) < MIN_SIGNING_KEY_BYTES:
        raise InvalidArgument(
            f"{setting}: a key has at least {MIN_SIGNING_KEY_BYTES} bytes, and this one {len(key)}; "
            "`openssl rand -hex 32` makes one (text is the key itself; a file is named by a Path)"
        )
    return key


def colors_wanted() -> bool:
    """Whether the environment allows colours on a terminal: it has them, and NO_COLOR does not ask for none."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def url_variable() -> str | None:
    """Give the environment variable that holds the server's URL; None if none does."""
    return next((name for name in URL_VARIABLES if os.environ.get(name)), None)


def default_url() -> str:
    """Return the server's URL from the environment, or that of localhost."""
    variable = url_variable()
    return os.environ[variable] if variable else DEFAULT_URL


def url_was_typed() -> bool:
    """Whether the URL in the environment came from the command line, whose variable a shell does not know."""
    return bool(os.environ.get(URL_TYPED_VARIABLE))


def redacted_url(url: str) -> str:
    """Give the URL without user, password and query, fit for logs and errors, also if it is malformed.

    >>> redacted_url("redis://me:secret@host:6379/0?socket_timeout=1")
    'redis://host:6379/0'
    """
    scheme, colon, rest = url.partition("://")
    if not colon:  # it is no URL, and what is in it nobody knows
        return "…" if "@" in url else url
    before, _, query = rest.partition("?")
    if "@" in query:  # part of a password, or of a parameter
        return f"{scheme}://…"
    # A password may hold an @ or a / that should have been escaped.
    return scheme + colon + before.rpartition("@")[2]


def run_name(run: str, *, what: str = "run") -> str:
    """Check the name of a run, which becomes part of every key, or of a learner.

    Raises:
        InvalidArgument: it is not 1 to 100 letters, digits, dots, dashes and underscores.
    """
    if not isinstance(run, str) or not is_run_name(run):
        # It may be a URL in the wrong place, with a password in it.
        shown = redacted_url(run) if isinstance(run, str) and "://" in run else run
        raise InvalidArgument(
            f"{what} must be 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit; got {shown!r}"
        )
    return run


def run_from_environment() -> str | None:
    """Give the name of the run that a command is about if its `--run` is left out: RLBROKER_RUN; None without it.

    Raises:
        InvalidArgument: it cannot be the name of a run.
    """
    run = os.environ.get(RUN_VARIABLE)
    return run_name(run, what=RUN_VARIABLE) if run else None


def is_run_name(text: str) -> bool:
    """Whether this can be the name of a run; other programs may use keys that look like those of one."""
    return _RUN_NAME.fullmatch(text) is not None


def worker_number(worker_id: int) -> int:
    """Check a worker id.

    Raises:
        InvalidArgument: it is not an integer from 0 to 65535.
    """
    if isinstance(worker_id, bool) or not isinstance(worker_id, int) or not 0 <= worker_id <= MAX_WORKER_ID:
        raise InvalidArgument(f"worker_id must be an integer from 0 to {MAX_WORKER_ID}; got {worker_id!r}")
    return worker_id


def positive_int(name: str, value: int) -> int:
    """Check that a setting is an integer above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        # Not the text itself: it may be a URL in the wrong place, with a password in it.
        shown = "text" if isinstance(value, str) else repr(value)
        raise InvalidArgument(f"{name} must be an integer of at least 1; got {shown}")
    return value


def positive_seconds(name: str, value: float) -> float:
    """Check that a setting is a number of seconds above zero, and not beyond what a thread can wait."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_SECONDS:
        raise InvalidArgument(
            f"{name} must be a number of seconds above 0, up to {MAX_SECONDS:,}; got {value!r}"
        )
    return float(value)


def waiting_seconds(name: str, value: float) -> float:
    """Check that what a caller wants to wait is a number of seconds, 0 included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise InvalidArgument(f"{name} must be a number of seconds, from 0 to {MAX_SECONDS:,}; got {value!r}")
    return float(value)


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Check that a setting is one of a few words."""
    if value not in choices:
        raise InvalidArgument(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def host_cache_place(setting: HostCacheSetting) -> Path | None:
    """Give the directory in which the processes of this host share weights; None for not at all.

    True stands for what the environment has in RLBROKER_HOST_CACHE, a directory or `off`; by default /dev/shm.
    """
    if isinstance(setting, bool):
        place = os.environ.get("RLBROKER_HOST_CACHE", "/dev/shm") if setting else "off"
        return None if place.lower() in ("", "0", "off", "no", "false") else Path(place)
    if not isinstance(setting, str | Path) or not str(setting):
        raise InvalidArgument(f"host_cache must be True, False or a directory; got {setting!r}")
    return Path(setting)
