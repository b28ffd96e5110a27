"""Adds to hints, such as `redis-cli CONFIG SET …`, the options that lead to the session's server and run.

A completed hint never holds a password: redis-cli asks for it, `…` replaces it in a URL, and a URL from the environment
is referred to by the name of its variable.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rlbroker.errors import RlbrokerError

if TYPE_CHECKING:
    from rlbroker.backend.url import Endpoint
    from rlbroker.ops.cli.session import Session

#: Commands that have no --run, or are about all runs of a server.
_WITHOUT_RUN = ("bench", "doctor", "prune", "runs", "server")

#: Commands of redis-cli that every node of a Cluster needs: each has its own settings, files and users.
_FOR_EVERY_NODE = ("ACL ", "BGREWRITEAOF", "BGSAVE", "CONFIG ", "MEMORY PURGE")

#: Replaces the password in a URL.
_OMITTED = "…"


def complete_hint(session: Session, hint: str) -> str:
    """Return a hint as a line to type. Only hints for `rlbroker` and `redis-cli` are changed."""
    program, _, arguments = hint.partition(" ")
    if program == "redis-cli":
        return " ".join(filter(None, (program, _redis_cli_options(session, arguments), arguments)))
    if program != "rlbroker":
        return hint
    command = arguments.partition(" ")[0]
    if " --url" not in arguments and command != "server" and (typed := _url_to_type(session.url)):
        arguments += f" --url {shlex.quote(typed)}"
    if " --run" not in arguments and command not in _WITHOUT_RUN:
        arguments += f" --run {session.run}"
    return f"rlbroker {arguments}"


def lacks_password(line: str) -> bool:
    """Return whether a completed hint has `…` in place of the password."""
    return f":{_OMITTED}@" in line


def _url_to_type(url: str | None) -> str | None:
    """Return the value for --url, without password; None if the environment names the server."""
    from rlbroker.backend.url import redis_url, url_parts
    from rlbroker.config import url_was_typed

    if url or not url_was_typed():
        return url
    parts, hosts = url_parts(redis_url())
    query = [part for part in parts.query.split("&") if not part.partition("=")[0].endswith("password")]
    location = f"{parts.username or ''}:{_OMITTED}@{','.join(hosts)}"
    return parts._replace(netloc=location, query="&".join(query)).geturl()


def _redis_cli_options(session: Session, command: str) -> str:
    """Return the options with which redis-cli reaches the server that the command is for.

    They name no user if the command needs another one: ACL needs an administrator, and Sentinels have their own users.
    """
    from urllib.parse import unquote, urlsplit

    from rlbroker.backend.url import parse_endpoint, redis_url
    from rlbroker.config import redacted_url, redis_password, redis_username, url_variable, url_was_typed

    url, variable = redis_url(session.url), url_variable()
    other_user = any(word in f" {command}" for word in (" ACL ", " SENTINEL "))
    endpoint = parse_endpoint(url)
    parts = urlsplit(endpoint.url)
    from_variable = variable and not session.url and not url_was_typed() and not other_user
    node = "" if command.startswith("-h ") else _node_options(session, endpoint, command)
    if node is not None:
        options, from_variable = "", False
    elif parts.scheme == "unix":
        options, from_variable = f"-s {shlex.quote(parts.path)}", False
    else:
        options = f'-u "${variable}"' if from_variable else f"-u {shlex.quote(redacted_url(url))}"
    user = None
    if not (parts.username or parts.password):
        user = redis_username() or ("default" if redis_password() else None)
    elif not from_variable:  # else the URL in the variable names the user
        user = unquote(parts.username or "default")
    if user and not other_user:
        options += f" --user {shlex.quote(user)} --askpass"
    if parts.scheme == "rediss":
        options += _tls_options(parts.query) if node is None else f" --tls{_tls_options(parts.query)}"
    return options if node is None else f"{options} {node}".strip()


def _node_options(session: Session, endpoint: Endpoint, command: str) -> str | None:
    """Return the options that address a Cluster, or the master behind Sentinels; None for a single server."""
    from urllib.parse import urlsplit

    if endpoint.kind == "one" and not (session.is_connected and session.connection.servers.several):
        return None
    try:
        host, port = session.connection.masters()[0].address or ("", 0)
    except RlbrokerError:
        host, port = endpoint.hosts[0] if endpoint.kind == "cluster" else ("MASTER", 6379)
    if endpoint.kind == "sentinel":
        database = urlsplit(endpoint.url).path.strip("/")
        return f"-h {host} -p {port}" + (f" -n {database}" if database.strip("0") else "")
    if command.startswith(_FOR_EVERY_NODE):
        return f"--cluster call {host}:{port}"
    return f"-c -h {host} -p {port}"


def _tls_options(query: str) -> str:
    """Return the options that make redis-cli use the same certificates."""
    from urllib.parse import parse_qsl

    from rlbroker.backend.client import tls_settings

    settings = zip(("--cacert", "--cert", "--key"), tls_settings(dict(parse_qsl(query))), strict=True)
    return "".join(f" {option} {shlex.quote(file.path)}" for option, file in settings if file)
