"""Tests of deploy/k8s: commands, time to drain, rights of the pods, and the scaling of the workers."""

from __future__ import annotations

import inspect
import math
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typed import options

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.ops.exporter.metrics import LEARNER_METRICS, RUN_METRICS

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[2] / "deploy" / "k8s"
RUN = dict(line.split("=", 1) for line in (FOLDER / "pong" / "run.env").read_text().split())


def load_documents(*names: str) -> list[dict[str, Any]]:
    return [document for name in names for document in yaml.safe_load_all((FOLDER / name).read_text())]


def find_pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in load_documents(
        "base/learner.yaml", "base/workers.yaml", "base/exporter.yaml", "server/server.yaml"
    ):
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


PODS = dict(find_pods())
RLBROKER_PODS = ("learner", "workers", "exporter")


@pytest.mark.parametrize("name", RLBROKER_PODS)
def test_the_command_of_a_pod_is_valid(name: str) -> None:
    arguments = PODS[name]["containers"][0]["args"]
    filled_in = [re.sub(r"\$\((\w+)\)", lambda found: RUN[found[1]], text) for text in arguments]
    assert options(filled_in)["run"] == RUN["RLBROKER_RUN"] == "pong"


def test_a_worker_pod_takes_a_free_id_and_waits_for_its_learner() -> None:
    container = PODS["workers"]["containers"][0]
    settings = options([re.sub(r"\$\((\w+)\)", "1", text) for text in container["args"]])
    assert settings["worker_id"] is None
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= settings["timeout"] > 60


def test_a_pod_has_time_to_finish_before_it_is_killed() -> None:
    """A worker sends one batch and leaves, a learner cleans up. Each step is bounded by a timeout."""
    send_timeout = inspect.signature(WorkerClient).parameters["timeout"].default
    cleanup_timeout = inspect.signature(WorkerCommunicator).parameters["timeout"].default
    assert PODS["workers"]["terminationGracePeriodSeconds"] >= 2 * send_timeout + 30
    assert PODS["learner"]["terminationGracePeriodSeconds"] >= cleanup_timeout + 30


