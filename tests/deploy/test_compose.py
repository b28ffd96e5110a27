"""Tests of deploy/compose.yaml: its files exist, and `rlbroker` accepts its commands."""

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

#: Services that run the image of the Dockerfile.
RLBROKER_SERVICES = {"learner", "worker", "exporter"}


def fill_in_defaults(text: str) -> str:
    """Return the text as Compose reads it if no variable is set."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)


@pytest.fixture(scope="module")
def compose() -> Any:
    text = fill_in_defaults(FILE.read_text())
    assert "${" not in text, "a variable has no default, so it would be empty"
    return yaml.safe_load(text)


def test_compose_accepts_the_file() -> None:
    for tool in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(tool[0]) and subprocess.run([*tool, "version"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("Compose is not installed (`docker compose`, or docker-compose 2)")
    command = [*tool, "--file", str(FILE), "--profile", "observability", "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(RLBROKER_SERVICES))
def test_the_command_of_a_service_is_valid(compose: Any, name: str) -> None:
    command, *arguments = compose["services"][name]["command"]
    group: Any = typer.main.get_command(app)
    found = group.commands[command]
    with found.make_context(command, list(arguments)) as context:
        assert context.params


def test_the_rlbroker_services_use_the_dockerfile(compose: Any) -> None:
    services = compose["services"]
    assert {name for name, service in services.items() if "build" in service} == RLBROKER_SERVICES
    context = (DEPLOY / services["worker"]["build"]["context"]).resolve()
    assert (context / "Dockerfile").is_file()
    arguments = set(re.findall(r"^ARG (\w+)", (context / "Dockerfile").read_text(), re.MULTILINE))
    for name in RLBROKER_SERVICES:
        assert services[name]["build"].get("args", {}).keys() <= arguments
        assert services[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert services["redis"]["healthcheck"]["test"]


def test_every_mounted_file_exists(compose: Any) -> None:
    volumes = [volume for service in compose["services"].values() for volume in service.get("volumes", ())]
    for source, *_ in (volume.split(":") for volume in volumes):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in compose["volumes"], source


def test_secrets_are_files_that_git_ignores(compose: Any) -> None:
    files = [DEPLOY / secret["file"] for secret in compose["secrets"].values()]
    done = subprocess.run(
        ["git", "check-ignore", *map(str, files), str(DEPLOY / ".env")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [*map(str, files), str(DEPLOY / ".env")], done.stderr
    for name, service in compose["services"].items():
        secrets = [
            entry if isinstance(entry, str) else entry["source"] for entry in service.get("secrets", ())
        ]
        assert set(secrets) <= compose["secrets"].keys()
        targets = {
            entry if isinstance(entry, str) else entry["target"] for entry in service.get("secrets", ())
        }
        for value in service.get("environment", {}).values():
            if str(value).startswith("/run/secrets/"):
                assert Path(value).name in targets, f"{name} does not get {value}"


def test_workers_can_be_scaled_and_have_time_to_drain(compose: Any) -> None:
    worker = compose["services"]["worker"]
    assert not worker.keys() & {"container_name", "hostname", "ports", "network_mode"}
    assert worker["stop_grace_period"] == "1m"  # draining takes at most 20 s and one batch
    # The health check of the image uses RLBROKER_RUN, so the commands must join the same run.
    for name in ("learner", "worker"):
        assert "--run" not in compose["services"][name]["command"]
        assert compose["services"][name]["environment"]["RLBROKER_RUN"] == "demo"


def test_prometheus_and_grafana_have_the_right_addresses(compose: Any) -> None:
    services = compose["services"]
    config = yaml.safe_load((DEPLOY / "prometheus" / "compose.yaml").read_text())
    job = config["scrape_configs"][0]
    exporter = services["exporter"]["command"]
    assert job["static_configs"][0]["targets"] == [f"exporter:{exporter[exporter.index('--port') + 1]}"]
    ordinary = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    ordinary["scrape_configs"][0]["static_configs"] = job["static_configs"]
    assert config == ordinary
    assert "--config.file=/etc/prometheus/compose.yaml" in services["prometheus"]["command"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    folder = yaml.safe_load((provisioning / "dashboards" / "rlbroker.yaml").read_text())["providers"][0]
    mounted = f"./grafana/rlbroker.json:{folder['options']['path']}/rlbroker.json:ro"
    assert mounted in services["grafana"]["volumes"]
