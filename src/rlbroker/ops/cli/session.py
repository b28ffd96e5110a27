"""`Session`: one call of a command, with its connection, its run, and its output.

Data goes to stdout, everything else to stderr. Slow modules are imported where they are used, so that commands start
fast.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, Self

import typer

from rlbroker.ops.cli.console import Console
from rlbroker.ops.cli.exit_codes import EXIT_NOT_FOUND
from rlbroker.ops.cli.hints import complete_hint, lacks_password
from rlbroker.ops.formatting import describe_other_workers, sanitize

if TYPE_CHECKING:
    from rlbroker.backend.connection import Connection
    from rlbroker.backend.deadline import within
    from rlbroker.backend.keys import Keys
    from rlbroker.codec.signing import SigningKey
    from rlbroker.ops.inspect.findings import Finding

logger = logging.getLogger("rlbroker")

#: Columns of a table that is written to a pipe.
PIPE_WIDTH = 1000


class Session:
    """One call of a command: the shared options, the server and run that they name, and the command's output.

    Attributes:
        run_option: the value of --run. `run` is the run that the command is about.
        verbose: the number of times that -v was given.
        timeout: seconds to wait for the server.
    """

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
        """Take the shared options; connect to the server only when it is needed."""
        self.as_json, self.no_color, self.quiet, self.verbose = as_json, no_color, quiet, verbose
        self.timeout = timeout
        self.url, self.run_option = url, run
        self._password_omitted = False  #: whether a printed hint lacks the password of its URL
        self._log = logging.StreamHandler(sys.stderr)
        self._log.setFormatter(logging.Formatter("rlbroker: %(message)s"))

    def __enter__(self) -> Self:
        """Send rlbroker's log to stderr until the block ends."""
        level = {0: logging.WARNING, 1: logging.INFO}.get(self.verbose, logging.DEBUG)
        logger.addHandler(self._log)
        logger.setLevel(logging.ERROR if self.quiet else level)
        return self

    def __exit__(self, *error: object) -> None:
        """Explain an omitted password, and close the connection."""
        if self._password_omitted:
            self.note("… stands for the password. Put the URL into RLBROKER_REDIS_URL to get complete hints")
        logger.removeHandler(self._log)
        logger.setLevel(logging.NOTSET)
        if self.is_connected:
            self.connection.close()

    # The server and the run

    @cached_property
    def connection(self) -> Connection:
        """The connection to the server. The first use fails at once, without retries, if the server does not answer."""
        from rlbroker.backend.connection import Connection
        from rlbroker.backend.deadline import ONE_TRY

        connection = Connection(self.url, timeout_seconds=self.timeout)
        try:
            connection.execute("PING", deadline=ONE_TRY)
            connection.find_nodes()
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def is_connected(self) -> bool:
        """Whether `connection` has been used."""
        return "connection" in self.__dict__

    @property
    def named_run(self) -> str | None:
        """The run that --run names, or else RLBROKER_RUN; None without both."""
        from rlbroker.config import run_from_environment

        return self.run_option or run_from_environment()

    @cached_property
    def run(self) -> str:
        """The name of the run: the one that was named, or the only one on the server."""
        from rlbroker.ops.inspect.runs import choose_run

        return choose_run(self.connection, self.named_run)

    @cached_property
    def keys(self) -> Keys:
        """The names of the run's keys."""
        from rlbroker.ops.inspect.runs import read_keys

        return read_keys(self.connection, self.run)

    @cached_property
    def signing_key(self) -> SigningKey | None:
        """The key that signs weights and commands, from RLBROKER_SIGNING_KEY_FILE; None if it is not set."""
        from rlbroker.codec.signing import SigningKey
        from rlbroker.config import signing_secret

        secret = signing_secret()
        return SigningKey(secret) if secret else None

    def time_limit(self) -> within:
        """Return a context manager whose block has --timeout in total for all its requests."""
        from rlbroker.backend.deadline import Deadline, within

        return within(Deadline(self.timeout))

    # Output

    @cached_property
    def console(self) -> Console:
        """Stdout, for output that is not JSON."""
        return Console(sys.stdout, no_color=self.no_color, pipe_width=PIPE_WIDTH)

    def print_json(self, data: Any) -> None:
        """Print data for a program."""
        print(json.dumps(data, indent=2), flush=True)

    def print_findings(self, findings: Iterable[Finding], *, with_advice: bool = False) -> None:
        """Print the findings, each with its hint or its advice."""
        from rlbroker.ops.inspect.findings import group_findings

        for finding, other_workers in group_findings(findings):
            mark, style = {"critical": ("✗", "red"), "warning": ("!", "yellow")}[finding.severity]
            self.console.print(f"{mark} {sanitize(finding.what)}", style=style)
            self.console.print(f"    {finding.advice if with_advice else self.complete_hint(finding.hint)}")
            if other_workers:
                self.console.print(f"  … {describe_other_workers(other_workers)}")

    def note(self, text: str) -> None:
        """Print progress or advice on stderr; nothing with --quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def complete_hint(self, hint: str) -> str:
        """Return a hint as a line that can be typed; see `hints`."""
        line = complete_hint(self, hint)
        self._password_omitted |= lacks_password(line)
        return line

    def check_worker(self, worker: int | None, existing: Collection[int]) -> None:
        """End the command if a worker was named that the run never had."""
        if worker is not None and worker not in existing:
            names = ", ".join(map(str, existing)) or "none"
            self.fail(f"there is no worker {worker} in the run {self.run!r}; its workers are: {names}")

    def print_traceback(self) -> None:
        """Print the traceback of the current error with -vv."""
        if self.verbose > 1:
            traceback.print_exc()

    def fail(self, message: str, code: int = EXIT_NOT_FOUND) -> NoReturn:
        """End the command with a message on stderr and an exit code."""
        print(f"rlbroker: {message}", file=sys.stderr)
        raise typer.Exit(code)
