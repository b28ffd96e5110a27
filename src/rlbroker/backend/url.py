"""URLs of servers, validated and parsed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from rlbroker.config import DEFAULT_URL, default_url, redacted_url, shown
from rlbroker.errors import InvalidArgument

URL_SCHEMES = (
    *("redis", "rediss", "unix"),
    *("redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"),
)

#: Parameters with the user and password for the Sentinels, which do not use those for the server.
_SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")

#: The names of masters that Sentinels accept.
_SERVICE = re.compile(r"[\w.-]+", re.ASCII)

_DATABASE = re.compile(r"[0-9]{1,9}")

#: Spaces, control characters, and bytes that are not text.
_NO_CHARACTER = re.compile(r"[\0-\x20\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Endpoint:
    """The server or servers that a URL names.

    Attributes:
        kind: one server; the nodes of a Cluster; or Sentinels, which name the master.
        url: the URL of the first host in the form that redis-py reads.
        hosts: host and port of each node or Sentinel in the URL; empty for one server.
        service: the Sentinels' name of the master; empty without Sentinels.
        login: user and password for the Sentinels, if they need any.
    """

    kind: Literal["one", "cluster", "sentinel"]
    url: str
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    login: Mapping[str, str] = field(default_factory=dict)


def redis_url(url: str | None = None) -> str:
    """Return the server's URL: the argument, else RLBROKER_REDIS_URL, else REDIS_URL, else localhost.

    Raises:
        InvalidArgument: the URL cannot be used; the message says why.
    """
    if url is not None and not isinstance(url, str):
        raise InvalidArgument(f"redis_url must be text, such as {DEFAULT_URL!r}; got {shown(url)}")
    found = (url or "").strip() or default_url().strip()
    scheme, separator, rest = found.partition("://")
    found = f"{scheme.lower()}{separator}{rest}"
    _check_characters(found)
    parts, _ = url_parts(found)
    if parts.scheme not in URL_SCHEMES:
        known = ", ".join(f"{name}://" for name in URL_SCHEMES)
        wrong = f"the scheme {shown(parts.scheme)}" if separator and parts.scheme else "no scheme"
        raise InvalidArgument(
            f"the server's URL has {wrong}; use one of {known}, such as {DEFAULT_URL!r} "
            "(it comes from the argument, RLBROKER_REDIS_URL, or REDIS_URL)"
        )
    if not separator:
        raise InvalidArgument(f"the server's URL lacks its //; write it like {DEFAULT_URL!r}")
    parse_endpoint(found)
    return found


def _check_characters(url: str) -> None:
    """Refuse what no URL may contain, and libraries remove in silence or fail at."""
    if _NO_CHARACTER.search(url):
        readable = redacted_url(_NO_CHARACTER.sub("…", url))
        raise InvalidArgument(
            f"the server's URL {readable} has a space or another character that is not text; in a password write a "
            "space as %20"
        )


def parse_endpoint(url: str) -> Endpoint:
    """Return the server or servers that a URL names.

    >>> parse_endpoint("redis+sentinel://a:1,b:2/pong/3").hosts
    (('a', 1), ('b', 2))

    Raises:
        InvalidArgument: a part of the URL is missing or cannot be used.
    """
    parts, places = url_parts(url)
    scheme, _, engine = parts.scheme.partition("+")
    if scheme == "unix":
        _check_socket(parts, url)
        return Endpoint("one", url)
    hosts = _parse_hosts(places, engine, url)
    service, path = "", unquote(parts.path).strip("/")
    if engine == "sentinel":
        service, _, path = path.partition("/")
        _check_service(service, url)
    if path and not _DATABASE.fullmatch(path):
        hint = "; in a password write / as %2F" if "@" in path else ""
        raise InvalidArgument(
            f"the database in the server's URL must be a number, as in {DEFAULT_URL!r}{hint}"
        )
    if not engine:
        return Endpoint("one", url)
    if engine == "cluster" and path.strip("0"):
        raise InvalidArgument(f"a Cluster has the database 0 only; {redacted_url(url)} names {path}")
    query, login = parts.query, dict[str, str]()
    if engine == "sentinel":
        parameters = parse_qsl(query, keep_blank_values=True)
        login = {
            name.removeprefix("sentinel_"): value for name, value in parameters if name in _SENTINEL_LOGIN
        }
        query = urlencode([pair for pair in parameters if pair[0] not in _SENTINEL_LOGIN])
    first = parts._replace(scheme=scheme, path=f"/{path}", query=query, fragment="").geturl()
    return Endpoint("cluster" if engine == "cluster" else "sentinel", first, hosts, service, login)


def _check_socket(parts: SplitResult, url: str) -> None:
    """Refuse a URL of a socket without a usable path."""
    if parts.hostname not in (None, "", "localhost"):
        raise InvalidArgument(
            f"the server's URL {redacted_url(url)} names a host; the path of a socket follows three slashes, as in "
            "unix:///run/redis.sock"
        )
    if not parts.path.strip("/") or "\0" in unquote(parts.path):
        raise InvalidArgument(
            "the server's URL names no socket; write its path, as in unix:///run/redis.sock"
        )


def _check_service(service: str, url: str) -> None:
    """Refuse a URL of Sentinels without a valid name of a master."""
    if not service:
        raise InvalidArgument(
            f"the URL of the Sentinels {redacted_url(url)} does not name the master; write it like "
            "redis+sentinel://host:26379,host:26379/mymaster"
        )
    if not _SERVICE.fullmatch(service):  # not the name itself: it may be a part of a password
        raise InvalidArgument(
            f"the URL of the Sentinels {redacted_url(url)} has an invalid name of a master: use letters, digits and "
            ".-_; in a password write / as %2F"
        )


def _parse_hosts(places: list[str], engine: str, url: str) -> tuple[tuple[str, int], ...]:
    default_port = 26379 if engine == "sentinel" else 6379
    hosts = tuple(_parse_host(place, default_port, url) for place in places)
    if engine and not all(host for host, _ in hosts):
        raise InvalidArgument(
            f"the server's URL {redacted_url(url)} names a host that is empty; write at least one, and a comma only "
            f"between two, as in redis+{engine}://host:{default_port},host:{default_port}"
        )
    return hosts


def _parse_host(place: str, default_port: int, url: str) -> tuple[str, int]:
    """Return host and port; the host is empty if there is none, which stands for this machine."""
    if "," in place:
        raise InvalidArgument(
            f"the server's URL {redacted_url(url)} names several hosts; write redis+cluster:// or redis+sentinel://"
        )
    problem: ValueError | None = None
    try:
        parts = urlsplit(f"//{place}")
        host, port = unquote(parts.hostname or ""), parts.port
        host.encode("idna")  # as the socket does
    except ValueError as error:
        problem = error
    if problem is not None:
        raise invalid_url_error(url, problem)
    if port == 0:
        raise InvalidArgument(
            f"the server's URL {redacted_url(url)} has port 0; leave it out for {default_port}"
        )
    if re.search(r"[\0@/]", host) or (":" in host and not place.startswith("[")):
        raise InvalidArgument(
            "the server's URL has a host that cannot be read; an IPv6 address stands in brackets, as in "
            "redis://[::1]:6379, and a password stands before @"
        )
    return host, port or default_port


def url_parts(url: str) -> tuple[SplitResult, list[str]]:
    """Return the parts of a URL with its first host only, as no library reads several; and all of its hosts.

    Raises:
        InvalidArgument: the URL cannot be read.
    """
    scheme, _, rest = url.partition("://")
    place = re.split("[/?#]", rest, maxsplit=1)[0]
    user, at, named = place.rpartition("@")
    hosts = named.split(",") if "+" in scheme else [named]
    single = url if len(hosts) == 1 else f"{scheme}://{user}{at}{hosts[0]}{rest[len(place) :]}"
    problem: ValueError | None = None
    try:
        return urlsplit(single), hosts
    except ValueError as error:
        problem = error
    raise invalid_url_error(url, problem)


def invalid_url_error(url: str, error: ValueError) -> InvalidArgument:
    """Return the error for a URL that cannot be used. Raise it outside of the handler: `error` may show a password."""
    why = str(error)
    # Other messages repeat a part of the URL, which may contain the password.
    if not why.startswith(("Invalid IPv6", "Invalid value for")):
        why = (
            "host or port cannot be read; an IPv6 address stands in brackets, as in [::1]; in a password write / as "
            "%2F, ? as %3F, # as %23, @ as %40"
        )
    return InvalidArgument(f"the server's URL {redacted_url(url)} cannot be used: {why}")
