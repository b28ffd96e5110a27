"""A learner as a process of its own, with a buffer and a checkpoint of it, which can kill itself at any phase.

Its one argument is JSON; see `Learner` in arena.py. Each line of its log is JSON too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rlbroker import ConnectionFailed, RlbrokerError, RunLost, ServerOutOfMemory, WorkerCommunicator


def main() -> None:
    """Run until told to stop."""
    chosen = json.loads(sys.argv[1])
    log = open(chosen["log"], "a", buffering=1)  # noqa: SIM115, PTH123
    checkpoint, finish = Path(chosen["checkpoint"]), Path(chosen["finish"])
    passes: dict[str, int] = {}

    def say(**facts: Any) -> None:
        log.write(json.dumps({"t": time.monotonic(), **facts}) + "\n")

    def phase(name: str) -> None:
        """Die here, as if by the kernel, on the chosen pass of the chosen phase."""
        passes[name] = passes.get(name, 0) + 1
        if chosen["die"] == [name, passes[name]]:
            say(died=name)
            os.kill(os.getpid(), signal.SIGKILL)

    def save(buffer: list[Any], marks: dict[str, Any]) -> None:
        beside = checkpoint.with_suffix(".new")
        beside.write_text(json.dumps({"buffer": buffer, "marks": marks}))
        beside.replace(checkpoint)

    def publish(number: int) -> None:
        receipt = go_on(partial(comm.send_model_weights, {"number": number, "pad": bytes(20_000)}))
        say(version=receipt.version)

    def go_on(work: Any) -> Any:
        """Do something until it comes through, as training goes on when the server is away."""
        while True:
            try:
                return work()
            except (ConnectionFailed, RunLost, ServerOutOfMemory) as error:
                say(again=type(error).__name__)

    comm = go_on(
        lambda: WorkerCommunicator(
            9,
            redis_url=chosen["url"],
            run=chosen["run"],
            timeout=chosen["timeout"],
            acknowledge="manual",
            lease_seconds=2.0,
            **chosen["settings"],
        )
    )
    buffer: list[Any] = []
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        buffer = saved["buffer"]
        comm.restore(saved["marks"])
    say(opened=comm.epoch, restored=len(buffer))
    published = commands = 0
    sent: list[Any] = []
    rounds = quiet = 0
    next_version = time.monotonic()
    while not (
        finish.exists() and quiet >= 4 and published >= chosen["versions"] and commands == chosen["commands"]
    ):
        rounds += 1
        while Path(chosen["pause"]).exists():
            time.sleep(0.05)
        pairs = go_on(lambda: comm.collect_experiences(0.2, max_batches=chosen["max_batches"]))
        time.sleep(chosen["collect_seconds"])
        phase("read")
        for worker_id, batch in pairs:
            buffer.append([worker_id, batch.incarnation, batch.sequence, batch["number"]])
            say(inserted=buffer[-1])
        phase("insert")
        quiet = quiet + 1 if not pairs else 0
        if pairs:
            marks = go_on(comm.marks)
            save(buffer, marks)
            phase("checkpoint")
            go_on(lambda marks=marks: comm.acknowledge(marks))
            phase("acknowledge")
        endless = not chosen["versions"]
        if (endless or published < chosen["versions"]) and time.monotonic() >= next_version:
            published += 1
            next_version = time.monotonic() + chosen["version_seconds"]
            publish(published)
        if commands < chosen["commands"] and rounds % 2 == 0:
            commands += 1
            sent.append(go_on(partial(comm.send_control_command, "note", f"{comm.epoch}-{commands}")))
    publish(-1)
    time.sleep(1.5)  # workers are to run it before they are told to stop
    stop = go_on(lambda: comm.send_control_command("stop"))
    for command in [*sent, stop]:
        outcomes = go_on(lambda command=command: command.wait(20.0))
        say(command=command.name, outcomes={worker: str(outcome) for worker, outcome in outcomes.items()})

    def left() -> bool:
        """Whether every worker has left, and the ledger has settled it."""
        go_on(comm.get_queue_info)
        return not go_on(comm.workers)

    end = time.monotonic() + 20.0
    while time.monotonic() < end and not left():
        time.sleep(0.1)
    info = go_on(comm.get_queue_info)
    counts = {
        worker: {
            "waiting": count.waiting,
            "in_hand": count.in_hand,
            "delivered": count.delivered,
            "lost": dict(count.lost),
            "duplicates": count.duplicates,
            "produced": count.produced,
        }
        for worker, count in info["counts"].items()
    }
    missed = {
        worker: {
            "total": one.total,
            "commands": one.commands,
            "behind": one.behind,
            "recorded": sum(record.count for record in one.records if record.what == "weights"),
        }
        for worker, one in go_on(comm.missed_updates).items()
    }
    dead = [[one.worker_id, one.incarnation, one.sequence, one.reason] for one in go_on(comm.dead_letters)]
    say(report={"counts": counts, "missed": missed, "dead": dead, "version": comm.version})
    try:
        comm.cleanup()
    except RlbrokerError as error:
        say(cleanup=str(error))


if __name__ == "__main__":
    main()