@pytest.mark.parametrize("name", RLBROKER_PODS)
def test_an_outage_of_the_server_kills_no_pod(name: str) -> None:
    """Learner, workers and exporter survive an outage, so their liveness probes must not use the server."""
    assert set(PODS[name]["containers"][0].get("livenessProbe", {})) <= {"tcpSocket", "periodSeconds"}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_only_the_rights_that_it_needs(name: str) -> None:
    pod, (container,) = PODS[name], PODS[name]["containers"]
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == (999 if name == "redis" else 10001)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert re.search(r":\d+\.\d+\.\d+$", container["image"])
    assert {"requests", "limits"} <= set(container["resources"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} <= mounted
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", ["learner", "workers"])
def test_the_host_cache_fits_into_the_memory_of_the_pod(name: str) -> None:
    (volume,) = (volume for volume in PODS[name]["volumes"] if volume["name"] == "shared-memory")
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = PODS[name]["containers"][0]["resources"]["limits"]["memory"]
    assert _parse_bytes(volume["emptyDir"]["sizeLimit"]) * 2 <= _parse_bytes(limit)


def _parse_bytes(quantity: str) -> int:
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


@pytest.mark.parametrize("name", RLBROKER_PODS)
def test_each_role_has_its_own_user_and_reads_its_password_from_a_file(name: str) -> None:
    variables = {entry["name"]: entry["value"] for entry in PODS[name]["containers"][0]["env"]}
    user = {"exporter": "observer"}.get(name, name)
    assert variables["RLBROKER_REDIS_USERNAME"] == f"$(RLBROKER_RUN)-{user}"
    mounts = {mount["name"]: mount["mountPath"] for mount in PODS[name]["containers"][0]["volumeMounts"]}
    assert variables["RLBROKER_REDIS_PASSWORD_FILE"] == f"{mounts['password']}/password"
    secrets = {volume["secret"]["secretName"] for volume in PODS[name]["volumes"] if "secret" in volume}
    assert secrets == {user, "tls"}


def test_no_file_of_the_repository_contains_a_password() -> None:
    paths = [path for path in FOLDER.rglob("*") if path.is_file() and "secrets" not in path.parts]
    text = "\n".join(path.read_text() for path in paths if "files" not in path.parts)
    assert not re.search(r"redis[s]?://[^/\s]*@", text)
    assert not re.search(r"^\s*(literals|stringData|data):", text, re.MULTILINE)


# The number of workers


SCALER = load_documents("keda/scaler.yaml")[0]["spec"]
QUERY = SCALER["triggers"][0]["metadata"]["query"]


def test_the_query_uses_metrics_of_the_exporter() -> None:
    known = {metric.name for metric in RUN_METRICS} | {metric.name for metric in LEARNER_METRICS}
    used = set(re.findall(r"rlbroker_\w+", QUERY))
    assert used <= known
    assert not any("waiting" in name or "queue" in name for name in used)


class SimulatedTraining:
    """A simulation of workers, a learner that can use ``useful`` of them, Prometheus and the autoscaler."""

    STEP_SECONDS = 15
    WINDOW_SECONDS = 120

    def __init__(self, *, useful: float, workers: int, joining_seconds: int = 30) -> None:
        self.useful, self.workers = useful, workers
        self.joining: deque[float] = deque([float(workers)] * (joining_seconds // self.STEP_SECONDS))
        self.series = {
            "rlbroker_workers_alive": [float(workers)],
            "rlbroker_room_seconds_total": [0.0],
            "rlbroker_collect_wait_seconds_total": [0.0],
        }
        self.wanted: list[tuple[int, float]] = []

    def advance(self) -> None:
        self.joining.append(self.workers)
        sending = min(self.joining.popleft(), self.workers)  # a new worker is alive before it sends
        busy = min(1.0, sending / self.useful)
        self._add("rlbroker_workers_alive", self.workers)
        for name, share in (
            ("rlbroker_room_seconds_total", max(0.0, sending - self.useful)),
            ("rlbroker_collect_wait_seconds_total", 1.0 - busy),
        ):
            self._add(name, self.series[name][-1] + share * self.STEP_SECONDS)

    def _add(self, name: str, value: float) -> None:
        self.series[name] = [*self.series[name], value][-self.WINDOW_SECONDS // self.STEP_SECONDS - 1 :]

    def evaluate_query(self) -> float:
        """Return the result of the scaler's query in Prometheus."""
        expression = re.sub(r'(\w+)\{run="RUN"\}\[2m\]', r'series["\1"]', QUERY)
        functions: dict[str, Any] = {
            "series": self.series,
            "rate": lambda values: (values[-1] - values[0]) / max(1, len(values) - 1) / self.STEP_SECONDS,
            "avg_over_time": lambda values: sum(values) / len(values),
            "max": float,
            "clamp_min": max,
        }
        return float(eval(expression, {"__builtins__": {}}, functions))  # only the names above are visible

    def scale(self, now: int) -> None:
        """Change the number of workers as the autoscaler of Kubernetes does."""
        wanted = self.evaluate_query() / float(SCALER["triggers"][0]["metadata"]["threshold"])
        near = abs(wanted / self.workers - 1.0) <= 0.1
        self.wanted.append((now, self.workers if near else math.ceil(wanted)))
        behaviour = SCALER["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        up, down = (
            [
                number
                for at, number in self.wanted
                if now - at <= behaviour[direction]["stabilizationWindowSeconds"]
            ]
            for direction in ("scaleUp", "scaleDown")
        )
        lowest, highest = min(up), max(down)
        growth, shrinking = (behaviour[direction]["policies"][0] for direction in ("scaleUp", "scaleDown"))
        if lowest > self.workers and now % growth["periodSeconds"] == 0:
            self.workers = min(math.ceil(lowest), self.workers * (100 + growth["value"]) // 100)
        elif highest < self.workers and now % shrinking["periodSeconds"] == 0:
            least = self.workers * (100 - shrinking["value"]) // 100
            self.workers = max(math.ceil(highest), least)
        self.workers = min(max(self.workers, SCALER["minReplicaCount"]), SCALER["maxReplicaCount"])


@pytest.mark.parametrize("workers", [2, 19, 50])
@pytest.mark.parametrize("useful", [3.0, 20.0, 47.5])
def test_the_number_of_workers_converges_to_what_the_learner_can_use(workers: int, useful: float) -> None:
    training = SimulatedTraining(useful=useful, workers=workers)
    numbers = []
    for now in range(0, 4 * 3600, SimulatedTraining.STEP_SECONDS):
        training.advance()
        training.scale(now)
        numbers.append(training.workers)
    last_hour = numbers[-3600 // SimulatedTraining.STEP_SECONDS :]
    assert len(set(last_hour)) == 1, "the number does not converge"
    assert useful * 0.9 <= last_hour[0] <= useful * 1.1 + 1
    assert max(numbers) <= max(workers, useful * 1.25 + 1), "the number overshoots"


def test_waiting_batches_never_add_workers() -> None:
    training = SimulatedTraining(useful=5.0, workers=20)
    for _ in range(40):
        training.advance()
        assert training.evaluate_query() <= 20
    assert training.evaluate_query() == pytest.approx(5.0)


def test_the_number_does_not_change_while_the_learner_is_away() -> None:
    """Its counters do not change, and how many workers it will need is unknown."""
    training = SimulatedTraining(useful=20.0, workers=20)
    training.useful = math.inf
    for _ in range(20):
        training.advance()
        training.series["rlbroker_collect_wait_seconds_total"][-1] = 0.0
    assert training.evaluate_query() == pytest.approx(20.0)


# Rendering with kubectl


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_the_run_renders_only_with_its_secrets(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k8s", ignore=lambda folder, names: {"secrets", "files"} & set(names))
    failed = _render(tmp_path / "k8s" / "pong")
    assert failed.returncode != 0
    assert "secrets/pong-learner" in failed.stderr
    complete = _render_with_all_files(tmp_path / "k8s")
    rendered = [document for document in yaml.safe_load_all(complete.stdout) if document]
    names = {_kind_and_name(document) for document in rendered if document["kind"] != "Secret"}
    assert {("StatefulSet", "pong-learner"), ("Deployment", "pong-workers")} <= names
    assert {("StatefulSet", "pong-redis"), ("ScaledObject", "pong-workers")} <= names
    by_kind = {document["kind"]: document for document in rendered}
    scaler = by_kind["ScaledObject"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "pong-workers"
    assert scaler["triggers"][0]["metadata"]["query"] == QUERY.replace("RUN", "pong")
    (workers,) = (
        document for document in rendered if _kind_and_name(document) == ("Deployment", "pong-workers")
    )
    assert "replicas" not in workers["spec"]
    container = workers["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example.com/rlbroker:0.1.0"
    assert "RLBROKER_SIGNING_KEY_FILE" in {entry["name"] for entry in container["env"]}
    secrets = {document["metadata"]["name"] for document in rendered if document["kind"] == "Secret"}
    for volume in workers["spec"]["template"]["spec"]["volumes"]:
        assert "secret" not in volume or volume["secret"]["secretName"] in secrets


def _kind_and_name(document: dict[str, Any]) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def _render(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)


def _render_with_all_files(folder: Path) -> subprocess.CompletedProcess[str]:
    """Render the run with all components; the content of its files does not matter."""
    for kustomization in folder.glob("*/kustomization.yaml"):
        text = kustomization.read_text()
        for name in re.findall(r"\b(?:secrets|files)/[\w.-]+", text):
            path = kustomization.parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
    kustomization = folder / "pong" / "kustomization.yaml"
    # Enable all components.
    kustomization.write_text(re.sub(r"# (- \.\./\w+)", r"\1", kustomization.read_text()))
    done = _render(folder / "pong")
    assert done.returncode == 0, done.stderr
    return done
