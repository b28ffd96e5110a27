"""The bottleneck of a run: the learner, its workers, or publishing weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

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
    """Shares of a span of time, from 0 to 1, and the bottleneck that they show.

    Attributes:
        learner_waits: `collect_experiences` waited for data.
        workers_wait: `send_experiences` waited for room in a queue, as a share of the time of all live workers.
        encoding: weights were compressed.
        sending: weights were sent to the server.
        publishing: from calls of `send_model_weights` until the versions were published.
        which: the bottleneck: `workers`, `learner`, `encoding`, `sending`, `nothing`, or `unknown`.
        what: one sentence for people.
    """

    learner_waits: float
    workers_wait: float
    encoding: float
    sending: float
    publishing: float
    which: Cause
    what: str


def judge(
    seconds: float,
    *,
    learner_waits: float,
    workers_wait: float,
    encoding: float,
    sending: float,
    publishing: float,
    collected: float = 1,
) -> Bottleneck:
    """Return the bottleneck of a run by `RULE`.

    Args:
        seconds: the length of the measured span.
        learner_waits, workers_wait, encoding, sending, publishing: shares of the time, as in `Bottleneck`.
        collected: batches that the learner collected in this span.

    >>> judge(60, learner_waits=0.63, workers_wait=0, encoding=0, sending=0, publishing=0).what
    'the learner waits for data 63 % of the time: more or faster workers would help'
    """
    which: Cause
    if seconds < ENOUGH_SECONDS:
        which = "unknown"
        what = "the history is too short to tell what holds the run back"
    elif not collected:
        which = "unknown"
        what = "no batches were collected in this time, so what holds the run back is unknown"
    elif learner_waits >= LEARNER_WAITS and learner_waits >= workers_wait:
        which = "workers"
        what = (
            f"the learner waits for data {format_share(learner_waits)} of the time: more or faster workers would "
            "help"
        )
    elif workers_wait >= WORKERS_WAIT:
        which = "learner"
        what = (
            f"workers wait for room {format_share(workers_wait)} of their time: the learner is too slow for them; "
            "fewer workers would be enough"
        )
    elif publishing >= PUBLISHING:
        which = "encoding" if encoding >= sending else "sending"
        helps = "compression_enabled=False" if which == "encoding" else "a faster network"
        what = (
            f"publishing weights takes {format_share(publishing)} of the time, most of it {which}: {helps}, or "
            "wait=False, would help"
        )
    else:
        which = "nothing"
        what = (
            f"nothing holds the run back: the learner waits for data {format_share(learner_waits)} of the time, "
            f"workers wait for room {format_share(workers_wait)} of theirs"
        )
    return Bottleneck(learner_waits, workers_wait, encoding, sending, publishing, which, what)
