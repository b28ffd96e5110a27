"""Rules that every command of `rlbroker` keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer.core
import typer.main
from executable import rlbroker

from rlbroker.ops.cli.app import app

#: Commands that do not read a run: they have no shared options.
WITHOUT_SESSION = {"demo", "server", "learner", "worker"}


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command with its name, such as `weights list`."""
    for name, command in getattr(group or typer.main.get_command(app), "commands").items():  # noqa: B009
        if isinstance(command, typer.core.TyperGroup):  # weights, experiences, …
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


ALL = dict(commands())


@pytest.mark.parametrize("name", ALL)
def test_each_command_has_help_with_its_exit_codes_and_an_example(name: str) -> None:
    text = ALL[name].help
    assert re.search(rf"^Example: rlbroker {name}\b", text, re.MULTILINE)
    assert name in WITHOUT_SESSION or "Exit code" in text
    assert all(option.help for option in ALL[name].params)


@pytest.mark.parametrize("name", sorted(set(ALL) - WITHOUT_SESSION))
def test_each_command_about_a_run_has_the_shared_options(name: str) -> None:
    found = {option for parameter in ALL[name].params for option in parameter.opts}
    output = {"--json", "--no-color"} if name != "exporter" else set()  # it prints no data
    assert {"--url", "--quiet", "-q", "--verbose", "-v"} | output <= found


def test_help_lists_the_commands() -> None:
    done = rlbroker("--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^│ (\w+) ", done.stdout, re.MULTILINE)
    assert set(listed) == {name.partition(" ")[0] for name in ALL}


def test_version_is_the_version_of_the_package() -> None:
    done = rlbroker("--version")
    assert (done.returncode, done.stdout) == (0, f"{version('rlbroker')}\n")


def test_shells_can_complete_commands() -> None:
    done = rlbroker("", _RLBROKER_COMPLETE="complete_bash", COMP_WORDS="rlbroker stat", COMP_CWORD="1")
    assert done.stdout.split() == ["status"]


def test_a_mistyped_value_is_named_with_the_right_form() -> None:
    done = rlbroker("missed", "--since", "yesterday")
    assert (done.returncode, done.stdout) == (2, "")
    message = " ".join(done.stderr.replace("│", " ").split())  # typer wraps it in a box
    assert "'yesterday' is not a time span; write it as 90s, 15m, 1h or 2d" in message
    assert "Traceback" not in done.stderr
