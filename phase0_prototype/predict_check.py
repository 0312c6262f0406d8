"""Does `titan predict` tell the truth? Steps of this engine, predicted and measured.

    python -m phase0_prototype.benchmark predict

In one run: calibrate the machine (plain torch, no engine) and the engine's overhead (on models of width 64), predict,
then run the engine, on a CPU eagerly. Every round calibrates anew, because a virtual machine's memory rate moves within
minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from module0_profiling import predict
from module0_profiling.calibration import Calibration, calibrate
from module0_profiling.device import Device, detect
from module0_profiling.engine_overhead import Overhead
from module0_profiling.hardware import measured_peaks
from module0_profiling.model_costs import Formats, weight_bytes
from module0_profiling.model_shape import ModelShape, load_shape
from module0_profiling.peak_measure import read_bandwidth_now
from module0_profiling.results import Figure
from module0_profiling.timing import Crowd
from phase0_prototype import overhead, workloads
from phase0_prototype.bandwidth import CHANGED
from phase0_prototype.llm import LLM

DTYPE, PROMPT, REPEATS = "bfloat16", 128, 3
NEW_TOKENS = {workloads.TINY: 65, workloads.SHAPE: 9}


@dataclass(frozen=True)
class Case:
    """One comparison: a model, sequences, and whether the prompts are read or tokens are generated."""

    model: str
    batch: int
    prefill: bool = False

    @property
    def label(self) -> str:
        """For tables and figures."""
        what = f"prefill of {PROMPT}" if self.prefill else f"decode, batch {self.batch}"
        return f"{self.model}, {what}"


@dataclass(frozen=True)
class Checked:
    """One case: a prediction, measured seconds and the memory's bytes/s of each round."""

    case: Case
    predictions: tuple[predict.Prediction, ...]
    measured: tuple[float, ...]
    bandwidth: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """(predicted - measured) / measured of each round."""
        pairs = zip(self.predictions, self.measured, strict=True)
        return tuple(prediction.seconds / seconds - 1 for prediction, seconds in pairs)

    @property
    def error(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.errors)


@dataclass(frozen=True)
class Subject:
    """A model, loaded and on paper."""

    name: str
    engine: LLM
    shape: ModelShape

    @property
    def cases(self) -> tuple[Case, ...]:
        """What is compared."""
        return Case(self.name, 1, prefill=True), Case(self.name, 1), Case(self.name, 8)


def check(models: dict[str, str], rounds: int, console: Console, place: str = "cpu") -> list[Checked]:
    """Compare for models by name -> place of the checkpoint, on a device."""
    device = detect(place)
    ridge = measured_peaks(device).roof(DTYPE).ridge
    subjects = [
        Subject(name, LLM(path, device=device.torch_name, dtype=DTYPE, max_num_seqs=8), load_shape(name))
        for name, path in models.items()
    ]
    found: dict[Case, list[tuple[predict.Prediction, float, float]]] = {c: [] for s in subjects for c in s.cases}
    for round_ in range(rounds):
        for subject in subjects:
            with console.status(f"{subject.name}, round {round_ + 1} of {rounds}"):
                for case, row in steady_turn(subject, device, ridge).items():
                    found[case].append(row)
    return [Checked(case, *zip(*rows, strict=True)) for case, rows in found.items()]  # type: ignore[arg-type]


def steady_turn(
    subject: Subject, device: Device, ridge: float, tries: int = 4
) -> dict[Case, tuple[predict.Prediction, float, float]]:
    """Calibrate, then measure every case: again where the memory's rate changed or other processes ran meanwhile.

    Returns prediction, measured seconds and the memory's bytes/s by case.
    """
    while True:
        crowd, before = Crowd(), read_bandwidth_now(device)
        rates = calibrate(device, DTYPE)
        added = overhead.measure(device, rates)
        rows = {}
        for case in subject.cases:
            on_paper = predicted(subject.shape, case, rates, added, device, ridge)
            rows[case] = on_paper, measure(subject.engine, case, NEW_TOKENS[case.model]), before
        after, tries = read_bandwidth_now(device), tries - 1
        steady = max(before, after) < CHANGED * min(before, after) and not crowd.crowded
        if steady or not tries:
            return rows


def measure(llm: LLM, case: Case, new_tokens: int) -> float:
    """Seconds of the prefill, or of a decode step: the median of REPEATS, after one that brings the weights back."""
    prompts = workloads.random_prompts(llm.engine.config.vocab_size, [PROMPT] * case.batch)
    runs = [workloads.run_ours(llm, prompts, 2 if case.prefill else new_tokens) for _ in range(REPEATS + 1)][1:]
    return statistics.median(run.prefill if case.prefill else run.per_step for run in runs)


def predicted(
    shape: ModelShape, case: Case, rates: Calibration, engine: Overhead, device: Device, ridge: float
) -> predict.Prediction:
    """The same step on paper; a decode at the middle of the generated tokens."""
    cached = device.kind == "cpu" and weight_bytes(shape, Formats()) < 0.75 * device.cache_bytes
    machine = predict.Measured(rates, ridge, cached)
    context = PROMPT if case.prefill else PROMPT + NEW_TOKENS[case.model] // 2
    return predict.predict(
        shape,
        machine,
        case.batch,
        context,
        tokens=PROMPT if case.prefill else 1,
        engine=engine,
        overlap=device.kind != "cpu",
    )


def figures(found: Sequence[Checked]) -> list[Figure]:
    """A grid for the report: step by predicted, measured, error and its range."""
    rows: list[Figure] = []
    for each in found:
        label = each.case.label
        predicted_ms = [prediction.seconds * 1e3 for prediction in each.predictions]
        rows.append(Figure(f"{label}/predicted", statistics.median(predicted_ms), "ms"))
        rows.append(Figure(f"{label}/measured", statistics.median(each.measured) * 1e3, "ms"))
        rows.append(Figure(f"{label}/error", 100 * each.error, "%"))
        rows.append(Figure(f"{label}/least", 100 * min(each.errors), "%"))
        rows.append(Figure(f"{label}/most", 100 * max(each.errors), "%"))
    memory = [rate for each in found for rate in each.bandwidth]
    rows.append(Figure("memory/slowest round", min(memory) / 1e9, "GB/s"))
    rows.append(Figure("memory/fastest round", max(memory) / 1e9, "GB/s"))
    return rows
