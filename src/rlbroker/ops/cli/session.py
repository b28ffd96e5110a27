"""What the commands share that look at a run: their options, the way to the server, and how they speak.

Data goes to stdout, everything else to stderr. Nothing heavy is imported before it is needed: a person waits.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self, get_type_hints

import typer

from rlbroker.errors import RlbrokerError
from rlbroker.ops.cli import EXIT_ERROR
from rlbroker.ops.cli.console import Console
from rlbroker.ops.cli.formatting import plain, unwrapped
from rlbroker.ops.cli.options import Url

if TYPE_CHECKING:
    from rlbroker.backend.connection import Connection
    from rlbroker.backend.deadline import within
    from rlbroker.backend.keys import Keys
    from rlbroker.backend.url import Endpoint
    from rlbroker.codec.signing import SigningKey

logger = logging.getLogger("rlbroker")

#: Exit code where what was asked for is not there, but the run is.
EXIT_NOT_FOUND = 1

#: Exit codes after Ctrl-C, when whoever reads our output has gone, and for what must be a mistake of ours.
EXIT_INTERRUPTED, EXIT_PIPE, EXIT_BUG = 130, 141, 70

#: Commands about a server with all its runs.
_OF_NO_RUN = ("bench", "doctor", "prune", "runs", "server")

#: Commands of redis-cli that are for every node of a Cluster.
_OF_EACH_NODE = ("ACL ", "BGREWRITEAOF", "BGSAVE", "CONFIG ", "MEMORY PURGE")

#: Columns of text that a pipe has room for.
PIPE_WIDTH = 1000


class Session:
    """One call of a command: where it looks, and how it says what it found."""

    def __init__(
        self,
        *,
        url: str | None = None,
        run: str | None = None,
        as_json: bool = False,
        no_color: bool = False,
        quiet: bool = False,
        verbose: int = 0,
        timeout: float = 5.0,
    ) -> None:
        """Take the options that all commands share; the server is asked for nothing yet."""
        self.as_json, self.no_color, self.quiet, self.verbose = as_json, no_color, quiet, verbose
        self.timeout = timeout
        self.url, self.asked_run = url, run
        self._left_out = False  #: whether a hint was shown without the password that belongs to it
        self._log = logging.StreamHandler(sys.stderr)
        self._log.setFormatter(logging.Formatter("rlbroker: %(message)s"))

    def __enter__(self) -> Self:
        """Give the session itself; until the block is left, what rlbroker logs goes to stderr."""
        level = {0: logging.WARNING, 1: logging.INFO}.get(self.verbose, logging.DEBUG)
        logger.addHandler(self._log)
        logger.setLevel(logging.ERROR if self.quiet else level)
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connections, if there are any."""
        if self._left_out:
            self.say(
                "… stands for the password. With the URL in RLBROKER_REDIS_URL, hints can be typed as they are"
            )
        logger.removeHandler(self._log)
        logger.setLevel(logging.NOTSET)
        if "connection" in self.__dict__:
            self.connection.close()

    @cached_property
    def connection(self) -> Connection:
        """The way to the server, which was seen to answer.

        Raises:
            PeerError: it did not. It was asked once: who looks wants to know at once that nobody answers.
        """
        from rlbroker.backend.connection import Connection

        connection = Connection(self.url, timeout_seconds=self.timeout)
        try:
            connection.execute_once("PING")
            connection.find_nodes()
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def named_run(self) -> str | None:
        """The run that was asked for: with --run, or else RLBROKER_RUN.

        Raises:
            InvalidArgument: RLBROKER_RUN cannot be the name of a run.
        """
        from rlbroker.config import run_from_environment

        return self.asked_run or run_from_environment()

    @cached_property
    def run(self) -> str:
        """Name of the run: the one that was asked for, or the only one.

        Raises:
            InvalidArgument: there is none, or more than one to choose from; those that exist are named.
            IncompatibleFormat: it was written by a release with another wire format.
            PeerError: the server refused, or could not be reached in time.
        """
        from rlbroker.ops.inspect.runs import choose_run

        return choose_run(self.connection, self.named_run)

    @cached_property
    def keys(self) -> Keys:
        """The names of the run's keys."""
        from rlbroker.ops.inspect.runs import keys_of

        return keys_of(self.connection, self.run)

    @cached_property
    def signing_key(self) -> SigningKey | None:
        """The key that signs weights and commands, from the file that RLBROKER_SIGNING_KEY_FILE names.

        Raises:
            InvalidArgument: the file cannot be used.
        """
        from rlbroker.codec.signing import SigningKey
        from rlbroker.config import signing_secret

        secret = signing_secret()
        return SigningKey(secret) if secret else None

    @cached_property
    def console(self) -> Console:
        """Stdout, for what is not JSON. A pipe gets long lines and no colours."""
        return Console(sys.stdout, no_color=self.no_color, other_width=PIPE_WIDTH)

    def say(self, text: str) -> None:
        """Say something that is not data: progress, advice. Nothing with --quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def in_time(self) -> within:
        """Have all that is asked of the server in this block end within --timeout."""
        from rlbroker.backend.deadline import Deadline, within

        return within(Deadline(self.timeout))

    def fail(self, message: str, code: int = EXIT_NOT_FOUND) -> NoReturn:
        """End the command with a message: what was asked for is not there."""
        print(f"rlbroker: {message}", file=sys.stderr)
        raise typer.Exit(code)

    def explain(self) -> None:
        """With -vv, show where the present error comes from."""
        if self.verbose > 1:
            traceback.print_exc()

    def show_json(self, data: Any) -> None:
        """Print what a program is to read."""
        print(json.dumps(data, indent=2), flush=True)

    def typed(self, hint: str) -> str:
        """Complete a hint, `rlbroker …` or `redis-cli …`, to what a person can type to reach the same server and run.

        Passwords are never part of it: redis-cli asks for them, in a URL `…` stands for them, and what came from the
        environment comes from there again.
        """
        program, _, words = hint.partition(" ")
        if program == "redis-cli":
            return " ".join(filter(None, (program, self._redis_cli_options(words), words)))
        if program != "rlbroker":
            return hint
        if " --url" not in words and (url := self._url_to_type()):
            self._left_out |= "…" in url
            words += f" --url {shlex.quote(url)}"
        if " --run" not in words and words.partition(" ")[0] not in _OF_NO_RUN:
            words += f" --run {self.run}"
        return f"rlbroker {words}"

    def _url_to_type(self) -> str | None:
        from rlbroker.backend.url import redis_url, url_parts
        from rlbroker.config import url_was_typed

        if self.url or not url_was_typed():
            return self.url
        parts, hosts = url_parts(redis_url())
        query = [part for part in parts.query.split("&") if not part.partition("=")[0].endswith("password")]
        place = f"{parts.username or ''}:…@{','.join(hosts)}"
        return parts._replace(netloc=place, query="&".join(query)).geturl()

    def _redis_cli_options(self, command: str) -> str:
        """Give the options that lead redis-cli to where a command belongs.

        An administrator, who gives rights, is somebody else than we are; and Sentinels have users of their own.
        """
        from urllib.parse import unquote, urlsplit

        from rlbroker.backend.url import parse_endpoint, redis_url
        from rlbroker.config import redacted_url, redis_password, redis_username, url_variable, url_was_typed

        url, variable = redis_url(self.url), url_variable()
        administrator = any(word in f" {command}" for word in (" ACL ", " SENTINEL "))
        way = parse_endpoint(url)
        parts = urlsplit(way.url)
        in_shell = variable and not self.url and not url_was_typed() and not administrator
        node = "" if command.startswith("-h ") else self._redis_cli_node(way, command)
        if node is not None:
            where, in_shell = "", False
        elif parts.scheme == "unix":
            where, in_shell = f"-s {shlex.quote(parts.path)}", False
        else:
            where = f'-u "${variable}"' if in_shell else f"-u {shlex.quote(redacted_url(url))}"
        user = None
        if not (parts.username or parts.password):
            user = redis_username() or ("default" if redis_password() else None)
        elif not in_shell:  # the shell's variable names whom it is for
            user = unquote(parts.username or "default")
        if user and not administrator:
            where += f" --user {shlex.quote(user)} --askpass"
        if parts.scheme == "rediss":
            where += _tls_options(parts.query) if node is None else f" --tls{_tls_options(parts.query)}"
        return where if node is None else f"{where} {node}".strip()

    def _redis_cli_node(self, way: Endpoint, command: str) -> str | None:
        """Give the options that lead to the master that Sentinels name, or to a Cluster; None for a single server.

        What sets something is for all nodes of a Cluster, as each has settings, files and users of its own.
        """
        from urllib.parse import urlsplit

        found_out = "connection" in self.__dict__ and self.connection.servers.several
        if way.kind == "one" and not found_out:
            return None
        try:
            host, port = self.connection.masters()[0].address or ("", 0)
        except RlbrokerError:  # in a Cluster any node will do
            host, port = way.hosts[0] if way.kind == "cluster" else ("MASTER", 6379)
        if way.kind == "sentinel":
            database = urlsplit(way.url).path.strip("/")
            return f"-h {host} -p {port}" + (f" -n {database}" if database.strip("0") else "")
        if command.startswith(_OF_EACH_NODE):
            return f"--cluster call {host}:{port}"
        return f"-c -h {host} -p {port}"


def _tls_options(query: str) -> str:
    """Give the options with which redis-cli uses the same certificates."""
    from urllib.parse import parse_qsl

    from rlbroker.backend.client import tls_settings

    found = zip(("--cacert", "--cert", "--key"), tls_settings(dict(parse_qsl(query))), strict=True)
    return "".join(f" {option} {shlex.quote(one.path)}" for option, one in found if one)


def with_session(
    body: Callable[..., None] | None = None, *, without: Collection[str] = ()
) -> Callable[..., Any]:
    """Give a command the options that all commands share, and its `Session` as first argument.

    Errors that rlbroker explains become one line on stderr and an exit code; -vv shows where they come from.

    Args:
        body: the command; takes a `Session`, and then its own options.
        without: those of the shared options that would mean nothing to it.
    """
    if body is None:
        return lambda body: with_session(body, without=without)

    def called(**options: Any) -> None:
        session = Session(**{name: options.pop(name) for name in shared})
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # files that are half written go with us
        try:
            with session:
                body(session, **options)
                sys.stdout.flush()
        except RlbrokerError as error:
            _fail(session, str(error), EXIT_ERROR)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # nor may the end of Python write there
            raise typer.Exit(EXIT_PIPE) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:  # noqa: BLE001 - a mistake of ours: one line is enough for most people
            _fail(session, f"unexpected {type(error).__name__}: {error}; -vv shows where", EXIT_BUG)

    hints = get_type_hints(body, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in list(inspect.signature(body).parameters.items())[1:]
    ]
    shared = {
        name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _SHARED.items()
        if name not in without
    }
    parameters = [*own, *shared.values()]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__name__, called.__doc__ = body.__name__, unwrapped(body.__doc__ or "")
    return called


def _fail(session: Session, message: str, code: int) -> None:
    session.explain()
    print(f"rlbroker: {plain(message)}", file=sys.stderr)
    raise typer.Exit(code)


_PANEL = "Shared options"

#: The options of all commands that look at a run: type, help and default.
_SHARED: dict[str, tuple[Any, Any]] = {
    "url": (Url, None),
    "run": (
        Annotated[
            str | None,
            typer.Option(
                help="Which run; without it RLBROKER_RUN; not needed if there is only one.",
                rich_help_panel=_PANEL,
            ),
        ],
        None,
    ),
    "as_json": (
        Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", rich_help_panel=_PANEL)],
        False,
    ),
    "no_color": (
        Annotated[
            bool,
            typer.Option("--no-color", help="No colours; NO_COLOR=1 does the same.", rich_help_panel=_PANEL),
        ],
        False,
    ),
    "quiet": (
        Annotated[
            bool, typer.Option("--quiet", "-q", help="Nothing but data and errors.", rich_help_panel=_PANEL)
        ],
        False,
    ),
    "verbose": (
        Annotated[
            int,
            typer.Option(
                "--verbose",
                "-v",
                count=True,
                help="Say more; -vv shows where errors come from.",
                rich_help_panel=_PANEL,
            ),
        ],
        0,
    ),
    "timeout": (
        Annotated[
            float, typer.Option(min=0.1, help="Seconds to wait for the server.", rich_help_panel=_PANEL)
        ],
        5.0,
    ),
}
