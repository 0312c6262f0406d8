"""One frame of `titan top`: pure drawing of what GET /load said, now and during the last minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Reading: TypeAlias = dict[str, Any]  # fields of `wire.Stats`, rates and percentiles, state; see server/service.py

LEVELS = "▁▂▃▄▅▆▇█"
BAR = 40  # characters of the KV bar
GOOD, BAD = ("ready",), ("hung", "broken", "stopped", "away")


class History:
    """Readings of the last `seconds`, newest last."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._kept: deque[tuple[float, Reading]] = deque()

    def add(self, now: float, reading: Reading) -> None:
        """Keep a reading of this moment and forget those that are too old."""
        self._kept.append((now, reading))
        while now - self._kept[0][0] > self.seconds:
            self._kept.popleft()

    @property
    def newest(self) -> Reading:
        """The last reading; {} before the first."""
        return self._kept[-1][1] if self._kept else {}

    def series(self, value: Callable[[Reading], float]) -> list[float]:
        """One value of each reading, oldest first."""
        return [value(reading) for _, reading in self._kept]


def sparkline(values: Iterable[float], width: int = 60, top: float | None = None) -> str:
    """The last `width` values as blocks between 0 and `top`, by default the largest of them; 0 is a blank."""
    shown = list(values)[-width:]
    largest = max(shown, default=0.0) if top is None else top
    if largest <= 0:
        return " " * len(shown)
    return "".join(_block(value / largest) for value in shown)


def bar(share: float, width: int = BAR) -> str:
    """A share of one as a bar."""
    full = round(min(1.0, max(0.0, share)) * width)
    return "█" * full + "░" * (width - full)


def frame(history: History, url: str, *, away: str = "") -> RenderableType:
    """The dashboard.

    Args:
        history: readings; the newest is shown in figures, all of them as sparklines.
        url: of the server.
        away: why the server does not answer now; "": it does.
    """
    now = history.newest
    parts: list[RenderableType] = [_head(now, url, away)]
    if now:
        parts.append(_rows(history))
    return Group(*parts)


def _head(now: Reading, url: str, away: str) -> Text:
    state = "away" if away else str(now.get("state", "?"))
    colour = "green" if state in GOOD else "red" if state in BAD else "yellow"
    text = Text.assemble((str(now.get("model", "titan")), "bold"), f" at {url}  ", (state, f"bold {colour}"))
    if now:
        text.append(f"  up {_duration(_number(now, 'uptime'))}, {_count(now, 'restarts')} engine restarts")
    if away:
        text.append(f"\n{away}; trying again", style="red")
    return text


def _rows(history: History) -> Table:
    now = history.newest
    drawn = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    drawn.add_column(no_wrap=True, style="dim")
    drawn.add_column(no_wrap=True, min_width=BAR)
    drawn.add_column(no_wrap=True, style="cyan")

    def row(name: str, value: str, series: Callable[[Reading], float] | None = None, top: float | None = None) -> None:
        drawn.add_row(name, value, sparkline(history.series(series), top=top) if series else "")

    def field(name: str) -> Callable[[Reading], float]:
        return lambda reading: _number(reading, name)

    row("requests/s", f"{_number(now, 'qps'):,.1f}", field("qps"))
    for name, key in (("first token", "ttft"), ("inter-token", "itl")):
        p50, p99 = _milliseconds(now, f"{key}_p50"), _milliseconds(now, f"{key}_p99")
        row(name, f"p50 {p50}   p99 {p99}", field(f"{key}_p99"))
    made, read = _number(now, "generated_tokens_per_second"), _number(now, "prompt_tokens_per_second")
    row("tokens/s", f"{made:,.0f} generated   {read:,.0f} prompt", field("generated_tokens_per_second"))
    row("running", f"{_count(now, 'running')}   {_count(now, 'in_flight')} requests in flight", field("running"))
    row("waiting", f"{_count(now, 'waiting')}   {_count(now, 'swapped')} swapped out", field("waiting"))
    backlog = f"{_count(now, 'backlog_tokens')} tokens   retry after {_number(now, 'retry_after'):.0f} s"
    row("backlog", backlog, field("backlog_tokens"))
    row("KV blocks", f"{bar(_kv(now))} {_kv(now):4.0%} of {_count(now, 'kv_blocks')}", _kv, 1.0)
    lost = f"{_count(now, 'preemptions')}   {_count(now, 'recomputed_tokens')} tokens computed again"
    row("preemptions", lost, field("preemptions_per_second"))
    step = f"{_number(now, 'batch_occupancy'):.1f} sequences   {_number(now, 'tokens_per_step'):.1f} tokens"
    row("a step has", step, field("batch_occupancy"))
    row("busy", f"{bar(_number(now, 'busy'))} {_number(now, 'busy'):4.0%}", field("busy"), 1.0)
    return drawn


def _block(share: float) -> str:
    if share <= 0:
        return " "
    return LEVELS[min(len(LEVELS) - 1, int(share * len(LEVELS)))]


def _number(reading: Reading, name: str) -> float:
    """A field; 0 where an older or another server has none."""
    value = reading.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _count(reading: Reading, name: str) -> str:
    return f"{_number(reading, name):,.0f}"


def _kv(reading: Reading) -> float:
    blocks = _number(reading, "kv_blocks")
    return 1 - _number(reading, "kv_blocks_free") / blocks if blocks else 0.0


def _milliseconds(reading: Reading, name: str) -> str:
    seconds = _number(reading, name)
    return f"{1e3 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _duration(seconds: float) -> str:
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
