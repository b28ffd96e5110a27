"""What a command would be called with: for command lines in files of deploy/, which nobody types."""

from __future__ import annotations

from typing import Any

import typer.main

from rlbroker.ops.cli.app import app


def options(arguments: list[str]) -> dict[str, Any]:
    """Give each option's value; it is an error if the command does not take these arguments."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("rlbroker", list(arguments))
    name, command, rest = group.resolve_command(context, list(arguments))
    return dict(command.make_context(name, rest, parent=context).params)
