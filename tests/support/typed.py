"""Parses the command lines in the files of deploy/ into options."""

from __future__ import annotations

from typing import Any

import typer.main

from rlbroker.ops.cli.app import app


def options(arguments: list[str]) -> dict[str, Any]:
    """Return the value of each option; fail if the command does not accept these arguments."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("rlbroker", list(arguments))
    name, command, rest = group.resolve_command(context, list(arguments))
    return dict(command.make_context(name, rest, parent=context).params)
