"""deploy/k8s: what it starts can be started, what it stops may finish, and the number of workers comes to rest."""

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


def documents(*parts: str) -> list[dict[str, Any]]:
    return [one for part in parts for one in yaml.safe_load_all((FOLDER / part).read_text())]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for one in documents(
        "base/learner.yaml", "base/workers.yaml", "base/exporter.yaml", "server/server.yaml"
    ):
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


PODS = dict(pods())
OURS = ("learner", "workers", "exporter")


@pytest.mark.parametrize("name", OURS)
def test_what_a_pod_starts_is_a_command_that_can_be_typed(name: str) -> None:
    arguments = PODS[name]["containers"][0]["args"]
    typed = [re.sub(r"\$\((\w+)\)", lambda found: RUN[found[1]], one) for one in arguments]
    assert options(typed)["run"] == RUN["RLBROKER_RUN"] == "pong"


def test_a_worker_in_a_pod_takes_a_free_id_and_waits_for_its_learner() -> None:
    container = PODS["workers"]["containers"][0]
    asked = options([re.sub(r"\$\((\w+)\)", "1", one) for one in container["args"]])
    assert asked["worker_id"] is None
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= asked["timeout"] > 60


def test_a_pod_may_finish_before_it_is_killed() -> None:
    """A worker sends one batch and leaves, a learner cleans up; each within its timeout."""
    sending = inspect.signature(WorkerClient).parameters["timeout"].default
    cleaning = inspect.signature(WorkerCommunicator).parameters["timeout"].default
    assert PODS["workers"]["terminationGracePeriodSeconds"] >= 2 * sending + 30
    assert PODS["learner"]["terminationGracePeriodSeconds"] >= cleaning + 30


@pytest.mark.parametrize("name", OURS)
def test_a_server_that_is_away_kills_no_pod(name: str) -> None:
    """Learner, workers and exporter outlast it; what asks the server must not be what has them killed."""
    assert set(PODS[name]["containers"][0].get("livenessProbe", {})) <= {"tcpSocket", "periodSeconds"}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
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
def test_the_host_cache_has_shared_memory_within_the_pods_own(name: str) -> None:
    (volume,) = (one for one in PODS[name]["volumes"] if one["name"] == "shared-memory")
    assert volume["emptyDir"]["medium"] == "Memory"
    limit = PODS[name]["containers"][0]["resources"]["limits"]["memory"]
    assert _bytes(volume["emptyDir"]["sizeLimit"]) * 2 <= _bytes(limit)


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


@pytest.mark.parametrize("name", OURS)
def test_each_role_is_its_own_user_and_its_password_is_a_file(name: str) -> None:
    said = {one["name"]: one["value"] for one in PODS[name]["containers"][0]["env"]}
    user = {"exporter": "observer"}.get(name, name)
    assert said["RLBROKER_REDIS_USERNAME"] == f"$(RLBROKER_RUN)-{user}"
    mounts = {one["name"]: one["mountPath"] for one in PODS[name]["containers"][0]["volumeMounts"]}
    assert said["RLBROKER_REDIS_PASSWORD_FILE"] == f"{mounts['password']}/password"
    assert {one["secret"]["secretName"] for one in PODS[name]["volumes"] if "secret" in one} == {user, "tls"}


def test_there_is_no_password_in_what_is_shipped() -> None:
    shipped = [path for path in FOLDER.rglob("*") if path.is_file() and "secrets" not in path.parts]
    text = "\n".join(path.read_text() for path in shipped if "files" not in path.parts)
    assert not re.search(r"redis[s]?://[^/\s]*@", text)
    assert not re.search(r"^\s*(literals|stringData|data):", text, re.MULTILINE)


# How many workers


SCALER = documents("keda/scaler.yaml")[0]["spec"]
QUERY = SCALER["triggers"][0]["metadata"]["query"]


def test_the_query_names_figures_that_the_exporter_has() -> None:
    known = {figure.name for figure in RUN_METRICS} | {figure.name for figure in LEARNER_METRICS}
    named = set(re.findall(r"rlbroker_\w+", QUERY))
    assert named <= known
    assert not any("waiting" in name or "queue" in name for name in named)


