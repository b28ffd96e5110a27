"""Settings, the checks of their values, and the environment, which no other module reads."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self, SupportsIndex, get_args

from rlbroker.errors import InvalidArgument

#: The reaction of a worker to a full queue.
WhenFull = Literal["block", "drop_oldest", "drop_newest"]

#: Where a batch must be stored before it counts as confirmed.
Level = Literal["redis", "replica", "fsync", "learner"]

#: When a batch that `collect_experiences` returned is acknowledged: at the next collect, or by the caller.
Acknowledge = Literal["next", "manual"]

#: Whether the processes of one host share weights, or the directory through which they do.
HostCacheSetting = bool | str | Path

#: The key itself, as text or bytes, or the path of the file that holds it.
SigningKeySetting = str | bytes | Path

DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_RUN = "default"
URL_VARIABLES = ("RLBROKER_REDIS_URL", "REDIS_URL")
RUN_VARIABLE = "RLBROKER_RUN"

#: User and password for a URL that has none.
USERNAME_VARIABLE = "RLBROKER_REDIS_USERNAME"
PASSWORD_VARIABLE = "RLBROKER_REDIS_PASSWORD"
PASSWORD_FILE_VARIABLE = "RLBROKER_REDIS_PASSWORD_FILE"

#: Files for a `rediss://` URL that does not name them.
TLS_CA_VARIABLE = "RLBROKER_TLS_CA_FILE"
TLS_CERTIFICATE_VARIABLE = "RLBROKER_TLS_CERTIFICATE_FILE"
TLS_KEY_VARIABLE = "RLBROKER_TLS_KEY_FILE"
TLS_VARIABLES = (TLS_CA_VARIABLE, TLS_CERTIFICATE_VARIABLE, TLS_KEY_VARIABLE)

#: The path of the file with the key that signs weights and commands.
SIGNING_KEY_VARIABLE = "RLBROKER_SIGNING_KEY_FILE"

#: Shorter keys could be guessed; `openssl rand -hex 32` prints one of 64 characters.
MIN_SIGNING_KEY_BYTES = 32

#: Set by a command when it moves a URL with a password from its arguments into the environment.
URL_TYPED_VARIABLE = "RLBROKER_URL_TYPED"

#: The highest worker id, so that a typo cannot create lists of millions.
MAX_WORKER_ID = 65_535

#: The most shards: the learner waits on one connection for each.
MAX_SHARDS = 64

#: The largest number of seconds in a setting: about thirty years.
MAX_SECONDS = 1_000_000_000

#: The largest integer in a setting: the server's scripts compute with doubles.
MAX_INTEGER = 2**53

#: The longest text that an error repeats.
_SHOWN_CHARACTERS = 80

#: The shortest lease, and the shortest time after which another learner takes over pending batches. They cannot be
#: renewed more often.
MIN_LEASE_SECONDS = 0.1
MIN_TAKE_OVER_SECONDS = 0.5

#: What follows the colon of a host and is not a port. The colons of an IPv6 address are in brackets.
_NO_PORT = re.compile(r":(?!\d{0,5}(?:,|$))(?![^\[\]]*\])[^,]*")

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunSettings:
    """The settings of the learner that apply to the whole run; workers read them from the run's `meta` hash.

    Attributes:
        max_queue_size: the most batches that wait in one worker's queue.
        max_queue_bytes: the most bytes of one worker's queue, including batches that are pending at the learner.
        when_full: the reaction of a worker to a full queue, unless the worker has a setting of its own.
        lease_seconds: a worker without a heartbeat for longer than this is `away`.
        forget_seconds: a worker without a heartbeat for longer than this leaves the run.
    """

    max_queue_size: int = 1000
    max_queue_bytes: int = 256 << 20
    when_full: WhenFull = "block"
    lease_seconds: float = 5.0
    forget_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Raise InvalidArgument for settings that cannot work."""
        for name in ("max_queue_size", "max_queue_bytes"):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        for name in ("lease_seconds", "forget_seconds"):
            object.__setattr__(self, name, check_positive_seconds(name, getattr(self, name)))
        check_choice("when_full", self.when_full, get_args(WhenFull))
        if self.lease_seconds < MIN_LEASE_SECONDS:
            raise InvalidArgument(
                f"lease_seconds must be at least {MIN_LEASE_SECONDS:g}, as heartbeats are not more frequent; got "
                f"{self.lease_seconds!r}"
            )
        if self.forget_seconds < self.lease_seconds:
            raise InvalidArgument("forget_seconds must not be shorter than lease_seconds")

    def to_fields(self) -> dict[str, str]:
        """Return these settings as fields of the `meta` hash."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_fields(cls, found: Mapping[str, str]) -> Self:
        """Parse the settings from fields of the `meta` hash. A setting without a field has its default.

        Raises:
            ValueError: a field has a value that `to_fields` does not write.
        """
        kinds: dict[str, Callable[[str], Any]] = {"int": _stored_integer, "float": float}
        return cls(
            **{
                field.name: kinds.get(str(field.type), str)(found[field.name])
                for field in fields(cls)
                if field.name in found
            }
        )


@dataclass(frozen=True)
class SamplesPerInsert:
    """The average number of times that each batch is sampled.

    Attributes:
        ratio: samples for each inserted batch; above 0.
        min_size: number of batches that must be inserted before the first sample; at least 1.
        error_buffer: the most samples by which sampling may be ahead of inserting, or behind it. At least
            `max(1, ratio)`, and at least `(n + ratio) / 2` if n samples are drawn at once: otherwise inserting and
            sampling could wait for each other forever.
    """

    ratio: float
    min_size: int
    error_buffer: float

    def __post_init__(self) -> None:
        """Raise InvalidArgument for settings with which inserting and sampling could wait for each other forever."""
        for name in ("ratio", "error_buffer"):
            value = _number(getattr(self, name))
            if not 0 < value < math.inf:
                raise InvalidArgument(
                    f"samples_per_insert: {name} must be a finite number above 0; got {shown(getattr(self, name))}"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(
            self, "min_size", check_positive_int("samples_per_insert: min_size", self.min_size)
        )
        least = max(1.0, self.ratio)
        if self.error_buffer < least:
            raise InvalidArgument(
                f"samples_per_insert: error_buffer must be at least max(1, ratio) = {least:g}; got "
                f"{self.error_buffer!r}, with which inserting and sampling would wait for each other"
            )


def redis_username() -> str | None:
    """Return the user for a URL that has none, from the environment; None if that has none either."""
    return os.environ.get(USERNAME_VARIABLE) or None


def redis_password() -> str | None:
    """Return the password for a URL that has none, from the environment or the file that it names; None without one.

    Raises:
        InvalidArgument: the environment has both, or the file cannot be used.
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
    """Return the content of a file without its last newline. Errors name the `setting` that the path came from."""
    found, problem = b"", ""
    try:
        found = path.read_bytes().rstrip(b"\r\n")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or type(error).__name__
    if problem:  # outside of the handler: the first error shows the path, which may be a URL
        raise InvalidArgument(f"{setting}: cannot read {path}: {problem}")
    if not found:
        raise InvalidArgument(f"{setting}: {path} is empty")
    return found


