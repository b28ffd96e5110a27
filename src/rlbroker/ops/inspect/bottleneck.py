"""The bottleneck of a run: the learner, its workers, or publishing weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from rlbroker.ops.formatting import format_share

#: What limits a run; `unknown` if the history is too short, or has no batches.
Cause = Literal["workers", "learner", "encoding", "sending", "nothing", "unknown"]

#: A shorter history gives no verdict.
ENOUGH_SECONDS: Final = 10.0

#: Shares of time from which something is the bottleneck. The one for workers is low: they wait only for a full queue.
LEARNER_WAITS: Final = 0.25
WORKERS_WAIT: Final = 0.10
PUBLISHING: Final = 0.25

#: The rule, for people.
RULE: Final = (
    f"Workers are too slow, or too few, if the learner waits for data for {LEARNER_WAITS * 100:.0f} % of the time or "
    "more, and for a larger share than workers wait for room. The learner is too slow if workers wait for room for "
    f"{WORKERS_WAIT * 100:.0f} % of their time or more. Otherwise publishing holds the run back if it takes "
    f"{PUBLISHING * 100:.0f} % of the time or more. Only waits within collect_experiences and send_experiences count."
)


@dataclass(frozen=True)
class Bottleneck:
    """Shares of a span of time, from 0 to 1, and the bottleneck that they show by `RULE`.

    Attributes:
        seconds: the length of the span.
        collected: batches that the learner collected in it.
        learner_waits: `collect_experiences` waited for data.
        workers_wait: `send_experiences` waited for room in a queue, as a share of the time of all live workers.
        encoding: weights were compressed.
        sending: weights were sent to the server.
        publishing: from calls of `send_model_weights` until the versions were published.
    """

    seconds: float
    collected: float
    learner_waits: float
    workers_wait: float
    encoding: float
    sending: float
    publishing: float

    @property
    def which(self) -> Cause:
        """The bottleneck."""
        if self.seconds < ENOUGH_SECONDS or not self.collected:
            return "unknown"
        if self.learner_waits >= LEARNER_WAITS and self.learner_waits >= self.workers_wait:
            return "workers"
        if self.workers_wait >= WORKERS_WAIT:
            return "learner"
        if self.publishing >= PUBLISHING:
            return "encoding" if self.encoding >= self.sending else "sending"
        return "nothing"

    @property
    def what(self) -> str:
        """The bottleneck in one sentence for people.

        >>> Bottleneck(60, 9, learner_waits=0.63, workers_wait=0, encoding=0, sending=0, publishing=0).what
        'the learner waits for data 63 % of the time: more or faster workers would help'
        """
        data_share, room_share = format_share(self.learner_waits), format_share(self.workers_wait)
        publishing = (
            f"publishing weights takes {format_share(self.publishing)} of the time, most of it {self.which}"
        )
        if self.which == "unknown" and self.seconds < ENOUGH_SECONDS:
            return "the history is too short to tell what holds the run back"
        return {
            "unknown": "no batches were collected in this time, so what holds the run back is unknown",
            "workers": f"the learner waits for data {data_share} of the time: more or faster workers would help",
            "learner": f"workers wait for room {room_share} of their time: the learner is too slow for them; fewer "
            "workers would be enough",
            "encoding": f"{publishing}: compression_enabled=False, or wait=False, would help",
            "sending": f"{publishing}: a faster network, or wait=False, would help",
            "nothing": f"nothing holds the run back: the learner waits for data {data_share} of the time, workers "
            f"wait for room {room_share} of theirs",
        }[self.which]

    def to_json(self) -> dict[str, Any]:
        """Return the shares, `which` and `what` as values for JSON."""
        shares = {name: share for name, share in asdict(self).items() if name not in ("seconds", "collected")}
        return shares | {"which": self.which, "what": self.what}