class Training:
    """A learner that could use so many workers, looked at each 15 seconds by a Prometheus."""

    STEP = 15
    WINDOW = 120

    def __init__(self, *, useful: float, workers: int, joining_seconds: int = 30) -> None:
        self.useful, self.workers = useful, workers
        self.joining: deque[float] = deque([float(workers)] * (joining_seconds // self.STEP))
        self.series = {
            "rlbroker_workers_alive": [float(workers)],
            "rlbroker_room_seconds_total": [0.0],
            "rlbroker_collect_wait_seconds_total": [0.0],
        }
        self.wanted: list[tuple[int, float]] = []

    def go_on(self) -> None:
        self.joining.append(self.workers)
        sending = min(self.joining.popleft(), self.workers)  # they are alive before they send
        busy = min(1.0, sending / self.useful)
        self._add("rlbroker_workers_alive", self.workers)
        for name, share in (
            ("rlbroker_room_seconds_total", max(0.0, sending - self.useful)),
            ("rlbroker_collect_wait_seconds_total", 1.0 - busy),
        ):
            self._add(name, self.series[name][-1] + share * self.STEP)

    def _add(self, name: str, value: float) -> None:
        self.series[name] = [*self.series[name], value][-self.WINDOW // self.STEP - 1 :]

    def ask(self) -> float:
        """Give what Prometheus would answer to the query."""
        asked = re.sub(r'(\w+)\{run="RUN"\}\[2m\]', r'series["\1"]', QUERY)
        functions: dict[str, Any] = {
            "series": self.series,
            "rate": lambda some: (some[-1] - some[0]) / max(1, len(some) - 1) / self.STEP,
            "avg_over_time": lambda some: sum(some) / len(some),
            "max": float,
            "clamp_min": max,
        }
        return float(eval(asked, {"__builtins__": {}}, functions))  # only what is above

    def scale(self, now: int) -> None:
        """Do what the autoscaler of Kubernetes does with a number of replicas that is wanted."""
        wanted = self.ask() / float(SCALER["triggers"][0]["metadata"]["threshold"])
        near = abs(wanted / self.workers - 1.0) <= 0.1
        self.wanted.append((now, self.workers if near else math.ceil(wanted)))
        behaviour = SCALER["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        up, down = (
            [one for at, one in self.wanted if now - at <= behaviour[way]["stabilizationWindowSeconds"]]
            for way in ("scaleUp", "scaleDown")
        )
        lowest, highest = min(up), max(down)
        growth, shrinking = (behaviour[way]["policies"][0] for way in ("scaleUp", "scaleDown"))
        if lowest > self.workers and now % growth["periodSeconds"] == 0:
            self.workers = min(math.ceil(lowest), self.workers * (100 + growth["value"]) // 100)
        elif highest < self.workers and now % shrinking["periodSeconds"] == 0:
            least = self.workers * (100 - shrinking["value"]) // 100
            self.workers = max(math.ceil(highest), least)
        self.workers = min(max(self.workers, SCALER["minReplicaCount"]), SCALER["maxReplicaCount"])


@pytest.mark.parametrize("workers", [2, 19, 50])
@pytest.mark.parametrize("useful", [3.0, 20.0, 47.5])
def test_the_number_of_workers_comes_to_what_the_learner_can_use(workers: int, useful: float) -> None:
    training = Training(useful=useful, workers=workers)
    numbers = []
    for now in range(0, 4 * 3600, Training.STEP):
        training.go_on()
        training.scale(now)
        numbers.append(training.workers)
    last_hour = numbers[-3600 // Training.STEP :]
    assert len(set(last_hour)) == 1, "it does not come to rest"
    assert useful * 0.9 <= last_hour[0] <= useful * 1.1 + 1
    assert max(numbers) <= max(workers, useful * 1.25 + 1), "it shoots over"


def test_batches_that_wait_never_add_workers() -> None:
    training = Training(useful=5.0, workers=20)
    for _ in range(40):
        training.go_on()
        assert training.ask() <= 20
    assert training.ask() == pytest.approx(5.0)


def test_a_learner_that_is_away_changes_nothing() -> None:
    """Its sums stand still, and nobody knows how many workers it will want."""
    training = Training(useful=20.0, workers=20)
    training.useful = math.inf
    for _ in range(20):
        training.go_on()
        training.series["rlbroker_collect_wait_seconds_total"][-1] = 0.0
    assert training.ask() == pytest.approx(20.0)


# With kubectl


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here")
def test_without_secrets_nothing_is_rendered_and_with_them_all_of_it(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k8s", ignore=lambda folder, names: {"secrets", "files"} & set(names))
    refused = _render(tmp_path / "k8s" / "pong")
    assert refused.returncode != 0
    assert "secrets/pong-learner" in refused.stderr
    with_all = _fill(tmp_path / "k8s")
    rendered = [one for one in yaml.safe_load_all(with_all.stdout) if one]
    names = {(one["kind"], one["metadata"]["name"]) for one in rendered if one["kind"] != "Secret"}
    assert {("StatefulSet", "pong-learner"), ("Deployment", "pong-workers")} <= names
    assert {("StatefulSet", "pong-redis"), ("ScaledObject", "pong-workers")} <= names
    by_kind = {one["kind"]: one for one in rendered}
    scaler = by_kind["ScaledObject"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "pong-workers"
    assert scaler["triggers"][0]["metadata"]["query"] == QUERY.replace("RUN", "pong")
    (workers,) = (
        one for one in rendered if (one["kind"], one["metadata"]["name"]) == ("Deployment", "pong-workers")
    )
    assert "replicas" not in workers["spec"]
    container = workers["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example.com/rlbroker:0.1.0"
    assert "RLBROKER_SIGNING_KEY_FILE" in {one["name"] for one in container["env"]}
    secrets = {one["metadata"]["name"] for one in rendered if one["kind"] == "Secret"}
    for one in workers["spec"]["template"]["spec"]["volumes"]:
        assert "secret" not in one or one["secret"]["secretName"] in secrets


def _render(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)


def _fill(folder: Path) -> subprocess.CompletedProcess[str]:
    """Render all of it, with files of which only the names count."""
    for kustomization in folder.glob("*/kustomization.yaml"):
        text = kustomization.read_text()
        for name in re.findall(r"\b(?:secrets|files)/[\w.-]+", text):
            path = kustomization.parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
    kustomization = folder / "pong" / "kustomization.yaml"
    kustomization.write_text(re.sub(r"# (- \.\./\w+)", r"\1", kustomization.read_text()))  # as a person does
    done = _render(folder / "pong")
    assert done.returncode == 0, done.stderr
    return done