def tls_files() -> dict[str, str]:
    """Return the files that the environment names for TLS, by variable."""
    return {name: os.environ[name] for name in TLS_VARIABLES if os.environ.get(name)}


def signing_secret(given: SigningKeySetting | None = None) -> bytes | None:
    """Return the key that signs weights and commands: `given`, else the file that RLBROKER_SIGNING_KEY_FILE names.

    Args:
        given: the key itself as text or bytes, or the path of a file with it, whose last newline is ignored.

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
    else:  # the message does not show the value, which may be a key of another type
        raise InvalidArgument(f"{setting} must be text, bytes or a Path; got {type(path).__name__}")
    if len(key) < MIN_SIGNING_KEY_BYTES:
        raise InvalidArgument(
            f"{setting}: the key has {len(key)} bytes and needs at least {MIN_SIGNING_KEY_BYTES} bytes; "
            "`openssl rand -hex 32` makes one (text is the key itself; name a file by a Path)"
        )
    return key


def colors_wanted() -> bool:
    """Return whether the environment allows colours on a terminal: NO_COLOR is not set, and TERM has colours."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def url_variable() -> str | None:
    """Return the name of the environment variable that holds the server's URL; None if none is set."""
    return next((name for name in URL_VARIABLES if os.environ.get(name, "").strip()), None)


