"""A worker as a process of its own, which logs every batch that it produced.

Its one argument is JSON; see `Worker` in arena.py. Each line of its log is JSON too.
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
    """Run until told to stop."""
    chosen = json.loads(sys.argv[1])
    if chosen["batches"] is None:
        chosen["batches"] = float("inf")
    log = open(chosen["log"], "a", buffering=1)  # noqa: SIM115, PTH123

    def say(**facts: Any) -> None:
        log.write(json.dumps({"t": time.monotonic(), **facts}) + "\n")

    def produce(worker: WorkerClient, number: int) -> None:
        """Send one batch, however long it takes; what got a number is logged under it."""
        batch = {"number": number, "pad": os.urandom(chosen["bytes"])}
        while worker.running:
            began = time.monotonic()
            try:
                receipt = worker.send_experiences(batch)
            except Unconfirmed as error:
                receipt = error.receipt
                say(unconfirmed=receipt.sequence, took=time.monotonic() - began)
            except (QueueFull, ConnectionFailed, RunLost, ServerOutOfMemory) as error:
                say(again=type(error).__name__, took=time.monotonic() - began)
                worker.poll(model)
                continue
            if receipt.sequence:
                say(produced=[receipt.incarnation, receipt.sequence], number=number)
            else:
                say(refused=number)
            return

    def produce_no_more(*_: object) -> None:
        chosen["batches"] = 0

    signal.signal(signal.SIGUSR1, produce_no_more)
    model: dict[str, Any] = {}
    number = 0
    try:
        with WorkerClient(
            chosen["url"],
            chosen["run"],
            chosen["worker_id"],
            timeout=chosen["timeout"],
            level=chosen["level"],
            when_full=chosen["when_full"],
        ) as worker:
            say(joined=worker.incarnation)
            worker.on_command("note", lambda data: say(note=data))
            finished = False
            while worker.running:
                try:
                    if worker.poll(model):
                        say(version=worker.version, holds=model.get("number"))
                    if number < chosen["batches"]:
                        number += 1
                        produce(worker, number)
                        time.sleep(chosen["pause"])
                    elif not finished:
                        finished = worker.flush(0.5) == 0
                        if finished:
                            say(finished=True)
                    else:
                        time.sleep(0.01)
                except (ConnectionFailed, RunLost) as error:
                    say(again=type(error).__name__)
            say(version=worker.version, holds=model.get("number"), stopped=True)
    except Fenced:
        say(fenced=True)


if __name__ == "__main__":
    main()
