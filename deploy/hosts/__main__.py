"""`deploy/test-hosts`: trains on several hosts, cuts one off, and checks what became of it."""

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
from deploy.hosts.deployment import RUN, Deployment, ask, refusal, rlbroker, user_of
from deploy.hosts.network import Network
from deploy.hosts.training import Course, Processes
from rlbroker.backend.keys import Keys

SERVER, LEARNER, STAYING, LEAVING = "server", "learner", "workers-a", "workers-b"

#: Units of a layer. What crosses a link is mostly weights then, 0.1 MB each; from 64 KB on a host shares them.
HIDDEN = 128

#: What crosses a link is measured over so many versions at least.
LEAST_VERSIONS = 8

#: Of what was seen, so many characters are in the summary.
SEEN_CHARACTERS = 110

#: How long things may take that take seconds: the start of all processes on few cores, and a host's return.
START_SECONDS, RETURN_SECONDS = 180.0, 60.0


class Missing(Exception):
    """Something is not here that is needed; the message says how to get it."""


class Test:
    """The whole of it, from the first namespace to the last check."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        """Set up hosts and server; what is set up goes with the stack."""
        self._seconds, self._cut_seconds = options.seconds, options.cut_seconds
        self._began = time.monotonic()
        self._checks: list[checks.Check] = []
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlbroker-hosts-")))
        network = Network([SERVER, LEARNER, STAYING, LEAVING])
        self._network = stack.enter_context(network.opened())
        self._processes = stack.enter_context(Processes(self._folder).ended_at_last())
        self._hosts = network.hosts
        count = options.workers
        self._workers = {STAYING: list(range(count)), LEAVING: list(range(count, 2 * count))}
        self._say(f"hosts: {', '.join(f'{one.name} {one.address}' for one in self._hosts.values())}")
        self._deployment = Deployment(self._folder, self._hosts[SERVER], 2 * count)
        self._observer = self._deployment.environment(self._hosts[LEARNER], f"{RUN}-observer")

    def run(self) -> bool:
        """Do everything; give whether all is as it should be.

        Raises:
            RuntimeError, TimeoutError: something ended too early, or did not come.
            Missing: the server cannot do what is needed.
        """
        self._start_server()
        course = self._start_training()
        self._try_what_is_denied()
        self._train(course)
        cut = self._cut(course)
        self._come_back(course, cut)
        self._end(course)
        return self._summary()

    def _start_server(self) -> None:
        host, log = self._hosts[SERVER], self._processes.log_of(SERVER)
        self._processes.start(SERVER, host, self._deployment.server_command(log), dict(os.environ))
        looking = self._hosts[LEARNER], f"{RUN}-observer"
        try:
            self._wait(
                "the server answers", lambda: self._deployment.redis_cli(*looking, "PING") == "PONG", 20.0
            )
        except RuntimeError:
            if "tls" in self._processes.tail_of(SERVER).lower():
                program = self._deployment.program
                raise Missing(
                    f"{program} was built without TLS; Debian's has it: apt-get install redis-server"
                ) from None
            raise
        self._say("server: deploy/redis with TLS, certificates of clients, and a user for each worker")

    def _start_training(self) -> Course:
        common = ["--run", RUN, "--env", "CartPole-v1", "--hidden", str(HIDDEN)]
        count = sum(map(len, self._workers.values()))
        # A target that nobody reaches: it ends when it is told to.
        learner = rlbroker(
            *("learner", *common, "--workers", str(count), "--target", "1e9", "--minutes", "600"),
            *("--progress", "json"),
        )
        self._say(f"starting a learner and {count} workers")
        host = self._hosts[LEARNER]
        process = self._processes.start(
            LEARNER, host, learner, self._deployment.environment(host, f"{RUN}-learner")
        )
        assert process.stdout is not None
        course = Course.of(process.stdout)
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
        everyone = self._workers[STAYING] + self._workers[LEAVING]
        self._wait(
            "a batch of each worker has arrived",
            lambda: all(course.collected(worker, 0.0) for worker in everyone),
            START_SECONDS,
        )
        self._say("batches of all workers have arrived")
        return course

    def _try_what_is_denied(self) -> None:
        """Try, from a worker's host, what must not be possible there."""
        host = self._hosts[LEAVING]
        worker = self._workers[LEAVING][0]
        environment = self._deployment.environment(host, user_of(worker))
        own, other = user_of(worker), Keys(RUN).experiences(self._workers[STAYING][0])

        bare = {name: value for name, value in environment.items() if "CERTIFICATE" not in name}
        bare.pop("RLBROKER_TLS_KEY_FILE")
        self._refused("a client without a certificate", refusal(host, bare, "runs"), "certificate")

        wrong = self._folder / "wrong"
        wrong.write_text("not-the-password\n")
        self._refused(
            "a wrong password",
            refusal(host, environment | {"RLBROKER_REDIS_PASSWORD_FILE": str(wrong)}, "runs"),
            "invalid username-password pair",
        )

        pointer = Keys(RUN).weights
        if not self._deployment.redis_cli(host, own, "HGET", pointer, "version").isdecimal():
            raise RuntimeError(f"{own} cannot read which version is the latest, which it must")
        for what, command in {
            "a worker's own version of the weights": ("HSET", pointer, "version", "999999"),
            "a worker's batch in another one's queue": ("XADD", other, "*", "data", "x"),
            "a worker's new script": ("EVAL", "return 1", "0"),
        }.items():
            self._refused(what, self._deployment.redis_cli(host, own, *command), "NOPERM")

    def _refused(self, what: str, said: str, expected: str) -> None:
        self._check(checks.is_refused(what, said, expected))

    def _train(self, course: Course) -> None:
        """Train for a while, and measure what crosses the links of the worker hosts."""
        measured = [self._hosts[STAYING], self._hosts[LEAVING]]
        first, before = course.version, [self._network.received_bytes(host) for host in measured]
        began, steps = time.monotonic(), course.steps
        self._sleep(self._seconds)
        # When a version came is known to a quarter of a second only: that shall not matter.
        self._wait("versions have come", lambda: course.version >= first + LEAST_VERSIONS, START_SECONDS)
        last, after = course.version, [self._network.received_bytes(host) for host in measured]
        seconds = time.monotonic() - began
        rate = (course.steps - steps) / seconds
        self._say(f"trained for {seconds:.0f} s: versions {first} to {last}, {rate:,.0f} steps/s")
        sizes = [one["stored_bytes"] for one in self._ask("weights", "list")["forms"]]
        stored = round(sum(sizes) / len(sizes) * (last - first))
        for host, earlier, later in zip(measured, before, after, strict=True):
            count = len(self._workers[host.name])
            self._check(checks.weights_cross_once(host.name, later - earlier, stored, count))

    def _cut(self, course: Course) -> checks.Cut:
        """Cut a host off, and look at what the others make of it."""
        host = self._hosts[LEAVING]
        self._network.cut(host)
        began = time.monotonic()
        self._say(f"{host.name} is cut off: its link stays up, nothing passes")
        self._sleep(1.0)  # what was under way when it was cut
        first = course.version
        self._sleep(self._cut_seconds - 2.0)
        found = self._ask("workers")["workers"]
        states = [found[str(worker)]["member"]["state"] for worker in self._workers[LEAVING]]
        self._sleep(max(0.0, began + self._cut_seconds - time.monotonic()))
        last, ended = course.version, time.monotonic()
        self._network.mend(host)
        self._say(f"{host.name} is back after {ended - began:.1f} s; the version is {last} now")
        cut = checks.Cut(began, ended, first, last)
        self._check(checks.training_went_on(course, cut, self._workers[STAYING]))
        self._check(checks.host_was_away(course, cut, self._workers[LEAVING], states))
        return cut

    def _come_back(self, course: Course, cut: checks.Cut) -> None:
        workers = self._workers[LEAVING]

        def is_back() -> bool:
            current = [one.version if (one := course.worker(worker)) else 0 for worker in workers]
            arrived = all(course.collected(worker, cut.ended) for worker in workers)
            return arrived and min(current) >= cut.last_version and course.states(workers) == {"alive"}

        with suppress(TimeoutError):  # the check says what is missing
            self._wait("the host is back", is_back, RETURN_SECONDS)
        self._sleep(self._seconds)
        self._check(checks.host_came_back(course, cut, workers))
        missed = self._ask("missed")["missed"]
        self._check(checks.missed_versions_are_recorded(missed, cut, workers))

    def _end(self, course: Course) -> None:
        """Have the learner stop its workers, and compare what they say with the counts."""
        self._processes.signal(
            LEARNER, signal.SIGINT
        )  # Ctrl-C; SIGTERM would leave the workers waiting for it
        for name in (LEARNER, *(f"worker-{worker}" for worker in self._outputs)):
            code = self._processes.wait(name)
            if code != 0:
                raise RuntimeError(f"{name} ended with exit code {code}")
        said = {}
        for worker, output in self._outputs.items():
            found = re.search(r"stopped by the learner after ([\d,]+) batches", output.read())
            if found is None:
                raise RuntimeError(f"worker {worker} did not say how many batches it sent")
            said[worker] = int(found[1].replace(",", ""))
        self._say(f"ended: {course.version} versions, {course.steps:,} steps")
        self._check(checks.nothing_is_lost_without_a_trace(self._ask("workers")["workers"], said))

    def stay(self) -> None:
        """Leave hosts and server up until Ctrl-C, and say how to look at them."""
        names = [name for name in self._observer if name.startswith("RLBROKER_")]
        lines = [f"export {name}={shlex.quote(self._observer[name])}\n" for name in names]
        (self._folder / "observer.sh").write_text("".join(lines))
        namespace = self._hosts[LEARNER].namespace
        self._say("hosts and server stay up until Ctrl-C. In another shell, in this folder:")
        print(f"    . {self._folder / 'observer.sh'}")
        print(f"    ip netns exec {namespace} .venv/bin/rlbroker status")
        print(f"    ls {self._folder}    # what each process said", flush=True)
        while True:
            time.sleep(3600.0)

    def tails(self) -> str:
        """Give what the processes said last, for who looks for a cause."""
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(
            f"--- {log.stem}\n{said}" for log in logs if (said := self._processes.tail_of(log.stem))
        )

    def _summary(self) -> bool:
        width = max(len(one.name) for one in self._checks)
        print()
        for one in self._checks:
            seen = one.seen if len(one.seen) <= SEEN_CHARACTERS else f"{one.seen[: SEEN_CHARACTERS - 2]} …"
            print(f"{'ok    ' if one.passed else 'FAILED'}  {one.name:<{width}}  {seen}")
        failed = sum(not one.passed for one in self._checks)
        print(f"\n{len(self._checks) - failed} of {len(self._checks)} are as they should be", flush=True)
        return not failed

    def _ask(self, *command: str) -> Any:
        return ask(self._hosts[LEARNER], self._observer, *command)

    def _check(self, check: checks.Check) -> None:
        self._checks.append(check)
        self._say(f"ok: {check.name}" if check.passed else f"FAILED: {check.name}: {check.seen}")

    def _say(self, what: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {what}", flush=True)

    def _sleep(self, seconds: float) -> None:
        """Let time pass while all processes run."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            self._processes.check()

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds:g} s in vain until {what}")
            self._sleep(0.1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy/test-hosts")
    parser.add_argument("--seconds", type=_at_least(1.0), default=10.0)
    # Workers are away after a lease of 5 s; the second half of the cut must lie behind that.
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
    _ignore_signals()  # a second Ctrl-C shall not leave a half of it behind
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Run the test; give the exit code."""
    options = _options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    test = None
    with ExitStack() as stack:
        try:
            test = Test(options, stack)
            passed = test.run()
            if not passed:
                print(test.tails(), file=sys.stderr)
            if options.keep:
                with suppress(KeyboardInterrupt):
                    test.stay()
        except KeyboardInterrupt:
            print("interrupted: everything is removed", file=sys.stderr)
            return 130
        except Missing as error:
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
