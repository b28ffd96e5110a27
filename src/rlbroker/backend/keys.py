"""Every key of rlbroker in Redis: its name, type, writer, readers and lifetime.

All keys of a run begin `rlb:{RUN}:`; the braces are Redis Cluster's hash tag. On a Cluster a run also has shards:
large or busy keys are spread over them, and begin `rlb:{RUN/s3}:`. Only this file builds the names of keys. No other
file may assume that two keys are on the same node, except within these two groups, which scripts use together:

- the run's own keys: `meta`, `weights`, `ctl`, `workers`, `pending`, `missed`, and per worker `life:`, `hb:`,
  `ack:` and `ledger:`;
- each worker's `x:`, `counts:`, `epochs:`, `dead:` and `again:`, all in the shard of that worker.

Chunks of weights are spread one by one, and each shard has a key `shards`.

Keys without a lifetime stay until `rlbroker prune` deletes the run: `meta` and every other key that a later run of
the same name would use, in one step.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rlbroker.config import MAX_WORKER_ID, check_run_name, is_run_name

#: Pattern of all keys of all runs, as in ACL rules.
EVERY_KEY = "rlb:*"

#: The beginning of every key, up to the name of its run.
_ROOT = "rlb:{"

#: The consumer group that reads the experiences of every worker.
GROUP = "learner"

#: What can follow the run's prefix in a key.
_REST = re.compile(
    r"meta|weights|ctl|missed|pending|workers|shards|history:\d+|outcomes:\w+|w:[\w-]+:\d+"
    r"|(x|counts|epochs|dead|again|ack|ledger|life|hb):\d+"
)

#: The kinds of keys of a worker's queue, in the order in which scripts take them.
_QUEUE = ("x", "counts", "epochs", "dead", "again")

#: The hash tag: the run, and its shard if the key is in one.
_TAG = re.compile(r"(?P<run>[^/}]*)(/s\d+)?")

#: How many shard numbers are tried until the shards are spread evenly over the servers.
_SHARDS_TRIED = 2_000

#: A run has at least two of this many first shard numbers: the first, and the first on another server.
_SHARDS_LIKELY = 10


def run_of(key: str) -> str:
    """Return the run that a key belongs to; empty if it is not a key of rlbroker.

    >>> run_of(Keys("pong", shards=("0", "4")).experiences(3))
    'pong'
    """
    before, brace, rest = key.removeprefix(_ROOT).partition("}:")
    tag = _TAG.fullmatch(before)
    is_key = brace and tag and key.startswith(_ROOT) and _REST.fullmatch(rest)
    return tag["run"] if tag and is_key and is_run_name(tag["run"]) else ""


def shard_of(key: str) -> str:
    """Return a key's prefix; keys with the same prefix are on the same server.

    >>> shard_of("rlb:{pong/s4}:x:3")
    'rlb:{pong/s4}'
    """
    return key.partition("}")[0] + "}"


@dataclass
class Keys:
    """The names of one run's keys.

    Attributes:
        prefix: the beginning of the run's own keys.
        shards: numbers of the run's shards, as in `meta`; empty on a single server.
    """

    run: str
    prefix: str = field(init=False)
    shards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the run's name, which becomes part of every key."""
        self.prefix = f"{_ROOT}{check_run_name(self.run)}}}"

    def use_shards(self, shards: str) -> None:
        """Use the shards of the run, from the text in its `meta`."""
        self.shards = tuple(shards.split())

    def choose_shards(self, count: int, servers: int, server_of: Callable[[str], object]) -> str:
        """Return numbers of shards that are spread evenly over the servers of a Cluster, as text for `meta`.

        `server_of` returns the present server of a key.
        """
        found: list[str] = []
        per_server = Counter[object]()
        for number in map(str, range(_SHARDS_TRIED)):
            server = server_of(Keys(self.run, shards=(number,)).shard_of(0) + ":x")
            if per_server[server] < -(-count // servers):
                per_server[server] += 1
                found.append(number)
            if len(found) == count:
                break
        return " ".join(found)

    @property
    def everything(self) -> str:
        """Pattern of all keys of the run, to find and delete them."""
        return f"{self.prefix[:-1]}[}}/]*:*"

    @property
    def one_of_each_shard(self) -> list[str]:
        """Keys of strings, one in each shard: the numbers of all shards, as in `meta`. None on a single server.

        Learners write; a learner that opens a run whose `meta` was lost reads. They stay.
        """
        return [f"{self.shard_of(number)}:shards" for number in range(len(self.shards))]

    @property
    def one_of_likely_shards(self) -> list[str]:
        """The same for the first shard numbers: every run has at least two of them, on different servers."""
        return Keys(self.run, shards=tuple(map(str, range(_SHARDS_LIKELY)))).one_of_each_shard

    def shard_of(self, number: int | str) -> str:
        """Return the prefix of the keys of a worker, or of a chunk; `*` stands for any worker."""
        if not self.shards:
            return self.prefix
        shard = self.shards[0 if number == "*" else int(number) % len(self.shards)]
        return f"{self.prefix[:-1]}/s{shard}}}"

    def written_by_worker(self, worker: int | str) -> dict[str, str]:
        """Return the keys that a worker writes, each with its type; patterns for the worker `*`, which is any."""
        queue, own = self.shard_of(worker), self.prefix
        return {
            f"{queue}:x:{worker}": "stream",
            f"{queue}:counts:{worker}": "hash",
            f"{own}:ack:{worker}": "stream",
            f"{own}:life:{worker}": "hash",
            f"{own}:hb:{worker}": "hash",
        }

    def read_by_worker(self, worker: int | str) -> list[str]:
        """Return the keys that a worker only reads; a pattern for chunks, and for the worker `*`, which is any."""
        return [
            *(self.meta, self.weights, self.control, self.workers, f"{self.shard_of('*')}:w:*"),
            *(f"{self.prefix}:ledger:{worker}", f"{self.shard_of(worker)}:epochs:{worker}"),
        ]

    def queue(self, worker: int) -> list[str]:
        """Return the keys of one worker's queue, which scripts use together."""
        return [f"{self.shard_of(worker)}:{kind}:{worker}" for kind in _QUEUE]

    def queue_beside(self, key: str) -> list[str]:
        """Return the keys of the queue that a key is part of, in the key's shard; none if it is not part of a queue."""
        worker = self.queue_of(key)
        shard = key.partition("}")[0]
        return [] if worker is None else [f"{shard}}}:{kind}:{worker}" for kind in _QUEUE]

    def queue_of(self, key: str) -> int | None:
        """Return the worker whose queue a key is part of; None if it is not part of a queue."""
        rest = key.partition("}:")[2]
        kind, _, worker = rest.partition(":")
        if run_of(key) != self.run or kind not in _QUEUE:
            return None
        return int(worker) if len(worker) <= len(str(MAX_WORKER_ID)) else None

    def is_never_reused(self, key: str) -> bool:
        """Return whether no later learner of the run uses this key again: chunks and outcomes have unique ids."""
        return run_of(key) == self.run and key.partition("}:")[2].startswith(("w:", "outcomes:"))

    def describes_run(self, key: str) -> bool:
        """Return whether commands read this key to find runs and their state."""
        return key in (self.meta, self.weights, self.workers) or key.startswith(self.life_prefix)

    @property
    def meta(self) -> str:
        """Hash: wire format, the learner's epoch and its settings. Learner writes, all read. Stays."""
        return f"{self.prefix}:meta"

    @property
    def weights(self) -> str:
        """Hash: the manifest of the latest version, written last. Learner writes, workers read. Stays."""
        return f"{self.prefix}:weights"

    def chunk(self, upload: str, number: int) -> str:
        """Return the key of a string: one immutable chunk of a version; number 0 is the version's header.

        The name of an upload is `<version>-<epoch>-<attempt>`, so that no two uploads write to the same key.
        Learner writes, workers read. Expires some time after a newer version was published.
        """
        return f"{self.shard_of(number)}:w:{upload}:{number}"

    def upload(self, upload: str, chunks: int) -> list[str]:
        """Return all keys of an upload: the header's, and those of this many chunks."""
        return [self.chunk(upload, number) for number in range(chunks + 1)]

    @property
    def notify(self) -> str:
        """Publish/subscribe channel: the number of a version that was just published. A hint that may be lost."""
        return f"{self.prefix}:notify"

    def experiences(self, worker: int) -> str:
        """Return the key of a stream: the batches of one worker, with ids `<incarnation>-<sequence>`.

        That worker writes; the learner reads through the group `learner`, and deletes a batch that it acknowledged.
        """
        return f"{self.shard_of(worker)}:x:{worker}"

    def counts(self, worker: int) -> str:
        """Return the key of a hash: one worker's batches, counted by outcome. Both sides write. Stays."""
        return f"{self.shard_of(worker)}:counts:{worker}"

    def epochs(self, worker: int) -> str:
        """Return the key of a hash: for each learner's name, the newest epoch that may acknowledge a worker's batches.

        Learners write and read. Stays.
        """
        return f"{self.shard_of(worker)}:epochs:{worker}"

    def dead(self, worker: int) -> str:
        """Return the key of a stream: dead letters, batches of one worker that could not be used, each with its reason.

        Learners write, people read and delete. At most 1,000 entries; the oldest are trimmed.
        """
        return f"{self.shard_of(worker)}:dead:{worker}"

    def again(self, worker: int) -> str:
        """Return the key of a stream: dead letters of one worker that learners must try again.

        Learners and people write; learners read through the group `learner`, and delete.
        """
        return f"{self.shard_of(worker)}:again:{worker}"

    @property
    def control(self) -> str:
        """Stream: commands and notices of new versions, in order. Learner writes, workers read.

        `rlbroker control send` adds commands in the learner's place, here and to `pending` and `outcomes:`.
        The learner trims acknowledged entries that are older than an hour.
        """
        return f"{self.prefix}:ctl"

    def acknowledgements(self, worker: int) -> str:
        """Return the key of a stream: one worker's acknowledgements, with ids `<incarnation>-<n>`.

        That worker writes; the learner's ledger folds in each entry and deletes it.
        """
        return f"{self.prefix}:ack:{worker}"

    def ledger(self, worker: int) -> str:
        """Return the key of a hash: sums of what one worker applied and missed. Learner writes. Stays."""
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
        """Return the key of a hash: one command's state by worker. Learner writes. Expires after a day."""
        return f"{self.prefix}:outcomes:{command}"

    @property
    def workers(self) -> str:
        """Set: the ids of all workers that ever joined. Workers add their own, all read. Stays."""
        return f"{self.prefix}:workers"

    def life(self, worker: int) -> str:
        """Return the key of a hash: a worker's newest incarnation, whether it is a member, and when it was last seen.

        That worker writes, and the learner when it removes the worker; all read. Stays, and its incarnation only grows.
        """
        return f"{self.life_prefix}{worker}"

    @property
    def life_prefix(self) -> str:
        """The beginning of the keys that `life` returns."""
        return f"{self.prefix}:life:"

    def heartbeat(self, worker: int) -> str:
        """Return the key of a hash: a worker's latest heartbeat. That worker writes. Expires unless it is renewed."""
        return f"{self.prefix}:hb:{worker}"

    def history(self, seconds: int) -> str:
        """Return the key of a capped stream: metrics of the run, one entry for each interval of this many seconds.

        The leading learner writes, people read. Stays. No script uses it together with another key.
        """
        return f"{self.prefix}:history:{seconds}"
