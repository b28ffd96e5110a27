"""The command line: `rlbroker server | learner | worker | demo | status | bench`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rlbroker.cli.bench import bench
from rlbroker.cli.demo import demo
from rlbroker.cli.learner import learner
from rlbroker.cli.server import server
from rlbroker.cli.status import status
from rlbroker.cli.worker import worker
from rlbroker.errors import RlbrokerError

#: Exit code of every command for an error that its message explains.
EXIT_ERROR = 2

app = typer.Typer(
    name="rlbroker",
    help="The Redis-backed broker between reinforcement-learning learners and rollout workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, server, learner, worker, status, bench):
    app.command()(command)


@app.callback(invoke_without_command=True)
def rlbroker(
    version: Annotated[bool, typer.Option("--version", help="Show the version and end.")] = False,
) -> None:
    """The Redis-backed broker between reinforcement-learning learners and rollout workers."""
    if version:
        from importlib.metadata import version as installed

        print(installed("rlbroker"))
        raise typer.Exit


def main() -> None:
    """Run the command line; errors that rlbroker explains are one line, not a traceback."""
    try:
        app()
    except RlbrokerError as error:
        print(f"rlbroker: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
