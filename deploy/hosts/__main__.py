"""`deploy/test-hosts`: train on several hosts, cut one off, and check the results."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from deploy.hosts import checks
from deploy.hosts.deployment import RUN, Deployment, query_rlbroker, refusal_of, rlbroker, user_of
from deploy.hosts.network import Network
from deploy.hosts.training import LearnerReports, Processes
from rlbroker.backend.keys import Keys

SERVER, LEARNER, STAYING, LEAVING = "server", "learner", "workers-a", "workers-b"

#: Units of a layer. A version then has 0.1 MB: most of the traffic is weights, and the host cache (from 64 KB) is used.
HIDDEN = 128

#: The traffic of a link is measured over at least this many versions.
MIN_VERSIONS = 8

#: How many characters of an observation are printed in the summary.
OBSERVED_CHARACTERS = 110

#: Timeouts for the start of all processes on few cores, and for a host's return. Both usually take seconds.
START_SECONDS, RETURN_SECONDS = 180.0, 60.0


class MissingRequirement(Exception):
    """A program or feature is missing on this machine; the message says how to get it."""


class MultiHostTest:
    """The test, from the first namespace to the last check."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        """Set up hosts and certificates. The stack removes them."""
        self._seconds, self._cut_seconds = options.seconds, options.cut_seconds
        self._started = time.monotonic()
        self._checks: list[checks.Check] = []
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlbroker-hosts-")))
        network = Network([SERVER, LEARNER, STAYING, LEAVING])
        self._network = stack.enter_context(network.open())
        self._processes = stack.enter_context(Processes(self._folder).end_at_exit())
        self._hosts = network.hosts
        count = options.workers
        self._workers = {STAYING: list(range(count)), LEAVING: list(range(count, 2 * count))}
        self._log(f"hosts: {', '.join(f'{host.name} {host.address}' for host in self._hosts.values())}")
        self._deployment = Deployment(self._folder, self._hosts[SERVER], 2 * count)
        self._observer = self._deployment.environment(self._hosts[LEARNER], f"{RUN}-observer")

    def run(self) -> bool:
        """Run the test; return whether all checks passed.

        Raises:
            RuntimeError, TimeoutError: a process ended too early, or an expected event did not happen in time.
            MissingRequirement: the server lacks a feature.
        """
        self._start_server()
        reports = self._start_training()
        self._check_refusals()
        self._train(reports)
        cut = self._cut_off(reports)
        self._wait_for_return(reports, cut)
        self._end(reports)
        return self._summary()

    def _start_server(self) -> None:
        host, log = self._hosts[SERVER], self._processes.log_of(SERVER)
        self._processes.start(SERVER, host, self._deployment.server_command(log), dict(os.environ))
        observer = self._hosts[LEARNER], f"{RUN}-observer"
        try:
            self._wait(
                "the server answers", lambda: self._deployment.redis_cli(*observer, "PING") == "PONG", 20.0
            )
        except RuntimeError:
            if "tls" in self._processes.tail_of(SERVER).lower():
                program = self._deployment.program
                raise MissingRequirement(
                    f"{program} was built without TLS; Debian's package has it: apt-get install redis-server"
                ) from None
            raise
        self._log("server: deploy/redis with TLS, client certificates, and a user for each worker")

    def _start_training(self) -> LearnerReports:
        common = ["--run", RUN, "--env", "CartPole-v1", "--hidden", str(HIDDEN)]
        count = sum(map(len, self._workers.values()))
        # A target out of reach, so that the learner trains until the test stops it.
        learner = rlbroker(
            *("learner", *common, "--workers", str(count), "--target", "1e9", "--minutes", "600"),
            *("--progress", "json"),
        )
        self._log(f"starting a learner and {count} workers")
        host = self._hosts[LEARNER]
        process = self._processes.start(
            LEARNER, host, learner, self._deployment.environment(host, f"{RUN}-learner")
        )
        assert process.stdout is not None
        reports = LearnerReports.read_from(process.stdout)
        self._outputs = {}
        for name, workers in self._workers.items():
            for worker in workers:
                process = self._processes.start(
                    f"worker-{worker}",
                    self._hosts[name],
                    rlbroker(
                        "worker", *common, "--worker-id", str(worker), "--timeout", f"{START_SECONDS:g}"
                    ),
                    self._deployment.environment(self._hosts[name], user_of(worker)),
                )
                assert process.stdout is not None
                self._outputs[worker] = process.stdout
        all_workers = self._workers[STAYING] + self._workers[LEAVING]
        self._wait(
            "a batch of each worker has arrived",
            lambda: all(reports.collection_times(worker, 0.0) for worker in all_workers),
            START_SECONDS,
        )
        self._log("batches of all workers have arrived")
        return reports

    def _check_refusals(self) -> None:
        """Check that a worker's host cannot do more than its user may."""
        host = self._hosts[LEAVING]
        worker = self._workers[LEAVING][0]
        environment = self._deployment.environment(host, user_of(worker))
        own, other = user_of(worker), Keys(RUN).experiences(self._workers[STAYING][0])

        without_certificate = {
            name: value for name, value in environment.items() if "CERTIFICATE" not in name
        }
        without_certificate.pop("RLBROKER_TLS_KEY_FILE")
        self._check_refused(
            "a client without a certificate", refusal_of(host, without_certificate, "runs"), "certificate"
        )

        wrong = self._folder / "wrong"
        wrong.write_text("not-the-password\n")
        self._check_refused(
            "a wrong password",
            refusal_of(host, environment | {"RLBROKER_REDIS_PASSWORD_FILE": str(wrong)}, "runs"),
            "invalid username-password pair",
        )

        manifest = Keys(RUN).weights
        if not self._deployment.redis_cli(host, own, "HGET", manifest, "version").isdecimal():
            raise RuntimeError(f"{own} cannot read the latest version, but it must be able to")
        for what, command in {
            "a worker's own version of the weights": ("HSET", manifest, "version", "999999"),
            "a worker's batch in another one's queue": ("XADD", other, "*", "data", "x"),
            "a worker's new script": ("EVAL", "return 1", "0"),
        }.items():
            self._check_refused(what, self._deployment.redis_cli(host, own, *command), "NOPERM")

    def _check_refused(self, what: str, answer: str, expected: str) -> None:
        self._check(checks.check_refused(what, answer, expected))

    def _train(self, reports: LearnerReports) -> None:
        """Train for a while, and measure the traffic on the links of the worker hosts."""
        measured = [self._hosts[STAYING], self._hosts[LEAVING]]
        first, before = reports.version, [self._network.received_bytes(host) for host in measured]
        started, steps = time.monotonic(), reports.steps
        self._sleep(self._seconds)
        # The time of a version is known only to a quarter of a second, so measure over several versions.
        self._wait(
            "enough versions are published", lambda: reports.version >= first + MIN_VERSIONS, START_SECONDS
        )
        last, after = reports.version, [self._network.received_bytes(host) for host in measured]
        seconds = time.monotonic() - started
        rate = (reports.steps - steps) / seconds
        self._log(f"trained for {seconds:.0f} s: versions {first} to {last}, {rate:,.0f} steps/s")
        sizes = [form["stored_bytes"] for form in self._query("weights", "list")["forms"]]
        stored = round(sum(sizes) / len(sizes) * (last - first))
        for host, earlier, later in zip(measured, before, after, strict=True):
            count = len(self._workers[host.name])
            self._check(checks.check_weights_cross_once(host.name, later - earlier, stored, count))

    def _cut_off(self, reports: LearnerReports) -> checks.Cut:
        """Cut a host off and reconnect it; check the training meanwhile."""
        host = self._hosts[LEAVING]
        self._network.cut(host)
        started = time.monotonic()
        self._log(f"{host.name} is cut off: its link stays up, no frame passes")
        self._sleep(1.0)  # batches may still have been on their way at the cut
        first = reports.version
        self._sleep(self._cut_seconds - 2.0)
        members = self._query("workers")["workers"]
        states = [members[str(worker)]["member"]["state"] for worker in self._workers[LEAVING]]
        self._sleep(max(0.0, started + self._cut_seconds - time.monotonic()))
        last, ended = reports.version, time.monotonic()
        self._network.reconnect(host)
        self._log(f"{host.name} is reconnected after {ended - started:.1f} s; the latest version is {last}")
        cut = checks.Cut(started, ended, first, last)
        self._check(checks.check_training_continued(reports, cut, self._workers[STAYING]))
        self._check(checks.check_host_was_away(reports, cut, self._workers[LEAVING], states))
        return cut

    def _wait_for_return(self, reports: LearnerReports, cut: checks.Cut) -> None:
        workers = self._workers[LEAVING]

        def is_back() -> bool:
            current = [status.version if (status := reports.worker(worker)) else 0 for worker in workers]
            arrived = all(reports.collection_times(worker, cut.ended) for worker in workers)
            return arrived and min(current) >= cut.last_version and reports.states(workers) == {"alive"}

        with suppress(TimeoutError):  # the check below reports the failure
            self._wait("the host is back", is_back, RETURN_SECONDS)
        self._sleep(self._seconds)
        self._check(checks.check_host_came_back(reports, cut, workers))
        missed = self._query("missed")["missed"]
        self._check(checks.check_missed_versions_are_recorded(missed, cut, workers))

    def _end(self, reports: LearnerReports) -> None:
        """Stop the learner and its workers, and compare the counts with what the workers printed."""
        # Ctrl-C. After SIGTERM the workers would wait for the learner to come back.
        self._processes.signal(LEARNER, signal.SIGINT)
        for name in (LEARNER, *(f"worker-{worker}" for worker in self._outputs)):
            code = self._processes.wait(name)
            if code != 0:
                raise RuntimeError(f"{name} ended with exit code {code}")
        batches_sent = {}
        for worker, output in self._outputs.items():
            found = re.search(r"stopped by the learner after ([\d,]+) batches", output.read())
            if found is None:
                raise RuntimeError(f"worker {worker} did not print how many batches it sent")
            batches_sent[worker] = int(found[1].replace(",", ""))
        self._log(f"ended: {reports.version} versions, {reports.steps:,} steps")
        self._check(checks.check_every_batch_is_counted(self._query("workers")["workers"], batches_sent))

    def keep_running(self) -> None:
        """Keep hosts and server running until Ctrl-C, and print how to inspect them."""
        names = [name for name in self._observer if name.startswith("RLBROKER_")]
        lines = [f"export {name}={shlex.quote(self._observer[name])}\n" for name in names]
        (self._folder / "observer.sh").write_text("".join(lines))
        namespace = self._hosts[LEARNER].namespace
        self._log("hosts and server keep running until Ctrl-C. In another shell, in this folder:")
        print(f"    . {self._folder / 'observer.sh'}")
        print(f"    ip netns exec {namespace} .venv/bin/rlbroker status")
        print(f"    ls {self._folder}    # the output of each process", flush=True)
        while True:
            time.sleep(3600.0)

    def tails(self) -> str:
        """Return the end of each process's output."""
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(
            f"--- {log.stem}\n{tail}" for log in logs if (tail := self._processes.tail_of(log.stem))
        )

    def _summary(self) -> bool:
        width = max(len(check.name) for check in self._checks)
        print()
        for check in self._checks:
            observed = check.observed
            if len(observed) > OBSERVED_CHARACTERS:
                observed = f"{observed[: OBSERVED_CHARACTERS - 2]} …"
            print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name:<{width}}  {observed}")
        failed = sum(not check.passed for check in self._checks)
        print(f"\n{len(self._checks) - failed} of {len(self._checks)} checks passed", flush=True)
        return not failed

    def _query(self, *command: str) -> Any:
        return query_rlbroker(self._hosts[LEARNER], self._observer, *command)

    def _check(self, check: checks.Check) -> None:
        self._checks.append(check)
        self._log(f"ok: {check.name}" if check.passed else f"FAILED: {check.name}: {check.observed}")

    def _log(self, message: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {message}", flush=True)

    def _sleep(self, seconds: float) -> None:
        """Sleep, and check meanwhile that all processes run."""
        end = time.monotonic() + seconds
        while (remaining := end - time.monotonic()) > 0:
            time.sleep(min(remaining, 0.2))
            self._processes.check()

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"timed out after {seconds:g} s waiting until {what}")
            self._sleep(0.1)


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy/test-hosts")
    parser.add_argument("--seconds", type=_at_least(1.0), default=10.0)
    # Workers are away after a lease of 5 s, which must be over in the second half of the cut.
    parser.add_argument("--cut-seconds", type=_at_least(12.0), default=20.0)
    parser.add_argument("--workers", type=int, choices=range(1, 51), default=3)
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def _at_least(least: float) -> Callable[[str], float]:
    def seconds(text: str) -> float:
        value = float(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least:g} seconds")
        return value

    return seconds


def _interrupt(number: int, frame: object) -> NoReturn:
    _ignore_signals()  # a second Ctrl-C must not interrupt the clean-up
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Run the test; return the exit code."""
    options = _parse_options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    test = None
    with ExitStack() as stack:
        try:
            test = MultiHostTest(options, stack)
            passed = test.run()
            if not passed:
                print(test.tails(), file=sys.stderr)
            if options.keep:
                with suppress(KeyboardInterrupt):
                    test.keep_running()
        except KeyboardInterrupt:
            print("interrupted: everything is removed", file=sys.stderr)
            return 130
        except MissingRequirement as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (RuntimeError, TimeoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            if test is not None:
                print(test.tails(), file=sys.stderr)
            return 1
        finally:
            _ignore_signals()
        return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
