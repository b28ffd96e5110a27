"""Every key that rlbroker has in Redis: its name, type, writer, readers and lifetime.

All keys of a run begin `rlb:{RUN}:`; the braces are Redis Cluster's hash tag. On a Cluster a run has shards besides,
and what is large or often used is spread over them: it begins `rlb:{RUN/s3}:`. Nothing outside this file builds a name
or may assume that two keys live on the same node, but for these two groups, whose members scripts touch together:

- the run's own keys: `meta`, `weights`, `ctl`, `workers`, `pending`, `missed`, and per worker `life:`, `hb:`,
  `ack:` and `ledger:`;
- each worker's `x:`, `counts:`, `epochs:`, `dead:` and `again:`, all in the shard of that worker.

Chunks of weights are spread one by one, and each shard has a key `shards`.

Only pruning deletes, with `meta` and in one step, all else of a dead run that a later one would use too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
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
    r"meta|weights|ctl|missed|pending|workers|shards|history:\d+|outcomes:\w+|w:[\w-]+:\d+"
    r"|(x|counts|epochs|dead|again|ack|ledger|life|hb):\d+"
)


#: What the keys of a worker's batches are called, in the order in which scripts take them.
_QUEUE = ("x", "counts", "epochs", "dead", "again")

#: The tag of a run, and which shard of it, if it names one.
_TAG = re.compile(r"(?P<run>[^/}]*)(/s\d+)?")

#: Shards whose numbers are tried until they are spread well.
_SHARDS_TRIED = 2_000

#: Those among which every run has some: the first, and the first that is on another server, at least.
_SHARDS_LIKELY = 10


def run_of(key: str) -> str:
    """Give the run that a key belongs to; empty if it is none of ours.

    >>> run_of(Keys("pong", shards=("0", "4")).experiences(3))
    'pong'
    """
    before, brace, rest = key.removeprefix(_ROOT).partition("}:")
    tag = _TAG.fullmatch(before)
    ours = brace and tag and key.startswith(_ROOT) and _OURS.fullmatch(rest)
    return tag["run"] if tag and ours and is_run_name(tag["run"]) else ""


def shard_of(key: str) -> str:
    """Give what a key begins with: keys with the same beginning live together.

    >>> shard_of("rlb:{pong/s4}:x:3")
    'rlb:{pong/s4}'
    """
    return key.partition("}")[0] + "}"


@dataclass
class Keys:
    """The names of one run's keys.

    Attributes:
        shards: numbers of the run's shards, as `meta` has them; empty on a single server.
    """

    run: str
    prefix: str = field(init=False)
    shards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the run's name, as it becomes part of every key."""
        self.prefix = f"{_ROOT}{run_name(self.run)}}}"

    def spread(self, shards: str) -> None:
        """Take over which shards the run has, from the text in its `meta`."""
        self.shards = tuple(shards.split())

    def choose_shards(self, count: int, servers: int, server_of: Callable[[str], object]) -> str:
        """Give so many shards as text for `meta`, which live on the servers of a Cluster in equal parts.

        Args:
            count: how many.
            servers: on how many servers.
            server_of: gives the server of a key, as it is now.
        """
        found: list[str] = []
        lives = Counter[object]()
        for number in map(str, range(_SHARDS_TRIED)):
            server = server_of(Keys(self.run, shards=(number,)).shard_of(0) + ":x")
            if lives[server] < -(-count // servers):
                lives[server] += 1
                found.append(number)
            if len(found) == count:
                break
        return " ".join(found)

    @property
    def everything(self) -> str:
        """Pattern of all of the run's keys, to find and delete them."""
        return f"{self.prefix[:-1]}[}}/]*:*"

    @property
    def one_of_each_shard(self) -> list[str]:
        """Strings, one in each shard; none on a single server: the numbers of all shards, as `meta` has them.

        Learners write; one that opens a run whose `meta` was lost reads. They stay.
        """
        return [f"{self.shard_of(number)}:shards" for number in range(len(self.shards))]

    @property
    def one_of_likely_shards(self) -> list[str]:
        """The same of shards of which a run has some, whatever its others are, and on more than one server."""
        return Keys(self.run, shards=tuple(map(str, range(_SHARDS_LIKELY)))).one_of_each_shard

    def shard_of(self, number: int | str) -> str:
        """Give what the keys of a worker, or of a chunk, begin with: keys with the same beginning live together."""
        if not self.shards:
            return self.prefix
        shard = self.shards[0 if number == "*" else int(number) % len(self.shards)]
        return f"{self.prefix[:-1]}/s{shard}}}"

    def written_by_worker(self, worker: int | str) -> dict[str, str]:
        """Give the keys that a worker writes, or a pattern of them for all workers, who are `*`; each with its type."""
        queue, own = self.shard_of(worker), self.prefix
        return {
            f"{queue}:x:{worker}": "stream",
            f"{queue}:counts:{worker}": "hash",
            f"{own}:ack:{worker}": "stream",
            f"{own}:life:{worker}": "hash",
            f"{own}:hb:{worker}": "hash",
        }

    def read_by_worker(self, worker: int | str) -> list[str]:
        """Give the keys that a worker only reads; a pattern for chunks, and for all workers, who are `*`."""
        return [
            *(self.meta, self.weights, self.control, self.workers, f"{self.shard_of('*')}:w:*"),
            *(f"{self.prefix}:ledger:{worker}", f"{self.shard_of(worker)}:epochs:{worker}"),
        ]

    def queue(self, worker: int) -> list[str]:
        """Give the keys of one worker's batches, which scripts touch together."""
        return [f"{self.shard_of(worker)}:{kind}:{worker}" for kind in _QUEUE]

    def queue_beside(self, key: str) -> list[str]:
        """Give the keys of the queue that a key is part of, in the shard where it lives; none if it is part of none."""
        worker = self.queue_of(key)
        shard = key.partition("}")[0]
        return [] if worker is None else [f"{shard}}}:{kind}:{worker}" for kind in _QUEUE]

    def queue_of(self, key: str) -> int | None:
        """Give the worker whose queue a key is part of; None if it is none of those."""
        rest = key.partition("}:")[2]
        kind, _, worker = rest.partition(":")
        if run_of(key) != self.run or kind not in _QUEUE:
            return None
        return int(worker) if len(worker) <= len(str(MAX_WORKER_ID)) else None

    def is_never_reused(self, key: str) -> bool:
        """Whether no later life of the run uses this name again: chunks and outcomes have ids of their own."""
        return run_of(key) == self.run and key.partition("}:")[2].startswith(("w:", "outcomes:"))

    def describes_run(self, key: str) -> bool:
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
        return f"{self.shard_of(number)}:w:{upload}:{number}"

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
        return f"{self.shard_of(worker)}:x:{worker}"

    def counts(self, worker: int) -> str:
        """Give the key of a hash: what became of one worker's batches, by reason. Both sides write. Stays."""
        return f"{self.shard_of(worker)}:counts:{worker}"

    def epochs(self, worker: int) -> str:
        """Give the key of a hash: by learner's name, the newest epoch that may acknowledge one worker's batches.

        Learners write and read. Stays.
        """
        return f"{self.shard_of(worker)}:epochs:{worker}"

    def dead(self, worker: int) -> str:
        """Give the key of a stream: batches of one worker that could not be used, each with its reason.

        Learners write, people read and delete. At most 1,000 entries; oldest go first.
        """
        return f"{self.shard_of(worker)}:dead:{worker}"

    def again(self, worker: int) -> str:
        """Give the key of a stream: dead batches of one worker that are to be tried again.

        Learners and people write; learners read through the group `learner`, and delete.
        """
        return f"{self.shard_of(worker)}:again:{worker}"

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
