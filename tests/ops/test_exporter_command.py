"""`rlbroker exporter` on a live run, and the metrics that deploy/ and docs/commands.md name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import typer.main
from conftest import wait_until
from executable import environment, rlbroker, start
from prometheus_client.parser import text_string_to_metric_families

from rlbroker import WorkerClient, WorkerCommunicator
from rlbroker.backend.connection import Connection
from rlbroker.backend.keys import Keys
from rlbroker.local.embedded_server import RedisServer
from rlbroker.metrics.history import read_history
from rlbroker.ops.cli.app import app

RUN, ENDED_RUN = "pong", "over"
ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "rlbroker.json"
PROMETHEUS = ROOT / "deploy" / "prometheus"

#: All allowed labels, without those of `rlbroker_build_info`: workers cannot add any.
LABELS = {"run", "worker", "reason", "le"}

#: Timeout of one scrape; a server that hangs costs half of it.
TIMEOUT_SECONDS = 1.0

Labels = tuple[tuple[str, str], ...]


@dataclass
class Scrape:
    """The result of one scrape: values by name and labels."""

    text: str

    def __post_init__(self) -> None:
        self.types: dict[str, str] = {}
        self.values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(self.text):
            assert family.documentation
            for sample in family.samples:
                self.types[sample.name] = family.type
                labels = tuple(sorted(sample.labels.items()))
                assert labels not in self.values.setdefault(sample.name, {}), f"{sample} appears twice"
                self.values[sample.name][labels] = sample.value

    def value(self, name: str, run: str | None = RUN, **labels: object) -> float | None:
        wanted = {name: str(value) for name, value in labels.items()} | ({"run": run} if run else {})
        return self.values.get(name, {}).get(tuple(sorted(wanted.items())))

    @property
    def names(self) -> set[str]:
        """All names, with that of each histogram without its suffix."""
        histogram = {name.removesuffix("_bucket") for name in self.values if name.endswith("_bucket")}
        return set(self.values) | histogram

    @property
    def counters(self) -> dict[tuple[str, Labels], float]:
        """The counters of whole runs."""
        return {
            (name, labels): value
            for name, by_labels in self.values.items()
            if self.types[name] == "counter" and not name.startswith("rlbroker_worker_")
            for labels, value in by_labels.items()
        }


def scrape(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return Scrape(answer.read().decode())


@contextmanager
def exporting(*arguments: str, **more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run an exporter on a free port; yield its URL and its process."""
    process = start("exporter", "--port", "0", *arguments, **more)
    with process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", url), process.communicate(timeout=10)
            yield url, process
        finally:
            process.kill()


def make_observer(client: Any, url: str) -> str:
    """Create a user that may only read; return its URL."""
    rules = ("%R~rlb:*", "+@read", "+@connection", "+info", "+time", "+scan")
    client.execute_command("ACL", "SETUSER", "watch", "reset", "on", ">secret", *rules)
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc="watch:secret@" + parts.netloc.rpartition("@")[2]).geturl()


@dataclass
class Live:
    """A live run, one that ended, two that cannot be read, and an exporter that may only read them."""

    server: RedisServer
    client: Any
    workers: dict[int, WorkerClient]
    url: str

    def scrape(self) -> Scrape:
        return scrape(self.url)

    def stored(self, run: str) -> dict[bytes, tuple[bytes, int]]:
        keys = self.client.keys(Keys(run).everything.replace("{", r"\{").replace("}", r"\}"))
        ages = {key: self.client.execute_command("PEXPIRETIME", key) for key in keys}
        return {key: (self.client.dump(key), ages[key]) for key in keys}


