"""How steps of attention are timed: our kernels and their peers in turns, in one process, beside the machine's peaks.

On a GPU a step is replayed from a CUDA graph, on inputs that take turns, so that none of them is in the L2 cache. What
planning costs the host is left out, and reported once.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch

from module0_profiling.results import Figure
from module0_profiling.timing import Clock, Timing, clock_for, graph_clock, interleave, ratio
from phase3_paged_attention.measures.attention_errors import check
from phase3_paged_attention.measures.attention_inputs import make, more
from phase3_paged_attention.measures.attention_peers import FLASHINFER, Peer, first_line
from phase3_paged_attention.measures.attention_steps import Launch, Prepared, in_turns, ours, plan_seconds

CACHES = 3  # inputs together are this many times the L2 cache, if ten of them can be
FEW, CALLS, MANY = 3, 10, 100  # calls of a replayed graph
LONG_REPLAY, SHORT_REPLAY = 0.02, 0.002  # seconds; a replay's start costs some microseconds, which all calls share
OURS = "ours"
Prepare = Callable[[Any], Prepared]
OURS_ALONE: Mapping[str, Prepare] = MappingProxyType({OURS: ours})
NOTHING: Mapping[str, Prepare] = MappingProxyType({})


class Step(Protocol):
    """What is timed: a case of attention to keys and values, or to latents. Its text is the row of a table."""

    @property
    def bytes(self) -> int:
        """That it must read and write."""
        ...

    @property
    def flops(self) -> int:
        """That it must do."""
        ...


@dataclass(frozen=True)
class Workload:
    """How steps of a kind get their numbers.

    Attributes:
        make: (case, device) -> inputs, with `q` and `kv`.
        more: (inputs, n) -> n of them, the first included, that one plan serves.
        check: (subject, result [T, ...], inputs, exactly) -> raises CheckFailed where it is wrong; a peer's is compared
            roughly.
    """

    make: Callable[[Any, str], Any]
    more: Callable[[Any, int], list[Any]]
    check: Callable[[str, torch.Tensor, Any, bool], None]


Kind = TypeVar("Kind", bound=Step)


@dataclass(frozen=True)
class Bench:
    """Where and how a case is measured.

    Attributes:
        device: as torch names it.
        rounds: how often each subject is timed.
        dry: tiny sizes on the CPU; the figures mean nothing.
        deadline: `time.monotonic()` after which no further size is begun.
        missing: peers that are not measured, with the reason; grows.
    """

    device: str = "cuda"
    rounds: int = 7
    dry: bool = False
    deadline: float = math.inf
    missing: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def within(seconds: float, device: str, rounds: int, dry: bool) -> Bench:
        """One that ends after so many seconds."""
        return Bench(device, rounds, dry, time.monotonic() + seconds)

    def affordable(self, cases: Iterable[Kind], copies: float = 1.5) -> Iterator[Kind]:
        """The cases, in order, for which memory and time are left; a dry run gets tiny ones.

        Args:
            cases: most valuable first.
            copies: memory that a case needs, in its minimum of bytes.
        """
        for case in cases:
            if time.monotonic() > self.deadline:
                self.missing.setdefault(str(case), "no time was left")
            elif self.device.startswith("cuda") and case.bytes * copies > _free(self.device):
                self.missing.setdefault(str(case), "does not fit")
            else:
                yield case

    def not_measured(self) -> list[Figure]:
        """A line for each thing that is missing."""
        return [Figure(f"not measured/{name}", 0, "", note=why) for name, why in self.missing.items()]


@dataclass(frozen=True)
class Ready:
    """A case whose subjects can be launched; it holds the inputs. `seconds`: of the slowest launch."""

    case: Step
    launches: Mapping[str, Launch]
    plans: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Timed:
    """What one case gave, by subject: seconds a launch, and seconds of the host for a plan."""

    case: Step
    timings: Mapping[str, Timing]
    plans: Mapping[str, float]

    def over(self, other: str, subject: str = OURS) -> float:
        """How many times longer `other` takes."""
        return ratio(self.timings[other], self.timings[subject])

    def best(self, prefix: str = FLASHINFER) -> str | None:
        """The fastest of the subjects whose names begin so."""
        found = [name for name in self.timings if name.startswith(prefix)]
        return min(found, key=lambda name: self.timings[name].median) if found else None


def timed(case: Step, bench: Bench, **subjects: Any) -> Timed:
    """Time subjects of one case in turns; arguments are those of `ready`."""
    return race([ready(case, bench, **subjects)], bench)[0]


def ready(
    case: Any,
    bench: Bench,
    *,
    peers: Sequence[Peer] = (),
    must: Mapping[str, Prepare] = OURS_ALONE,
    may: Mapping[str, Prepare] = NOTHING,
    workload: Workload | None = None,
) -> Ready:
    """Make inputs and prepare what is to be timed on them.

    Args:
        case: what to compute.
        bench: where.
        peers: those of them that are here and suit the case take part.
        must: subjects that have to work. Their results are checked against float64.
        may: subjects that are left out, with the reason, where they don't.
        workload: of the case; None: attention to keys and values.

    Raises:
        CheckFailed: one of `must` is wrong on these inputs.
    """
    kind = workload or Workload(make, more, check)
    others = {peer.name: peer.prepare for peer in peers if peer.suits(case) and _present(peer, bench)}
    inputs = kind.make(case, bench.device)
    copies = kind.more(inputs, copies_of(case, bench.device))
    launches: dict[str, Launch] = {}
    plans: dict[str, float] = {}
    longest = 0.0
    for name, prepare in {**must, **may, **others}.items():
        try:
            prepared = prepare(inputs)
            kind.check(name, prepared.bind(inputs.q, inputs.kv)(), inputs, name not in others)
            launches[name] = in_turns(prepared, copies)
            longest = max(longest, clock_for(bench.device)(launches[name]))
        except Exception as error:
            if name in must:
                raise
            launches.pop(name, None)
            bench.missing[f"{name}, {case}"] = f"{type(error).__name__}: {first_line(error)}"
        else:
            plans[name] = plan_seconds(prepared, bench.device, 1 if bench.dry else 5)
    return Ready(case, launches, plans, longest)


def race(field: Sequence[Ready], bench: Bench) -> list[Timed]:
    """Time all subjects of all cases in turns; one that can't be captured in a graph is left out."""
    everyone = {(n, name): launch for n, one in enumerate(field) for name, launch in one.launches.items()}
    clock, runnable = _clock(max(one.seconds for one in field), bench), {}
    for (n, name), launch in everyone.items():
        try:
            clock(launch)
        except Exception as error:
            if name == OURS:
                raise
            bench.missing[f"{name}, {field[n].case}"] = f"{type(error).__name__}: {first_line(error)}"
        else:
            runnable[f"{n} {name}"] = launch
    found = interleave(runnable, rounds=bench.rounds, warmup=0, device=bench.device, clock=clock)
    return [
        Timed(one.case, {name: found[f"{n} {name}"] for name in one.launches if f"{n} {name}" in found}, one.plans)
        for n, one in enumerate(field)
    ]


def copies_of(case: Step, device: str) -> int:
    """Inputs that take turns: enough to leave the L2 cache, at most as many as a graph has calls."""
    if not device.startswith("cuda"):
        return 2
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or (64 << 20)
    return max(1, min(CALLS, -(-CACHES * l2 // case.bytes)))


def _clock(seconds: float, bench: Bench) -> Clock:
    """For launches of up to so many seconds: a graph whose replay is long beside its start, but not minutes."""
    if not bench.device.startswith("cuda"):
        return clock_for(bench.device)
    calls = FEW if seconds * CALLS > LONG_REPLAY else max(CALLS, min(MANY, round(SHORT_REPLAY / seconds)))
    return graph_clock(bench.device, calls)


def _present(peer: Peer, bench: Bench) -> bool:
    if why := peer.why_not():
        bench.missing[peer.name] = why
    return not why


def _free(device: str) -> int:
    gc.collect()
    torch.cuda.empty_cache()  # what torch keeps for later is not free to the driver
    return torch.cuda.mem_get_info(device)[0]
