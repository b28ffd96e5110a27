"""Tests of deploy/systemd: commands, credentials, restarts and sandboxing of the units."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typed import options

from rlbroker import WorkerClient

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = {"learner": "rlbroker-learner", "worker": "rlbroker-worker@", "exporter": "rlbroker-exporter"}
SETTINGS = dict(
    line.split("=", 1)
    for line in (FOLDER / "rlbroker.env").read_text().splitlines()
    if line and not line.startswith("#")
)

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed (Debian: systemd)"
)


def read_unit(name: str) -> dict[str, list[str]]:
    """Return the settings of a unit for worker 3. A setting can have several values."""
    text = (FOLDER / f"{UNITS[name]}.service").read_text().replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for line in text.replace("%i", "3").replace("%d", "/credentials").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def read_command(name: str) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the arguments of the unit's command."""
    (line,) = read_unit(name)["ExecStart"]
    words = shlex.split(re.sub(r"\$\{(\w+)\}", lambda found: SETTINGS[found[1]], line))
    assert words[0] == "/usr/bin/env"
    program = words.index("/opt/rlbroker/bin/rlbroker")
    variables = dict(word.split("=", 1) for word in [*read_unit(name)["Environment"], *words[1:program]])
    return variables, words[program + 1 :]


@pytest.mark.parametrize("name", UNITS)
def test_the_command_of_a_unit_is_valid(name: str) -> None:
    variables, arguments = read_command(name)
    settings = options(arguments)
    assert arguments[0] == name
    assert settings["run"] == "pong"
    assert settings.get("worker_id", 3) == 3
    user = {"worker": "worker-3", "exporter": "observer"}.get(name, name)
    assert variables["RLBROKER_REDIS_USERNAME"] == f"pong-{user}"


@pytest.mark.parametrize("name", UNITS)
def test_passwords_and_keys_are_credentials_and_all_are_used(name: str) -> None:
    loaded = {entry.partition(":")[0] for entry in read_unit(name)["LoadCredential"]}
    used = {value for key, value in read_command(name)[0].items() if key.endswith("_FILE")}
    assert used == {f"/credentials/{name}" for name in loaded}
    user = {"worker": "worker-3", "exporter": "observer"}.get(name, name)
    assert f"password:/etc/rlbroker/passwords/{user}" in read_unit(name)["LoadCredential"]
    assert not re.search("password|@", "\n".join(SETTINGS.values()), re.IGNORECASE)


def test_a_worker_has_time_to_drain_before_it_is_killed() -> None:
    settings = read_unit("worker")
    send_timeout = inspect.signature(WorkerClient).parameters["timeout"].default
    assert int(settings["TimeoutStopSec"][0]) >= 2 * send_timeout + 30
    assert settings["KillSignal"] == ["SIGTERM"]


def test_only_a_failed_process_or_a_learner_that_was_asked_to_leave_is_restarted() -> None:
    for name in UNITS:
        assert read_unit(name)["Restart"] == ["on-failure"]
    learner = read_unit("learner")
    assert learner["RestartForceExitStatus"] == ["75"]
    assert learner["RestartPreventExitStatus"] == ["1"]
    assert {"75", "130"} == set(learner["SuccessExitStatus"][0].split())


def test_the_workers_of_a_machine_share_their_downloads() -> None:
    """The host cache belongs to one user, in a folder that all workers see."""
    assert read_unit("worker")["User"] == read_unit("learner")["User"] == ["rlbroker"]
    assert not {"DynamicUser", "RootDirectory", "TemporaryFileSystem", "RemoveIPC"} & set(read_unit("worker"))


@needs_systemd
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for path in FOLDER.iterdir():
        shutil.copy(path, tmp_path / path.name.replace("@", "@3"))
    units = sorted(str(path) for path in tmp_path.iterdir() if path.suffix in (".service", ".target"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        check=False,
    )
    messages = [line for line in done.stderr.splitlines() if "rlbroker" in line]
    assert (done.returncode, messages) == (0, [])


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_sandboxed(name: str, tmp_path: Path) -> None:
    """The exposure level of `systemd-analyze security` is low. A service without any sandboxing has 10."""
    path = tmp_path / f"{UNITS[name].replace('@', '@3')}.service"
    shutil.copy(FOLDER / f"{UNITS[name]}.service", path)
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