def default_url() -> str:
    """Return the server's URL from the environment, or that of localhost."""
    variable = url_variable()
    return os.environ[variable] if variable else DEFAULT_URL


def url_was_typed() -> bool:
    """Return whether the URL in the environment came from the command line, so that the user's shell lacks it."""
    return bool(os.environ.get(URL_TYPED_VARIABLE))


def redacted_url(url: str) -> str:
    """Return the URL without user, password and query, for logs and errors, even if it is malformed.

    >>> redacted_url("redis://me:secret@host:6379/0?socket_timeout=1")
    'redis://host:6379/0'
    """
    scheme, colon, rest = url.partition("://")
    if not colon:  # not a URL: an @ may separate a password from a host
        return "…" if "@" in url else url
    before, _, query = rest.partition("?")
    if "@" in query:  # the query is part of a password, or contains one
        return f"{scheme}://…"
    # A password may hold an @ or a / that should have been escaped, or stand in the place of a port.
    hosts, slash, path = before.rpartition("@")[2].partition("/")
    return f"{scheme}://{_NO_PORT.sub(':…', hosts)}{slash}{path}"


def shown(value: object) -> str:
    """Return a value that a caller gave, as an error shows it: in short, and without a password.

    >>> shown("redis://me:secret@host"), shown(-1), shown(b"secret")
    ("'redis://host'", '-1', 'a value of type bytes')
    """
    if issubclass(type(value), str):  # `isinstance` would ask its `__class__`, which may raise
        text = "".join([value])  # type: ignore[list-item] # it is a str
        text = redacted_url(text) if "password" not in text or "://" in text else "…"
        return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…")
    if (number := _integer(value)) is not None:
        return repr(number) if abs(number) < 10**_SHOWN_CHARACTERS else "an integer of many digits"
    if value is None or issubclass(type(value), bool | float):
        return str(value)
    return f"a value of type {type(value).__name__}"


def check_run_name(run: str, *, what: str = "run") -> str:
    """Return the name of a run or of a learner; raise InvalidArgument unless it can be part of a key."""
    if not isinstance(run, str) or not is_run_name(run):
        raise InvalidArgument(
            f"{what} must be 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit; got "
            f"{shown(run)}"
        )
    return run


def run_from_environment() -> str | None:
    """Return the run that RLBROKER_RUN names, for commands without `--run`; None if it is not set.

    Raises:
        InvalidArgument: its value cannot be the name of a run.
    """
    run = os.environ.get(RUN_VARIABLE)
    return check_run_name(run, what=RUN_VARIABLE) if run else None


def is_run_name(text: str) -> bool:
    """Return whether `text` can be the name of a run."""
    return _RUN_NAME.fullmatch(text) is not None


def check_worker_id(worker_id: SupportsIndex) -> int:
    """Return a worker id; raise InvalidArgument unless it is an integer from 0 to 65535."""
    number = _integer(worker_id)
    if number is None or not 0 <= number <= MAX_WORKER_ID:
        raise InvalidArgument(
            f"worker_id must be an integer from 0 to {MAX_WORKER_ID}; got {shown(worker_id)}"
        )
    return number


