"""All commands, in the order in which `rlbroker --help` shows them."""

from __future__ import annotations

from typing import Annotated

import typer

from rlbroker.ops.cli.acl import acl
from rlbroker.ops.cli.bench import bench
from rlbroker.ops.cli.check import check
from rlbroker.ops.cli.control import control
from rlbroker.ops.cli.dead import dead
from rlbroker.ops.cli.demo import demo
from rlbroker.ops.cli.doctor import doctor
from rlbroker.ops.cli.experiences import experiences
from rlbroker.ops.cli.exporter import exporter
from rlbroker.ops.cli.formatting import unwrapped
from rlbroker.ops.cli.learner import learner
from rlbroker.ops.cli.missed import missed
from rlbroker.ops.cli.prune import prune
from rlbroker.ops.cli.report import report
from rlbroker.ops.cli.runs import runs
from rlbroker.ops.cli.server import server
from rlbroker.ops.cli.status import status
from rlbroker.ops.cli.top import top
from rlbroker.ops.cli.weights import weights
from rlbroker.ops.cli.worker import worker
from rlbroker.ops.cli.workers import workers

#: Headings of the help, with the commands below each, and the groups of commands.
COMMANDS = {
    "Run": (demo, server, learner, worker),
    "Look": (status, top, workers, missed, report, weights, experiences, runs),
    "Act": (control, dead),
    "Server": (check, doctor, acl, exporter, bench, prune),
}

app = typer.Typer(
    name="rlbroker",
    help="The Redis-backed broker between reinforcement-learning learners and rollout workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for heading, commands in COMMANDS.items():
    for command in commands:
        if isinstance(command, typer.Typer):
            app.add_typer(command, rich_help_panel=heading)
        else:
            app.command(rich_help_panel=heading, help=unwrapped(command.__doc__ or ""))(command)


@app.callback(invoke_without_command=True)
def rlbroker(
    version: Annotated[bool, typer.Option("--version", help="Show the version and end.")] = False,
) -> None:
    """The Redis-backed broker between reinforcement-learning learners and rollout workers."""
    if version:
        from rlbroker import __version__

        print(__version__)
        raise typer.Exit
