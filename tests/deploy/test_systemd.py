"""deploy/systemd: the units are what systemd takes, start what can be started, and let it finish."""

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
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not here (Debian: systemd)"
)


def unit(name: str) -> dict[str, list[str]]:
    """Give the settings of a unit as worker 3 of a machine has them; each may stand there several times."""
    text = (FOLDER / f"{UNITS[name]}.service").read_text().replace("\\\n", "")
    found: dict[str, list[str]] = {}
    for line in text.replace("%i", "3").replace("%d", "/credentials").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def started(name: str) -> tuple[dict[str, str], list[str]]:
    """Give the variables that the command is started with, and its arguments."""
    (line,) = unit(name)["ExecStart"]
    words = shlex.split(re.sub(r"\$\{(\w+)\}", lambda found: SETTINGS[found[1]], line))
    assert words[0] == "/usr/bin/env"
    program = words.index("/opt/rlbroker/bin/rlbroker")
    variables = dict(word.split("=", 1) for word in [*unit(name)["Environment"], *words[1:program]])
    return variables, words[program + 1 :]


@pytest.mark.parametrize("name", UNITS)
def test_what_a_unit_starts_is_a_command_that_can_be_typed(name: str) -> None:
    variables, arguments = started(name)
    asked = options(arguments)
    assert arguments[0] == name
    assert asked["run"] == "pong"
    assert asked.get("worker_id", 3) == 3
    user = {"worker": "worker-3", "exporter": "observer"}.get(name, name)
    assert variables["RLBROKER_REDIS_USERNAME"] == f"pong-{user}"


@pytest.mark.parametrize("name", UNITS)
def test_passwords_and_keys_are_credentials_and_each_of_them_is_used(name: str) -> None:
    loaded = {one.partition(":")[0] for one in unit(name)["LoadCredential"]}
    named = {value for key, value in started(name)[0].items() if key.endswith("_FILE")}
    assert named == {f"/credentials/{one}" for one in loaded}
    user = {"worker": "worker-3", "exporter": "observer"}.get(name, name)
    assert f"password:/etc/rlbroker/passwords/{user}" in unit(name)["LoadCredential"]
    assert not re.search("password|@", "\n".join(SETTINGS.values()), re.IGNORECASE)


def test_a_worker_may_send_and_leave_before_it_is_killed() -> None:
    settings = unit("worker")
    sending = inspect.signature(WorkerClient).parameters["timeout"].default
    assert int(settings["TimeoutStopSec"][0]) >= 2 * sending + 30
    assert settings["KillSignal"] == ["SIGTERM"]


def test_what_has_ended_in_order_is_not_started_again_and_a_learner_that_is_moved_is() -> None:
    for name in UNITS:
        assert unit(name)["Restart"] == ["on-failure"]
    learner = unit("learner")
    assert learner["RestartForceExitStatus"] == ["75"]
    assert learner["RestartPreventExitStatus"] == ["1"]
    assert {"75", "130"} == set(learner["SuccessExitStatus"][0].split())


def test_workers_of_a_machine_share_what_they_download() -> None:
    """The host cache belongs to one user, and lies where all of them see it."""
    assert unit("worker")["User"] == unit("learner")["User"] == ["rlbroker"]
    assert not {"DynamicUser", "RootDirectory", "TemporaryFileSystem", "RemoveIPC"} & set(unit("worker"))


@needs_systemd
def test_systemd_takes_the_units(tmp_path: Path) -> None:
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
    ours = [line for line in done.stderr.splitlines() if "rlbroker" in line]
    assert (done.returncode, ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_shut_in(name: str, tmp_path: Path) -> None:
    """systemd's own measure: 10 is a service without any limits."""
    path = tmp_path / f"{UNITS[name].replace('@', '@3')}.service"
    shutil.copy(FOLDER / f"{UNITS[name]}.service", path)
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