@pytest.fixture(scope="module")
def live(embedded: RedisServer) -> Iterator[Live]:
    """A learner expects four workers and has three: worker 0 runs version 3, workers 1 and 2 none.

    Worker 0 sent 4 batches, of which 3 were collected and 2 acknowledged; worker 2 sent one. No worker has answered the
    command.
    """
    client = redis.Redis.from_url(embedded.url, protocol=2)
    client.flushall()
    with ExitStack() as stack:
        with WorkerCommunicator(1, redis_url=embedded.url, run=ENDED_RUN) as ended:
            ended.send_model_weights({"w": np.zeros(10, np.float32)})
        learner = stack.enter_context(
            WorkerCommunicator(4, redis_url=embedded.url, run=RUN, acknowledge="manual", max_queue_size=100)
        )
        workers = {
            number: stack.enter_context(WorkerClient(embedded.url, RUN, worker_id=number))
            for number in range(3)
        }
        for _ in range(3):
            learner.send_model_weights({"w": np.zeros(10, np.float32)})
        wait_until("worker 0 runs version 3", lambda: workers[0].poll({}) and workers[0].version == 3)
        for number in (0, 0, 0):
            workers[number].send_experiences({"x": np.zeros((5, 2), np.float32)})
        pairs: list[Any] = []

        def collected() -> bool:
            pairs.extend(learner.collect_experiences())
            return len(pairs) == 3

        wait_until("3 batches are collected", collected)
        learner.acknowledge(pairs[:2])
        for number in (0, 2):
            workers[number].send_experiences({"x": np.zeros((5, 2), np.float32)})
        learner.send_control_command("noop")
        client.hset(Keys("older").meta, "wire_format", 0)
        client.set(Keys("alien").meta, "not a hash")

        connection = Connection(embedded.url)
        stack.callback(connection.close)

        def is_recorded() -> bool:
            newest = read_history(connection, Keys(RUN), count=1)
            version = {info.worker_id: info.version for info in learner.workers()}
            missed = learner.missed_updates()[0]
            return bool(newest) and newest[0].collected == 3 and version[0] == 3 and not missed.behind

        wait_until("history, heartbeats and ledger are written", is_recorded)
        observer_url = make_observer(client, embedded.url)
        url, _ = stack.enter_context(
            exporting("--timeout", str(TIMEOUT_SECONDS), RLBROKER_REDIS_URL=observer_url)
        )
        yield Live(embedded, client, workers, url)
    client.acl_deluser("watch")
    client.flushall()
    client.close()


# Metrics


def test_the_metrics_are_those_of_the_run(live: Live) -> None:
    metrics = live.scrape()
    assert metrics.value("rlbroker_up", None) == 1
    assert metrics.value("rlbroker_weights_version") == 3
    assert (metrics.value("rlbroker_learner_up"), metrics.value("rlbroker_learner_ended")) == (1, 0)
    assert (
        metrics.value("rlbroker_learner_up", ENDED_RUN),
        metrics.value("rlbroker_learner_ended", ENDED_RUN),
    ) == (0, 1)
    assert metrics.value("rlbroker_workers_expected") == 4
    assert metrics.value("rlbroker_worker_version", worker=0) == 3
    assert [metrics.value("rlbroker_worker_staleness_versions", worker=one) for one in (0, 1)] == [0, 3]
    assert metrics.value("rlbroker_batches_produced_total") == 5
    assert metrics.value("rlbroker_worker_batches_delivered_total", worker=0) == 2
    pending = (metrics.value("rlbroker_batches_waiting"), metrics.value("rlbroker_batches_in_hand"))
    assert sum(one or 0 for one in pending) == 3
    assert metrics.value("rlbroker_batches_collected_total") == 3
    assert metrics.value("rlbroker_rows_collected_total") == 15
    assert metrics.value("rlbroker_commands_waiting") == len(live.workers)
    assert (metrics.value("rlbroker_commands_oldest_seconds") or 0) > 0
    assert metrics.value("rlbroker_batch_staleness_versions_bucket", le="0.0") == 3
    assert metrics.value("rlbroker_batch_staleness_versions_count") == 3
    missed = metrics.value("rlbroker_versions_missed_total", reason="superseded")
    assert missed == metrics.value("rlbroker_worker_versions_missed_total", worker=0, reason="superseded")
    assert 0 < (metrics.value("rlbroker_history_age_seconds") or 0) < 60


