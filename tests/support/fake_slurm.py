"""The parts of Slurm that deploy/slurm uses, on one machine: `srun`, `scontrol requeue` and `squeue`, by program name.

The folder $FAKE_SLURM has a file `jobs/ID` for each queued job, and a line in `requeued` for each requeued one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType


def main() -> int:
    """Run the command that the program name selects."""
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
    """Run a command in one process for each task of the job, and forward signals."""
    begin = next(index for index, one in enumerate(arguments) if not one.startswith("--"))
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
