"""The list of commands, by heading of `rlbroker --help`. Add a new command to `COMMANDS`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlbroker.errors import without_passwords
from rlbroker.ops.cli.acl_command import acl
from rlbroker.ops.cli.bench_command import bench
from rlbroker.ops.cli.check_command import check
from rlbroker.ops.cli.control_commands import control
from rlbroker.ops.cli.dead_commands import dead
from rlbroker.ops.cli.demo_commands import demo, learner, worker
from rlbroker.ops.cli.doctor_command import doctor
from rlbroker.ops.cli.experiences_commands import experiences
from rlbroker.ops.cli.exporter_command import exporter
from rlbroker.ops.cli.inspect_commands import missed, runs, status, workers
from rlbroker.ops.cli.prune_command import prune
from rlbroker.ops.cli.report_command import report
from rlbroker.ops.cli.server_command import server
from rlbroker.ops.cli.shared_options import unwrap
from rlbroker.ops.cli.top.top_command import top
from rlbroker.ops.cli.weights_commands import weights

#: The commands and groups of commands, by their heading in the help.
COMMANDS = {
    "Run": (demo, server, learner, worker),
    "Inspect": (status, top, workers, missed, report, weights, experiences, runs),
    "Act": (control, dead),
    "Server": (check, doctor, acl, exporter, bench, prune),
}


class CommandGroup(TyperGroup):
    """The commands. What a user typed in a wrong place may be a URL, and its password is not repeated."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Parse the options before the command."""
        with _hiding_passwords():
            return super().make_context(*arguments, **settings)

    def invoke(self, *arguments: Any) -> Any:
        """Parse the command's own options, and run it."""
        with _hiding_passwords():
            return super().invoke(*arguments)


@contextmanager
def _hiding_passwords() -> Iterator[None]:
    """Remove passwords from an error of the command line in this block; only those have a `message`."""
    try:
        yield
    except Exception as error:
        message: Any = getattr(error, "message", None)
        if isinstance(message, str):
            vars(error)["message"] = without_passwords(message)
        raise


app = typer.Typer(
    name="rlbroker",
    cls=CommandGroup,
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
            app.command(rich_help_panel=heading, help=unwrap(command.__doc__ or ""))(command)


@app.callback(invoke_without_command=True)
def rlbroker(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """The Redis-backed broker between reinforcement-learning learners and rollout workers."""
    if version:
        from rlbroker import __version__

        print(__version__)
        raise typer.Exit
