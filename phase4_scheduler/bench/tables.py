"""A load or an offline run as tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phase4_scheduler.bench.summary import Spread, Summary

if TYPE_CHECKING:
    from rich.table import Table

BUSY_CLIENT = 0.8  # of a core: above it times are partly the client's
LATE = 0.05  # seconds: above it the arrivals were not those that were asked for


def of_load(summary: Summary) -> list[Table]:
    """Counts and rates, then times."""
    rates = _table("", "")
    rates.add_row("requests completed", f"{summary.completed:,}")
    if summary.failed or summary.refused:
        rates.add_row("failed", f"{summary.failed:,}")
    for status, count in summary.refused.items():
        rates.add_row(f"refused with {status}", f"{count:,}")
    rates.add_row("duration", f"{summary.duration:.2f} s")
    rates.add_row("requests/s", f"{summary.request_rate:.2f}")
    if summary.goodput is not None:
        rates.add_row("in time, requests/s", f"{summary.goodput:.2f}")
    rates.add_row("output tokens/s", f"{summary.output_rate:,.1f}")
    rates.add_row("total tokens/s", f"{summary.total_rate:,.1f}")
    rates.add_row("prompt and output tokens", f"{summary.prompt_tokens:,} + {summary.output_tokens:,}")
    rows = {
        "time to first token": summary.ttft,
        "inter-token latency": summary.itl,
        "per token after the first": summary.tpot,
        "end to end": summary.e2e,
    }
    return [rates, of_times(rows)]


def of_times(rows: dict[str, Spread | None]) -> Table:
    """Distributions in milliseconds; what was not measured is left out."""
    drawn = _table("milliseconds", "mean", "p50", "p90", "p99", "max")
    for name, spread in rows.items():
        if spread is not None:
            values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.largest)
            drawn.add_row(name, *(f"{1e3 * value:,.2f}" for value in values))
    return drawn


def remarks(summary: Summary) -> list[str]:
    """What a reader must know before believing the figures; nothing, mostly."""
    said = [f"{count:,} x {error}" for error, count in summary.errors.items()]
    if summary.interrupted:
        said.append("interrupted: the figures are those of the requests that had ended")
    if summary.short_answers:
        said.append(f"{summary.short_answers:,} answers are shorter than asked: does the server know ignore_eos?")
    if summary.tokens_per_chunk > 1.5:
        said.append(f"{summary.tokens_per_chunk:.1f} tokens in a chunk: inter-token latencies are those of chunks")
    if summary.client_busy > BUSY_CLIENT:
        said.append(f"this client used {summary.client_busy:.0%} of a core: it may be what was measured")
    if summary.sent_late > LATE:
        said.append(f"requests were sent up to {1e3 * summary.sent_late:.0f} ms late: the arrivals are not as asked")
    return said


def of_pairs(pairs: dict[str, Any]) -> Table:
    """Names with their values."""
    drawn = _table("", "")
    for name, value in pairs.items():
        drawn.add_row(name, value if isinstance(value, str) else f"{value:,.4g}")
    return drawn


def _table(*heads: str) -> Table:
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=any(heads))
    for i, head in enumerate(heads):
        drawn.add_column(head, justify="right" if i else "left", no_wrap=True)
    return drawn
