"""A worker process that sends numbered batches, and logs sent batches and applied versions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from rlbroker import Fenced, WorkerClient


def main() -> None:
    """Arguments: run, log, worker id, number of batches, and `stays` to poll until it is stopped."""
    run, log_path, worker_id, batches, *stays = sys.argv[1:]
    with (
        Path(log_path).open("a", buffering=1) as log,
        WorkerClient(run=run, worker_id=int(worker_id)) as worker,
    ):

        def log_facts(**facts: object) -> None:
            log.write(json.dumps(facts) + "\n")

        sent = 0
        try:
            while worker.running and (stays or sent < int(batches)):
                if worker.poll({}):
                    log_facts(applied=worker.version)
                if sent < int(batches):
                    receipt = worker.send_experiences(
                        {"number": sent + 1, "obs": np.arange(64.0)}, timeout=60.0
                    )
                    if receipt:
                        sent += 1
                        log_facts(sent=receipt.sequence)
        except Fenced as error:
            log_facts(fenced=str(error))
            raise SystemExit(3) from None


if __name__ == "__main__":
    main()
