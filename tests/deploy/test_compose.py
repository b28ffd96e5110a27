"""deploy/compose.yaml: what it names is there, and what it starts is what `rlbroker` takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rlbroker.ops.cli.app import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILE = DEPLOY / "compose.yaml"

#: Services that run our image.
OURS = {"learner", "worker", "exporter"}


def with_defaults(text: str) -> str:
    """What Compose makes of it where no variable is set; one without a default would be empty."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)


@pytest.fixture(scope="module")
def compose() -> Any:
    text = with_defaults(FILE.read_text())
    assert "${" not in text, "a variable without a default"
    return yaml.safe_load(text)


def test_the_compose_tool_takes_it() -> None:
    for tool in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(tool[0]) and subprocess.run([*tool, "version"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("there is no Compose here (`docker compose`, or docker-compose 2)")
    command = [*tool, "--file", str(FILE), "--profile", "observability", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_service_starts_a_command_with_options_that_it_has(compose: Any, name: str) -> None:
    command, *arguments = compose["services"][name]["command"]
    group: Any = typer.main.get_command(app)
    found = group.commands[command]
    with found.make_context(command, list(arguments)) as context:
        assert context.params


def test_our_services_are_those_of_our_image(compose: Any) -> None:
    services = compose["services"]
    assert {name for name, one in services.items() if "build" in one} == OURS
    context = (DEPLOY / services["worker"]["build"]["context"]).resolve()
    assert (context / "Dockerfile").is_file()
    arguments = set(re.findall(r"^ARG (\w+)", (context / "Dockerfile").read_text(), re.MULTILINE))
    for name in OURS:
        assert services[name]["build"].get("args", {}).keys() <= arguments
        assert services[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert services["redis"]["healthcheck"]["test"]


def test_every_file_that_is_mounted_is_there(compose: Any) -> None:
    volumes = [one for service in compose["services"].values() for one in service.get("volumes", ())]
    for source, *_ in (one.split(":") for one in volumes):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in compose["volumes"], source


def test_secrets_are_files_that_git_does_not_take(compose: Any) -> None:
    files = [DEPLOY / one["file"] for one in compose["secrets"].values()]
    done = subprocess.run(
        ["git", "check-ignore", *map(str, files), str(DEPLOY / ".env")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [*map(str, files), str(DEPLOY / ".env")], done.stderr
    for name, service in compose["services"].items():
        secrets = [one if isinstance(one, str) else one["source"] for one in service.get("secrets", ())]
        assert set(secrets) <= compose["secrets"].keys()
        targets = {one if isinstance(one, str) else one["target"] for one in service.get("secrets", ())}
        for value in service.get("environment", {}).values():
            if str(value).startswith("/run/secrets/"):
                assert Path(value).name in targets, f"{name} does not get {value}"


def test_workers_can_be_many_and_have_time_to_end(compose: Any) -> None:
    worker = compose["services"]["worker"]
    assert not worker.keys() & {"container_name", "hostname", "ports", "network_mode"}
    assert worker["stop_grace_period"] == "1m"  # what a worker sends at its end takes 10 s at most
    # The health check of the image looks for the run that the commands join.
    for name in ("learner", "worker"):
        assert "--run" not in compose["services"][name]["command"]
        assert compose["services"][name]["environment"]["RLBROKER_RUN"] == "demo"


def test_prometheus_and_grafana_look_where_the_others_are(compose: Any) -> None:
    services = compose["services"]
    given = yaml.safe_load((DEPLOY / "prometheus" / "compose.yaml").read_text())
    job = given["scrape_configs"][0]
    exporter = services["exporter"]["command"]
    assert job["static_configs"][0]["targets"] == [f"exporter:{exporter[exporter.index('--port') + 1]}"]
    ordinary = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    ordinary["scrape_configs"][0]["static_configs"] = job["static_configs"]
    assert given == ordinary
    assert "--config.file=/etc/prometheus/compose.yaml" in services["prometheus"]["command"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    folder = yaml.safe_load((provisioning / "dashboards" / "rlbroker.yaml").read_text())["providers"][0]
    mounted = f"./grafana/rlbroker.json:{folder['options']['path']}/rlbroker.json:ro"
    assert mounted in services["grafana"]["volumes"]
