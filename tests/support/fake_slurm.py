"""As much of Slurm as deploy/slurm uses, for one machine: `srun`, `scontrol requeue` and `squeue` by the name it has.

It keeps in $FAKE_SLURM what was asked of it: a file `jobs/ID` for each job that is in the queue, a line in `requeued`
for each that is to be queued again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType


def main() -> int:
    """Do what the command of this name does."""
    home, name = Path(os.environ["FAKE_SLURM"]), Path(sys.argv[0]).name
    if name == "squeue":
        assert sys.argv[1:3] == ["--noheader", "--jobs"]
        if (home / "jobs" / sys.argv[3]).exists():
            print("RUNNING")
        return 0
    if name == "scontrol":
        assert sys.argv[1] == "requeue"
        with (home / "requeued").open("a") as file:
            file.write(f"{sys.argv[2]}\n")
        return 0
    return srun(sys.argv[1:])


def srun(arguments: list[str]) -> int:
    """Run a command in as many processes as the job has tasks, and pass signals on."""
    begin = next(place for place, one in enumerate(arguments) if not one.startswith("--"))
    options = dict(one.removeprefix("--").split("=", 1) for one in arguments[:begin])
    assert set(options) <= {"output", "open-mode", "kill-on-bad-exit"}
    command = arguments[begin:]
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    for task in range(int(os.environ["SLURM_NTASKS"])):
        with Path(options["output"].replace("%t", str(task))).open("a") as log:
            environment = {**os.environ, "SLURM_PROCID": str(task)}
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
