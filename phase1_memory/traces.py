"""Workloads for the simulator: when requests arrive, how long their prompts are, how many tokens they generate.

The lengths that matter most are those of real conversations. Section 6.1 of the PagedAttention paper (Kwon et al.,
2023, arXiv 2309.06180, figure 11) gives the means: 161.31 prompt and 337.99 output tokens for ShareGPT, 19.31 and 58.45
for Alpaca. It shows histograms with a long tail but no variance: log-normal lengths with the SIGMAS below are our
choice. A length is at most CAP, so that prompt and output fit the paper's 2048 tokens; the means hold after that.

Everything is drawn from a seed: the same call gives the same trace.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from phase0_prototype.errors import UserError

MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}  # prompt, output
SIGMAS = (1.2, 1.0)  # of the logarithm of prompt and output lengths
CAP = 1024  # tokens in a prompt, and in an output
COLUMNS = ("arrival", "prompt", "output")


@dataclass(frozen=True)
class Job:
    """One request: the step at which it arrives, tokens of its prompt, tokens that it will generate."""

    arrival: int
    prompt: int
    output: int

    @property
    def total(self) -> int:
        """Tokens that it holds in the end."""
        return self.prompt + self.output


@dataclass(frozen=True)
class Trace:
    """Jobs in the order of their arrival."""

    name: str
    jobs: tuple[Job, ...]

    def __post_init__(self) -> None:
        for job, after in zip(self.jobs, self.jobs[1:], strict=False):
            if job.arrival > after.arrival:
                raise ValueError(f"trace {self.name}: {job} stands before {after}, which arrives earlier")


def conversations(kind: str, seed: int, count: int, rate: float) -> Trace:
    """Requests as long as those of a published data set, arriving at random.

    Args:
        kind: "sharegpt" or "alpaca".
        seed: of lengths and arrivals.
        count: requests.
        rate: arrivals a step, on average; the gaps are exponential (a Poisson process, as in the paper).
    """
    rng = np.random.default_rng(seed)
    prompts, outputs = (_lognormal(rng, count, mean, sigma) for mean, sigma in zip(MEANS[kind], SIGMAS, strict=True))
    return _trace(kind, _arrivals(rng, count, rate), prompts, outputs)


def growing(seed: int, alive: int = 1000, steps: int = 2000) -> Trace:
    """`alive` requests at every step, each growing by a token; one ends at random, the next takes its place.

    Prompts are ShareGPT's. At every step each request ends with the same probability, so the outputs are geometric,
    with ShareGPT's mean (a few end at 2 x CAP tokens). Where one has to wait, its successor arrives all the same.
    """
    rng = np.random.default_rng(seed)
    mean = MEANS["sharegpt"]
    jobs: list[Job] = []
    for _ in range(alive):
        at = 0
        while at < steps:
            prompt = int(_lognormal(rng, 1, mean[0], SIGMAS[0])[0])
            output = min(int(rng.geometric(1 / mean[1])), 2 * CAP - prompt)
            jobs.append(Job(at, prompt, output))
            at += output
    return Trace("growing", tuple(sorted(jobs, key=lambda job: job.arrival)))


def uniform(seed: int, count: int, rate: float, low: int = 1, high: int = CAP) -> Trace:
    """Every length from `low` to `high` is equally likely, for prompts and for outputs: holes of every size."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(low, high + 1, (2, count))
    return _trace("uniform", _arrivals(rng, count, rate), prompts, outputs)


def bimodal(seed: int, count: int, rate: float, short: int = 32, long: int = CAP, share: float = 0.1) -> Trace:
    """Short requests, and among them a `share` of long ones that fit none of the holes which short ones leave."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(count) < share, long, short)
    return _trace("bimodal", _arrivals(rng, count, rate), lengths, lengths)


def checkerboard(pairs: int, size: int = 64) -> Trace:
    """The worst case for contiguous memory: every second of 2 x `pairs` requests ends, then come some twice as long.

    A request of the first wave needs `size` tokens. After half of them have ended, half of the memory is free, in holes
    of `size` tokens, and none of the `pairs // 2` requests of 2 x `size` tokens that arrive then fits one.
    """
    half = size // 2
    first = [Job(0, half, half) if i % 2 == 0 else Job(0, size - 1, 1) for i in range(2 * pairs)]
    return Trace("checkerboard", (*first, *[Job(1, 2 * size - 1, 1)] * (pairs // 2)))


def read_csv(path: Path) -> Trace:
    """A trace from a file with the columns arrival, prompt and output: whole numbers, one request a line.

    Raises:
        UserError: the file cannot be read, a column is missing or a value makes no sense, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"trace {path}: {reason}; give a CSV file with the columns {', '.join(COLUMNS)}") from None
    rows = csv.DictReader(text.splitlines())
    missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"trace {path}: no column {', '.join(missing)}; its first line must name {', '.join(COLUMNS)}")
    jobs = [_job(row, f"trace {path}, line {rows.line_num}") for row in rows]
    if not jobs:
        raise UserError(f"trace {path}: no requests; add lines such as 0,161,338")
    return Trace(path.stem, tuple(sorted(jobs, key=lambda job: job.arrival)))


def _job(row: dict[str, str], where: str) -> Job:
    least = {"arrival": 0, "prompt": 1, "output": 1}
    values = {}
    for column, at_least in least.items():
        text = (row[column] or "").strip()
        if not text.isascii() or not text.isdigit() or len(text) > 15 or int(text) < at_least:
            raise UserError(f"{where}: {column} {text!r} must be a whole number of at least {at_least}")
        values[column] = int(text)
    return Job(**values)


def _trace(name: str, arrivals: np.ndarray, prompts: np.ndarray, outputs: np.ndarray) -> Trace:
    columns = (column.tolist() for column in (arrivals, prompts, outputs))
    return Trace(name, tuple(Job(*row) for row in zip(*columns, strict=True)))


def _arrivals(rng: np.random.Generator, count: int, rate: float) -> np.ndarray:
    return np.floor(np.cumsum(rng.exponential(1 / rate, count))).astype(np.int64)


def _lognormal(rng: np.random.Generator, count: int, mean: float, sigma: float) -> np.ndarray:
    """Whole numbers from 1 to CAP with this mean."""
    drawn = np.exp(_mu(mean, sigma) + sigma * rng.standard_normal(count))
    return np.clip(np.rint(drawn), 1, CAP).astype(np.int64)


@cache
def _mu(mean: float, sigma: float) -> float:
    """The mean of the logarithm for which min(X, CAP) has the wanted mean, by bisection."""
    low, high = -10.0, math.log(CAP)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _capped_mean(middle, sigma) < mean else (low, middle)
    return low


def _capped_mean(mu: float, sigma: float) -> float:
    """E[min(X, CAP)] of a log-normal X."""
    normal, place = NormalDist(), (math.log(CAP) - mu) / sigma
    return math.exp(mu + sigma**2 / 2) * normal.cdf(place - sigma) + CAP * (1 - normal.cdf(place))
