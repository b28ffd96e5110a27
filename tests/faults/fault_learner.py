"""A learner process with a checkpointed buffer, which can kill itself at any phase.

Its argument is JSON; see `Arena.start_learner`. Each line of its log is a JSON object.
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
    """Run until the file `finish` exists and all versions and commands are done."""
    options = json.loads(sys.argv[1])
    log = open(options["log"], "a", buffering=1)  # noqa: SIM115, PTH123
    checkpoint, finish = Path(options["checkpoint"]), Path(options["finish"])
    visits: dict[str, int] = {}

    def log_facts(**facts: Any) -> None:
        log.write(json.dumps({"t": time.monotonic(), **facts}) + "\n")

    def die_at(name: str) -> None:
        """Kill this process at the chosen visit of the chosen phase."""
        visits[name] = visits.get(name, 0) + 1
        if options["die"] == [name, visits[name]]:
            log_facts(died=name)
            os.kill(os.getpid(), signal.SIGKILL)

    def save(buffer: list[Any], marks: dict[str, Any]) -> None:
        temporary = checkpoint.with_suffix(".new")
        temporary.write_text(json.dumps({"buffer": buffer, "marks": marks}))
        temporary.replace(checkpoint)

    def publish(number: int) -> None:
        receipt = retry(partial(comm.send_model_weights, {"number": number, "pad": bytes(20_000)}))
        log_facts(version=receipt.version)

    def retry(work: Any) -> Any:
        """Repeat an operation until it succeeds, as training must while the server is away."""
        while True:
            try:
                return work()
            except (ConnectionFailed, RunLost, ServerOutOfMemory) as error:
                log_facts(retried=type(error).__name__)

    comm = retry(
        lambda: WorkerCommunicator(
            9,
            redis_url=options["url"],
            run=options["run"],
            timeout=options["timeout"],
            acknowledge="manual",
            lease_seconds=2.0,
            **options["settings"],
        )
    )
    buffer: list[Any] = []
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        buffer = saved["buffer"]
        comm.restore(saved["marks"])
    log_facts(opened=comm.epoch, restored=len(buffer))
    published = commands = 0
    sent: list[Any] = []
    rounds = empty_rounds = 0
    next_version = time.monotonic()
    while not (
        finish.exists()
        and empty_rounds >= 4
        and published >= options["versions"]
        and commands == options["commands"]
    ):
        rounds += 1
        while Path(options["pause"]).exists():
            time.sleep(0.05)
        pairs = retry(lambda: comm.collect_experiences(0.2, max_batches=options["max_batches"]))
        time.sleep(options["collect_seconds"])
        die_at("read")
        for worker_id, batch in pairs:
            buffer.append([worker_id, batch.incarnation, batch.sequence, batch["number"]])
            log_facts(inserted=buffer[-1])
        die_at("insert")
        empty_rounds = empty_rounds + 1 if not pairs else 0
        if pairs:
            marks = retry(comm.marks)
            save(buffer, marks)
            die_at("checkpoint")
            retry(lambda marks=marks: comm.acknowledge(marks))
            die_at("acknowledge")
        endless = not options["versions"]
        if (endless or published < options["versions"]) and time.monotonic() >= next_version:
            published += 1
            next_version = time.monotonic() + options["version_seconds"]
            publish(published)
        if commands < options["commands"] and rounds % 2 == 0:
            commands += 1
            sent.append(retry(partial(comm.send_control_command, "note", f"{comm.epoch}-{commands}")))
    publish(-1)
    time.sleep(1.5)  # the workers apply the version before they are told to stop
    stop = retry(lambda: comm.send_control_command("stop"))
    for command in [*sent, stop]:
        outcomes = retry(lambda command=command: command.wait(20.0))
        log_facts(
            command=command.name, outcomes={worker: str(outcome) for worker, outcome in outcomes.items()}
        )

    def all_left() -> bool:
        """Whether every worker has left the run; the call also processes acknowledgements."""
        retry(comm.get_queue_info)
        return not retry(comm.workers)

    end = time.monotonic() + 20.0
    while time.monotonic() < end and not all_left():
        time.sleep(0.1)
    info = retry(comm.get_queue_info)
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
        for worker, one in retry(comm.missed_updates).items()
    }
    dead = [[one.worker_id, one.incarnation, one.sequence, one.reason] for one in retry(comm.dead_letters)]
    log_facts(report={"counts": counts, "missed": missed, "dead": dead, "version": comm.version})
    try:
        comm.cleanup()
    except RlbrokerError as error:
        log_facts(cleanup=str(error))


if __name__ == "__main__":
    main()