def check_worker_ids(name: str, worker_ids: Iterable[SupportsIndex]) -> list[int]:
    """Return worker ids in order; raise InvalidArgument unless they can be listed, and each is an id."""
    try:
        listed = list(worker_ids)
    except Exception as error:  # its own code may raise whatever it likes
        raise InvalidArgument(
            f"{name} must be a list of worker ids, or None for all; got {shown(worker_ids)}"
        ) from error
    return sorted({check_worker_id(one) for one in listed})


def check_positive_int(name: str, value: SupportsIndex) -> int:
    """Return the value of a setting; raise InvalidArgument unless it is an integer above 0, also one of numpy."""
    return check_count(name, value, least=1)


def check_count(name: str, value: SupportsIndex, *, least: int = 0) -> int:
    """Return the value of a setting; raise InvalidArgument unless it is an integer of at least `least`."""
    number = _integer(value)
    if number is None or not least <= number <= MAX_INTEGER:
        most = f", and at most {MAX_INTEGER:,}" if number is not None and number > MAX_INTEGER else ""
        raise InvalidArgument(f"{name} must be an integer of at least {least}{most}; got {shown(value)}")
    return number


def check_positive_seconds(name: str, value: float) -> float:
    """Return a setting as a float; raise InvalidArgument unless it is above 0 s and no more than a thread can wait."""
    seconds = _number(value)
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidArgument(
            f"{name} must be a number of seconds above 0, up to {MAX_SECONDS:,}; got {shown(value)}{_no_end(value)}"
        )
    return seconds


def check_timeout_seconds(name: str, value: float) -> float:
    """Return a timeout as a float; raise InvalidArgument unless it is a number of seconds. 0 is valid."""
    seconds = _number(value)
    if not 0 <= seconds <= MAX_SECONDS:
        raise InvalidArgument(
            f"{name} must be a number of seconds, from 0 to {MAX_SECONDS:,}; got {shown(value)}{_no_end(value)}"
        )
    return seconds


def _no_end(value: object) -> str:
    """Return what to do for a caller who wants to wait for ever."""
    return "; every wait has a deadline: to wait long, give a large number" if value is None else ""


def _integer(value: object) -> int | None:
    """Return an integer of Python, numpy or torch; None if the value is not one. A truth value is not."""
    if type(value) is int:
        return value
    try:
        is_truth = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
        return None if is_truth else int(operator.index(value))  # type: ignore[arg-type] # raises TypeError
    except Exception:  # noqa: BLE001 - its own code may raise whatever it likes
        return None


def _number(value: object) -> float:
    """Return a real number of Python or numpy; nan if the value is not one. A truth value is not."""
    if type(value) is float or (type(value) is int and abs(value) <= MAX_INTEGER):
        return float(value)
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf
    except Exception:  # noqa: BLE001 - its own code may raise whatever it likes
        return math.nan


def _stored_integer(text: str) -> int:
    """Return the integer that a field holds; raise ValueError unless it is written in plain digits."""
    if not re.fullmatch("[0-9]{1,19}", text):
        raise ValueError(f"{text[:_SHOWN_CHARACTERS]!r} is not an integer")
    return int(text)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the value of a setting; raise InvalidArgument unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgument(f"{name} must be one of {', '.join(map(repr, choices))}; got {shown(value)}")
    return value


def host_cache_place(setting: HostCacheSetting) -> Path | None:
    """Return the directory in which the processes of this host share weights; None if they do not.

    True stands for the value of RLBROKER_HOST_CACHE, which is a directory or `off`, and by default /dev/shm.
    """
    if isinstance(setting, bool):
        place = os.environ.get("RLBROKER_HOST_CACHE", "/dev/shm") if setting else "off"
        return None if place.lower() in ("", "0", "off", "no", "false") else Path(place)
    if not isinstance(setting, str | Path) or not str(setting) or "://" in str(setting):
        raise InvalidArgument(f"host_cache must be True, False or a directory; got {shown(setting)}")
    return Path(setting)
