"""A worker process that reports its steps on stdout and drains on signals.

It prints `began N` and waits for a line on stdin before it sends batch N, so that a test knows the pending batch.
After the line `obey` it continues only when a command has arrived.
"""

from __future__ import annotations

import select
import signal
import sys
import time

from rlbroker import WorkerClient


def main() -> None:
    """Arguments: run, worker id, timeout in seconds."""
    run, worker_id, timeout = sys.argv[1:]
    with WorkerClient(run=run, worker_id=int(worker_id), timeout=float(timeout)) as worker:
        worker.drain_on(signal.SIGTERM, signal.SIGUSR1)
        print("joined", flush=True)
        worker.load_weights({}, timeout=60.0)
        number = 0
        while worker.running:
            print("polls", flush=True)
            worker.poll({})
            if not worker.running:
                break
            number += 1
            print(f"began {number}", flush=True)
            # The wait is short because a signal just before it would be handled only after it.
            while not select.select([sys.stdin], [], [], 0.05)[0]:
                pass
            request = sys.stdin.readline().strip()
            print(f"sent {worker.send_experiences({'number': number}).sequence}", flush=True)
            while request == "obey" and not worker._inbox.waiting:
                time.sleep(0.001)
    print("left", flush=True)


if __name__ == "__main__":
    main()
