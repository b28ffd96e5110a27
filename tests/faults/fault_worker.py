"""A worker process that logs every batch that it produces.

Its argument is JSON; see `Arena.start_worker`. Each line of its log is a JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from rlbroker import (
    ConnectionFailed,
    Fenced,
    QueueFull,
    RunLost,
    ServerOutOfMemory,
    Unconfirmed,
    WorkerClient,
)


def main() -> None:
    """Run until the learner sends the command `stop`, or the worker is fenced."""
    options = json.loads(sys.argv[1])
    if options["batches"] is None:
        options["batches"] = float("inf")
    log = open(options["log"], "a", buffering=1)  # noqa: SIM115, PTH123

    def log_facts(**facts: Any) -> None:
        log.write(json.dumps({"t": time.monotonic(), **facts}) + "\n")

    def produce(worker: WorkerClient, number: int) -> None:
        """Send one batch, retrying without limit, and log its sequence, if it got one."""
        batch = {"number": number, "pad": os.urandom(options["bytes"])}
        while worker.running:
            began = time.monotonic()
            try:
                receipt = worker.send_experiences(batch)
            except Unconfirmed as error:
                receipt = error.receipt
                log_facts(unconfirmed=receipt.sequence, took=time.monotonic() - began)
            except (QueueFull, ConnectionFailed, RunLost, ServerOutOfMemory) as error:
                log_facts(retried=type(error).__name__, took=time.monotonic() - began)
                worker.poll(model)
                continue
            if receipt.sequence:
                log_facts(produced=[receipt.incarnation, receipt.sequence], number=number)
            else:
                log_facts(refused=number)
            return

    def stop_producing(*_: object) -> None:
        options["batches"] = 0

    signal.signal(signal.SIGUSR1, stop_producing)
    model: dict[str, Any] = {}
    number = 0
    try:
        with WorkerClient(
            options["url"],
            options["run"],
            options["worker_id"],
            timeout=options["timeout"],
            level=options["level"],
            when_full=options["when_full"],
        ) as worker:
            log_facts(joined=worker.incarnation)
            worker.on_command("note", lambda data: log_facts(note=data))
            finished = False
            while worker.running:
                try:
                    if worker.poll(model):
                        log_facts(version=worker.version, number=model.get("number"))
                    if number < options["batches"]:
                        number += 1
                        produce(worker, number)
                        time.sleep(options["pause"])
                    elif not finished:
                        finished = worker.flush(0.5) == 0
                        if finished:
                            log_facts(finished=True)
                    else:
                        time.sleep(0.01)
                except (ConnectionFailed, RunLost) as error:
                    log_facts(retried=type(error).__name__)
            log_facts(version=worker.version, number=model.get("number"), stopped=True)
    except Fenced:
        log_facts(fenced=True)


if __name__ == "__main__":
    main()
