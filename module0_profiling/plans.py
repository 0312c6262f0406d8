"""Predictions from datasheets for the report: what published models cost on devices that are not here.

    python -m module0_profiling.plans

Nothing is measured: results are floors, the ceilings of datasheets divided into what a step has to do.
"""

from __future__ import annotations

from module0_profiling import catalogue
from module0_profiling.hardware import catalogue_peaks
from module0_profiling.model_costs import Formats
from module0_profiling.model_shape import load_shape
from module0_profiling.predict import Roofs, largest_batch, predict
from module0_profiling.results import Figure, record

COMMAND = "python -m module0_profiling.plans"
CONTEXT, BATCHES = 4096, (1, 32, 256)
PLANS: tuple[tuple[str, str, int, Formats], ...] = (
    ("llama3-8b", "4090", 1, Formats()),
    ("llama3-8b", "4090", 1, Formats(weights="int4")),
    ("llama3-8b", "h200", 1, Formats()),
    ("llama3-70b", "h200", 4, Formats()),
    ("llama3-405b", "b200", 8, Formats()),
    ("mixtral-8x7b", "h100", 2, Formats()),
    ("qwen3-30b-a3b", "h200", 1, Formats()),
    ("deepseek-v3", "h200", 8, Formats(weights="fp8-block")),
)
"""Model, device, devices, formats."""


def figures() -> list[Figure]:
    """A row for each plan: milliseconds of a decode step by batch, and the largest batch that fits."""
    found: list[Figure] = []
    for model, device, ranks, formats in PLANS:
        entry, shape = catalogue.find(device), load_shape(model)
        machine = Roofs(catalogue_peaks(entry), link=entry.link)
        name = f"{model} {formats.weights or formats.dtype}, {f'{ranks} x ' if ranks > 1 else ''}{entry.name}"
        for batch in BATCHES:
            step = predict(shape, machine, batch, CONTEXT, formats=formats, ranks=ranks)
            found.append(Figure(f"{name}/step, batch {batch}", step.seconds * 1e3, "ms"))
        assert entry.memory is not None  # of all devices named here
        most = largest_batch(shape, entry.memory, CONTEXT, formats, ranks=ranks)
        found.append(Figure(f"{name}/largest batch", most, ""))
    return found


if __name__ == "__main__":
    print(f"recorded in {record('module0', 'plans', figures(), command=COMMAND, device='cpu')}")
