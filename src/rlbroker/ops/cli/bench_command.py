"""`rlbroker bench`: measures the throughput and latency of a server."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from rlbroker.ops.cli.session import Session
from rlbroker.ops.cli.shared_options import with_session

if TYPE_CHECKING:
    from rlbroker.ops.bench import BenchReport


@with_session(without=("run", "timeout"))
def bench(
    session: Session,
    megabytes: Annotated[float, typer.Option(min=0.01, help="Size of the published weights.")] = 16.0,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Duration of each of the eight measurements.")
    ] = 1.0,
) -> None:
    """Measure a server from this machine: round trip, link, weights, batches, and whether compression pays.

    It takes about 10 seconds and slows the server for other users meanwhile. It uses a run of its own and deletes it
    afterwards. Exit code: 0, 2 if the server cannot be used, 130 after Ctrl-C.

    Example: rlbroker bench --url redis://host:6379/0 --megabytes 128
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from rlbroker.ops.bench import measure

    def note_stage(stage: str) -> None:
        session.note(f"… {stage}")

    report = measure(session.url, megabytes=megabytes, seconds=seconds, progress=note_stage)
    if session.as_json:
        session.print_json(report.to_json())
    else:
        _print_text(report)


def _print_text(report: BenchReport) -> None:
    print(f"server      {report.server} ({report.server_version or 'version unknown'})")
    print(f"round trip  {report.round_trip_us:,.0f} µs median, {report.round_trip_p99_us:,.0f} µs p99")
    set_rate, get_rate = report.set_megabytes_per_second, report.get_megabytes_per_second
    print(f"link        {set_rate:,.0f} MB/s to the server, {get_rate:,.0f} MB/s from it, in values of 1 MB")
    for weights in report.published:
        form = "compressed" if weights.compressed else "raw"
        print(
            f"weights     {weights.megabytes:g} MB float32 {form}: {weights.applied_ms:,.1f} ms from publish "
            f"to applied, {weights.megabytes_per_second:,.0f} MB/s"
        )
    for batches in report.batches:
        print(
            f"batches     {batches.size_bytes >> 10:,} KB: {batches.batches_per_second:,.0f} per second, "
            f"{batches.megabytes_per_second:,.1f} MB/s, one worker"
        )
    print(f"verdict     {report.verdict}")