def test_names_units_and_labels_follow_the_rules_of_prometheus(live: Live) -> None:
    metrics = live.scrape()
    for name, by_labels in metrics.values.items():
        assert (metrics.types[name] == "counter") == name.endswith("_total")
        if name != "rlbroker_build_info":
            assert {label for labels in by_labels for label, _ in labels} <= LABELS, name
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = promtool("check", "metrics", text=metrics.text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_run_that_cannot_be_read_does_not_hide_the_others(live: Live) -> None:
    readable = {
        run: live.scrape().value("rlbroker_run_readable", run) for run in (RUN, ENDED_RUN, "older", "alien")
    }
    assert readable == {RUN: 1, ENDED_RUN: 1, "older": 0, "alien": 0}


def test_a_new_run_appears_and_a_deleted_run_disappears(live: Live) -> None:
    assert live.scrape().value("rlbroker_run_readable", "new") is None
    live.client.sadd(Keys("new").workers, 7)
    try:
        assert live.scrape().value("rlbroker_run_readable", "new") == 1
    finally:
        live.client.delete(Keys("new").workers)
    assert live.scrape().value("rlbroker_run_readable", "new") is None


def test_a_worker_that_left_disappears_and_no_counter_falls(live: Live) -> None:
    before = live.scrape()
    assert before.value("rlbroker_worker_batches_produced_total", worker=2) == 1
    live.workers.pop(2).close()
    wait_until("worker 2 has left", lambda: live.client.hget(Keys(RUN).life(2), "member") == b"0")
    after = live.scrape()
    assert not [
        name for name, by_labels in after.values.items() if any(("worker", "2") in one for one in by_labels)
    ]
    assert after.value("rlbroker_workers_alive") == 2
    assert before.counters.keys() == after.counters.keys()
    assert not [key for key, value in before.counters.items() if after.counters[key] < value]
    assert after.value("rlbroker_batches_produced_total") == 5


def test_a_scrape_changes_nothing(live: Live) -> None:
    before = live.stored(ENDED_RUN)
    assert len(before) > 5
    live.scrape()
    assert live.stored(ENDED_RUN) == before  # and its user may not write


def test_single_metrics_can_be_requested(live: Live) -> None:
    metrics = scrape(f"{live.url}?name[]=rlbroker_weights_version&name[]=rlbroker_up")
    assert metrics.names == {"rlbroker_weights_version", "rlbroker_up"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scrape(live.url.removesuffix("/metrics") + "/other")


# Servers that are away, and the end of the exporter


def test_a_server_that_hangs_is_reported_as_down_until_it_answers(live: Live) -> None:
    assert live.server.pid is not None
    # A scrape that waits too long for the earlier ones is refused.
    with ThreadPoolExecutor(6) as threads:
        os.kill(live.server.pid, signal.SIGSTOP)
        try:
            asked = [threads.submit(live.scrape) for _ in range(6)]
            refused = [one.exception() for one in asked]
        finally:
            os.kill(live.server.pid, signal.SIGCONT)
    answers = [one.result() for one, problem in zip(asked, refused, strict=True) if problem is None]
    assert answers
    assert all("503" in str(problem) for problem in refused if problem)
    for metrics in answers:
        assert metrics.value("rlbroker_up", None) == 0
        assert not any(name.startswith("rlbroker_run") for name in metrics.values)
    wait_until("the server answers again", lambda: live.scrape().value("rlbroker_up", None) == 1)
    assert live.scrape().value("rlbroker_weights_version") == 3


def test_an_exporter_starts_without_a_server_and_ends_after_ctrl_c() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # no server listens on it
        away = f"redis://me:secret@127.0.0.1:{taken.getsockname()[1]}/0"
        with exporting("--timeout", "0.2", RLBROKER_REDIS_URL=away) as (url, process):
            assert [scrape(url).value("rlbroker_up", None) for _ in range(2)] == [0, 0]
            process.send_signal(signal.SIGINT)
            output, log = process.communicate(timeout=10)
    assert (process.returncode, output) == (130, "")
    ready, unreachable = log.splitlines()  # two scrapes log it once
    assert ready.startswith("serving the metrics of all runs on redis://127.0.0.1:")
    assert "cannot be read: cannot reach" in unreachable
    assert "secret" not in log


def test_a_named_run_is_served_alone_and_sigterm_is_not_a_failure(live: Live) -> None:
    with exporting("--run", ENDED_RUN, "-q", RLBROKER_REDIS_URL=live.server.url) as (url, process):
        assert set(scrape(url).values["rlbroker_run_readable"]) == {(("run", ENDED_RUN),)}
        taken = urllib.parse.urlsplit(url).port
        second = rlbroker("exporter", "--port", str(taken), RLBROKER_REDIS_URL=live.server.url)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 0
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == f"rlbroker: cannot listen on 127.0.0.1 port {taken}: Address already in use\n"


def test_a_missing_package_is_reported_with_the_command_that_installs_it() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from rlbroker.ops.cli import main; sys.argv = ['rlbroker', 'exporter']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "rlbroker: the exporter needs prometheus-client: run `pip install 'rlbroker[metrics]'`\n"
    )


# The metrics in the dashboard, the alerts and the docs


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\brlbroker_\w+", text))


def expressions(panels: Iterable[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def plain_query(expression: str) -> str:
    """Return the query that Grafana sends to Prometheus."""
    return re.sub(r"\$(run|worker)\b", ".*", expression.replace("$__rate_interval", "1m"))


def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return board


def queries() -> list[str]:
    board = dashboard()
    variables = [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    notes = [one["expr"] for one in board["annotations"]["list"] if "expr" in one]
    return [*expressions(board["panels"]), *notes, *variables]


def test_the_commands_page_lists_every_metric_with_its_type(live: Live) -> None:
    metrics = live.scrape()
    section = (ROOT / "docs" / "commands.md").read_text().partition("\n## rlbroker exporter\n")[2]
    rows = re.findall(r"^\| `(rlbroker_\w+)` \| (\w+) \|", section.partition("\n## ")[0], re.MULTILINE)
    parts = {f"rlbroker_batch_staleness_versions_{end}" for end in ("bucket", "count", "sum")}
    types = {name: metrics.types[name] for name in metrics.values.keys() - parts}
    types |= {"rlbroker_batch_staleness_versions": "histogram", "rlbroker_worker_fenced_seconds": "gauge"}
    types["rlbroker_build_info"] = "info"
    assert dict(rows) == types
    assert len(rows) == len(types)


def test_dashboard_and_alerts_use_only_existing_metrics(live: Live) -> None:
    existing = live.scrape().names | {"rlbroker_worker_fenced_seconds"}  # absent: no process was fenced
    used = metric_names("\n".join(queries()))
    assert len(used) > 30
    assert not used - existing
    alerts = re.sub(r"^\s*(- name|#).*", "", (PROMETHEUS / "rules.yaml").read_text(), flags=re.MULTILINE)
    assert len(metric_names(alerts)) > 15
    assert not metric_names(alerts) - existing


def test_each_alert_names_a_command_that_works() -> None:
    text = (PROMETHEUS / "rules.yaml").read_text()
    typed = re.findall(r"`(rlbroker [^`]+)`", text)
    assert len(typed) >= text.count("- alert:")
    descriptions = re.findall(r"^ +description: (.*)$", text, re.MULTILINE)
    assert all("`rlbroker " in one for one in descriptions)
    for line in typed:
        words = line.replace("{{ $labels.worker }}", "3").replace("{{ $labels.run }}", RUN).split()[1:]
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        assert command.make_context(line, words, resilient_parsing=False), line


def test_the_dashboard_can_be_drawn_by_grafana(tmp_path: Path) -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] in ("table", "heatmap")
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    assert [one["name"] for one in board["templating"]["list"]] == ["datasource", "run", "worker"]
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    filled = [plain_query(one) for one in expressions(panels)]
    rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(filled)]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", str(tmp_path / "rules.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yaml"),
        ("check", "config", "compose.yaml"),
        ("check", "rules", "rules.yaml"),
        ("test", "rules", "rules_test.yaml"),
    ],
    ids=" ".join,
)
def test_the_files_for_prometheus_are_valid(arguments: tuple[str, ...]) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    *what, name = arguments
    done = promtool(*what, str(PROMETHEUS / name))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_real_prometheus_scrapes_the_metrics(live: Live, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("Prometheus finds its first targets after 5 s: only with --long")
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    config = (PROMETHEUS / "prometheus.yaml").read_text()
    config = config.replace("127.0.0.1:9717", urllib.parse.urlsplit(live.url).netloc)
    config = config.replace("scrape_timeout: 10s", "scrape_timeout: 1s").replace(
        "interval: 15s", "interval: 1s"
    )
    (tmp_path / "prometheus.yaml").write_text(config)
    shutil.copy(PROMETHEUS / "rules.yaml", tmp_path)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yaml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(what: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://{address}/api/v1/{what}", timeout=5) as answer:
                return json.load(answer)["data"]
        except urllib.error.URLError:  # it has not started yet
            return None

    def value(query: str) -> list[str]:
        answer = ask(f"query?query={urllib.parse.quote(query)}")
        return [one["value"][1] for one in answer["result"]] if answer else []

    try:
        wait_until(
            "Prometheus has the metrics", lambda: value(f'rlbroker_weights_version{{run="{RUN}"}}'), 30.0
        )
        assert value(f'rlbroker_weights_version{{run="{RUN}"}}') == ["3"]
        assert value('up{job="rlbroker"}') == ["1"]
        quantile = 'histogram_quantile(0.5, rlbroker_batch_staleness_versions_bucket{run="pong"})'
        assert value(quantile) == ["0"]
        filled = [plain_query(one) for one in expressions(dashboard()["panels"])]
        empty = set(filled)

        def no_panel_is_empty() -> bool:
            empty.difference_update([one for one in empty if value(one)])
            return not empty

        wait_until("no panel is empty", no_panel_is_empty, 60.0)
        wait_until(
            "an alert is pending",
            lambda: [
                one
                for one in ask("alerts")["alerts"]
                if one["labels"]["alertname"] == "RlbrokerWorkersMissing"
            ],
            30.0,
        )
    finally:
        process.terminate()
        process.wait(timeout=10)
