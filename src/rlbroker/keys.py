"""Every key that rlbroker has in Redis: its name, type, writer, readers and lifetime.

All keys of a run begin `rlb:{RUN}:`; the braces are Redis Cluster's hash tag. Nothing outside this file
builds a name or may assume that two keys live on the same node, but for these two groups, whose members
scripts touch together:

- the run's own keys: `meta`, `weights`, `ctl`, `workers`, `pending`, `missed`, and per worker `life:`, `hb:`,
  `ack:` and `ledger:`;
- each worker's `x:`, `counts:`, `epochs:`, `dead:` and `again:`.

Only pruning deletes, with `meta` and in one step, all else of a dead run that a later one would use too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from rlbroker.config import MAX_WORKER_ID, is_run_name, run_name

#: Pattern of all keys of all runs, as rights name them.
EVERY_KEY = "rlb:*"

#: What every key begins with, up to the name of its run.
_ROOT = "rlb:{"

#: The consumer group that reads the experiences of every worker.
GROUP = "learner"

#: What can follow a run's name in a key of ours.
_OURS = re.compile(
    r"meta|weights|ctl|missed|pending|workers|history:\d+|outcomes:\w+|w:[\w-]+:\d+"
    r"|(x|counts|epochs|dead|again|ack|ledger|life|hb):\d+"
)


def run_of(key: str) -> str:
    """Give the run that a key belongs to; empty if it is none of ours.

    >>> run_of(Keys("pong").experiences(3))
    'pong'
    """
    before, brace, rest = key.removeprefix(_ROOT).partition("}:")
    ours = brace and key.startswith(_ROOT) and _OURS.fullmatch(rest)
    return before if ours and is_run_name(before) else ""


@dataclass(frozen=True)
class Keys:
    """The names of one run's keys."""

    run: str
    prefix: str = field(init=False)

    def __post_init__(self) -> None:
        """Check the run's name, as it becomes part of every key."""
        object.__setattr__(self, "prefix", f"{_ROOT}{run_name(self.run)}}}")

    @property
    def everything(self) -> str:
        """Pattern of all of the run's keys, to find and delete them."""
        return f"{self.prefix}:*"

    def written_by_worker(self, worker: int | str) -> dict[str, str]:
        """Give the keys that a worker writes, or a pattern of them for all workers, who are `*`; each with its type."""
        types = {"x": "stream", "counts": "hash", "ack": "stream", "life": "hash", "hb": "hash"}
        return {f"{self.prefix}:{kind}:{worker}": what for kind, what in types.items()}

    def read_by_worker(self, worker: int | str) -> list[str]:
        """Give the keys that a worker only reads; a pattern for chunks, and for all workers, who are `*`."""
        return [
            *(self.meta, self.weights, self.control, self.workers, f"{self.prefix}:w:*"),
            *(f"{self.prefix}:{kind}:{worker}" for kind in ("ledger", "epochs")),
        ]

    def queue(self, worker: int) -> list[str]:
        """Give the keys of one worker's batches, which scripts touch together."""
        return [
            self.experiences(worker),
            self.counts(worker),
            self.epochs(worker),
            self.dead(worker),
            self.again(worker),
        ]

    def queue_of(self, key: str) -> int | None:
        """Give the worker whose queue a key is part of; None if it is none of those."""
        _, _, worker = key.rpartition(":")
        if not worker.isdecimal() or len(worker) > len(str(MAX_WORKER_ID)):
            return None
        return int(worker) if key in self.queue(int(worker)) else None

    def is_given_once(self, key: str) -> bool:
        """Whether no later life of the run uses this name again: chunks and outcomes have ids of their own."""
        return key.startswith((f"{self.prefix}:w:", f"{self.prefix}:outcomes:"))

    def tells_of_run(self, key: str) -> bool:
        """Whether a key is read to see how a run is doing: who looks for runs uses it."""
        return key in (self.meta, self.weights, self.workers) or key.startswith(self.life_prefix)

    @property
    def meta(self) -> str:
        """Hash: wire format, the learner's epoch and its settings. Learner writes, all read. Stays."""
        return f"{self.prefix}:meta"

    @property
    def weights(self) -> str:
        """Hash: the pointer to the latest version, written last. Learner writes, workers read. Stays."""
        return f"{self.prefix}:weights"

    def chunk(self, upload: str, number: int) -> str:
        """Give the key of a string: one immutable piece of a version; number 0 is its header.

        An upload is called `<version>-<epoch>-<attempt>`, so that no two ever write to the same key.
        Learner writes, workers read. Expires some time after a newer version was published.
        """
        return f"{self.prefix}:w:{upload}:{number}"

    def upload(self, upload: str, chunks: int) -> list[str]:
        """Give the keys of all that was uploaded under this name: the header, and so many chunks."""
        return [self.chunk(upload, number) for number in range(chunks + 1)]

    @property
    def notify(self) -> str:
        """Pub/sub channel: the number of a version that was just published. A hint; losing it loses nothing."""
        return f"{self.prefix}:notify"

    def experiences(self, worker: int) -> str:
        """Give the key of a stream: the batches of one worker, with ids `<incarnation>-<sequence>`.

        That worker writes; the learner reads through the group `learner` and deletes what it acknowledged.
        """
        return f"{self.prefix}:x:{worker}"

    def counts(self, worker: int) -> str:
        """Give the key of a hash: what became of one worker's batches, by reason. Both sides write. Stays."""
        return f"{self.prefix}:counts:{worker}"

    def epochs(self, worker: int) -> str:
        """Give the key of a hash: by learner's name, the newest epoch that may acknowledge one worker's batches.

        Learners write and read. Stays.
        """
        return f"{self.prefix}:epochs:{worker}"

    def dead(self, worker: int) -> str:
        """Give the key of a stream: batches of one worker that could not be used, each with its reason.

        Learners write, people read and delete. At most 1,000 entries; oldest go first.
        """
        return f"{self.prefix}:dead:{worker}"

    def again(self, worker: int) -> str:
        """Give the key of a stream: dead batches of one worker that are to be tried again.

        Learners and people write; learners read through the group `learner`, and delete.
        """
        return f"{self.prefix}:again:{worker}"

    @property
    def control(self) -> str:
        """Stream: commands and notices of new versions, in order. Learner writes, workers read.

        People add commands in the learner's place, with `rlbroker control send`; to `pending` and `outcomes:` too.
        The learner trims what is older than an hour and has been answered.
        """
        return f"{self.prefix}:ctl"

    def acknowledgements(self, worker: int) -> str:
        """Give the key of a stream: one worker's answers, with ids `<incarnation>-<n>`.

        That worker writes; the learner's ledger settles each entry and deletes it.
        """
        return f"{self.prefix}:ack:{worker}"

    def ledger(self, worker: int) -> str:
        """Give the key of a hash: what one worker applied and missed, in sums. Learner writes. Stays."""
        return f"{self.prefix}:ledger:{worker}"

    @property
    def missed(self) -> str:
        """Stream, capped: missed updates and commands, one entry each. Learner writes. Sums are in `ledger:`."""
        return f"{self.prefix}:missed"

    @property
    def pending(self) -> str:
        """Hash: commands without a final state, by `<command>:<worker>`. Learner writes. Stays."""
        return f"{self.prefix}:pending"

    def outcomes(self, command: str) -> str:
        """Give the key of a hash: one command's state by worker. Learner writes. Expires after a day."""
        return f"{self.prefix}:outcomes:{command}"

    @property
    def workers(self) -> str:
        """Set: every worker id that ever took part. Workers add theirs, all read. Stays."""
        return f"{self.prefix}:workers"

    def life(self, worker: int) -> str:
        """Give the key of a hash: the newest incarnation of a worker id, whether it takes part, when it was heard of.

        That worker writes, and the learner when it gives it up; all read. Stays, and its incarnation only grows.
        """
        return f"{self.life_prefix}{worker}"

    @property
    def life_prefix(self) -> str:
        """What the name of every worker's life begins with."""
        return f"{self.prefix}:life:"

    def heartbeat(self, worker: int) -> str:
        """Give the key of a hash: what a worker last said of itself. That worker writes. Expires unrenewed."""
        return f"{self.prefix}:hb:{worker}"

    def history(self, seconds: int) -> str:
        """Give the key of a stream, capped: figures of the run, one entry each so many seconds.

        The learner that leads writes, people read. Stays. It lives with no other key.
        """
        return f"{self.prefix}:history:{seconds}"
