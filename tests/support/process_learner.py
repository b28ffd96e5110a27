"""A learner process that inserts and acknowledges 60 batches, then keeps others pending until it is killed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rlbroker import WorkerCommunicator


def main() -> None:
    run, log_path, last_incarnation = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
    with (
        Path(log_path).open("a", buffering=1) as log,
        WorkerCommunicator(1, run=run, acknowledge="manual") as comm,
    ):
        inserted = 0
        while True:
            pairs = comm.collect_experiences(timeout=1.0, max_batches=20)
            if inserted >= 60 and pairs and not last_incarnation:
                # The batches are read, but neither inserted nor acknowledged: the test kills the process here.
                log.write(json.dumps({"pending": len(pairs)}) + "\n")
                time.sleep(600)
            for _, batch in pairs:
                log.write(json.dumps({"inserted": batch["number"]}) + "\n")
                inserted += 1
            comm.acknowledge(pairs)
            if last_incarnation and pairs and pairs[-1][1]["number"] == 300:
                return


if __name__ == "__main__":
    main()
