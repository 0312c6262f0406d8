# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Memory and the GPU, without a GPU
#
# Tasks 0.4 to 0.6 are three ladders of CUDA C++ kernels: access patterns, a matrix product, and occupancy. Most of
# what makes them fast or slow can be *counted*, and a count needs no GPU:
#
# * the `.cu` files are compiled for the CPU, unchanged, and every address that a warp touches is recorded;
# * the CUDA compiler says how many registers and how much shared memory a kernel takes, so how many warps fit on an
#   SM.
#
# Each part asks for a prediction first. Times are measured where there is a GPU, in the last part; elsewhere it
# says so.

# %%
import importlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from module0_profiling import hardware, plots, roofline
from module0_profiling.course import parts
from module0_profiling.course.parts import Use
from module0_profiling.gpu_tools import CompileError, MissingTool
from module0_profiling.notebooks import table
from module0_profiling.occupancy import limits_of, occupancy
from module0_profiling.static_report import report_cuda
from phase0_prototype.kernels import coalescing, counts, ladder, matmul
from phase0_prototype.kernels import occupancy as occupancy_kernels

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})


def attempt(what: str, make):
    """What `make` returns; where a tool is missing, one line that says which, and None."""
    try:
        return make()
    except (MissingTool, CompileError) as error:
        print(f"{what}: NOT MEASURED HERE: {error}")
        return None


def short(version: str) -> str:
    """A version's name without that of its ladder."""
    return version.partition("_")[2]


# %% [markdown]
# ## 1. Access patterns (task 0.4)
#
# The 32 lanes of a warp load together. Global memory answers in sectors of 32 bytes, eight floats each. The picture
# shows which sectors one load of a warp touches in a matrix with rows of 64 floats, when lanes are neighbours in a
# row and when they are neighbours in a column.
#
# **Predict.** How many sectors does each need, and which share of the bytes that move is used?

# %%
LANES, ROW = np.arange(32), 64
patterns = {"neighbours in a row": LANES, "neighbours in a column": LANES * ROW}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axes, (name, floats), colour, marker in zip(panels, patterns.items(), (BLUE, ORANGE), "os", strict=True):
    sectors = floats * 4 // 32
    axes.plot(LANES, sectors, marker, color=colour, markersize=4)
    axes.set(xlabel="lane", ylabel="sector of the matrix", title=f"Lanes are {name}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    used, moved = len(LANES) * 4, len(set(sectors.tolist())) * 32
    print(f"{name}: {moved // 32} sectors, {moved} bytes move, {used / moved:.0%} of them are used")
plt.show()

# %% [markdown]
# A transpose must have one side of each kind, unless it turns the corner somewhere else: in shared memory. That has
# 32 banks of 4 bytes; lanes that want different rows of one bank wait for each other.
#
# **Predict** the sectors of each version below, for a matrix of 64 x 96. `predicted_sectors` is our prediction.
# Which version has bank conflicts, and how many extra passes does each of its requests take?

# %%
ROWS, COLS = 64, 96
matrix = np.random.default_rng(0).standard_normal((ROWS, COLS), dtype=np.float32)


def transposes() -> pd.DataFrame:
    """Counts of every version of the transpose."""
    rows = {}
    for version in ladder.read(coalescing.SOURCE):
        run = counts.emulate_transpose(coalescing.SOURCE, version.name, matrix)
        assert (run.result == matrix.T).all(), f"{version.name} is wrong"
        loads, stores, traffic = run.traffic.global_loads, run.traffic.global_stores, run.traffic
        shared = traffic.shared_loads.requests + traffic.shared_stores.requests
        predicted = coalescing.predicted_sectors(version.name, ROWS, COLS)
        rows[short(version.name)] = {
            "predicted sectors": sum(predicted),
            "sectors read": loads.transactions,
            "sectors written": stores.transactions,
            "over the fewest": (loads.transactions + stores.transactions) / (loads.ideal + stores.ideal),
            "requests for 32 elements": (loads.requests + stores.requests) / (matrix.size / 32),
            "extra passes a shared request": traffic.bank_conflicts / shared if shared else 0.0,
        }
    return pd.DataFrame(rows).T


transposed = attempt("counts of the transpose", transposes)
if transposed is not None:
    total = transposed["sectors read"] + transposed["sectors written"]
    wrong = list(transposed.index[total != transposed["predicted sectors"]])
    print(f"the prediction is wrong for {', '.join(wrong)}" if wrong else "every prediction is exact")
    display(table(transposed, dict(zip(transposed, ["{:,.0f}"] * 3 + ["{:.2f}"] * 3, strict=True))))
    figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    shown = (("over the fewest", "sectors moved / fewest possible"), ("extra passes a shared request",) * 2)
    for axes, (column, label), colour in zip(panels, shown, (SKY, ORANGE), strict=True):
        bars = axes.barh(transposed.index, transposed[column], color=colour, edgecolor=BLACK, linewidth=0.6)
        axes.bar_label(bars, [f"{value:.3g}" for value in transposed[column]], padding=3)
        axes.set(xlabel=label)
        axes.margins(x=0.15)
        axes.grid(False, axis="y")
    panels[0].invert_yaxis()
    plt.show()

# %% [markdown]
# Two of the versions move several times the bytes that they need, one on each side. The tile repairs both sides and
# pays with bank conflicts; one column of padding removes those. The last version changes no sector: it asks for
# four floats with one instruction, so fewer requests keep more bytes on their way.
#
# ## 2. The matrix product (task 0.5)
#
# A product reads each element of A and B many times. The ladder moves that reuse from memory to shared memory, then
# to registers.
#
# **Predict.** How many floats does each version load from global memory for one output, if k = 32? Without tiles:
# 2k. With a tile of R x C outputs a block: how many?

# %%
M, N, K = 128, 128, 32
generator = np.random.default_rng(1)
a, b = (generator.standard_normal(shape, dtype=np.float32) for shape in ((M, K), (K, N)))


def products(source: Path) -> pd.DataFrame:
    """Counts of every version of a matrix product."""
    rows = {}
    for version in ladder.read(source):
        run = counts.emulate_matmul(source, version.name, a, b)
        np.testing.assert_allclose(run.result, a @ b, rtol=1e-4, atol=1e-4)
        traffic = run.traffic
        shared_floats = traffic.shared_loads.bytes / 4
        rows[short(version.name)] = {
            "tile": f"{version.tile_rows}x{version.tile_cols}",
            "outputs a thread": version.tile_rows * version.tile_cols // (version.block[0] * version.block[1]),
            "predicted loads an output": matmul.predicted_loads(version, M, N, K) / (M * N),
            "loads an output": traffic.global_loads.bytes / 4 / (M * N),
            "sectors / fewest": traffic.global_loads.overhead,
            "multiply-adds a shared read": M * N * K / shared_floats if shared_floats else float("nan"),
            "bank conflicts": traffic.bank_conflicts,
        }
    return pd.DataFrame(rows).T


def show_products(counted: pd.DataFrame) -> None:
    """The table, and two panels of bars: loads from global memory, and use of what shared memory delivers."""
    wrong = list(counted.index[counted["loads an output"] != counted["predicted loads an output"]])
    print(f"the prediction is wrong for {', '.join(wrong)}" if wrong else "every prediction is exact")
    display(table(counted, dict(zip(counted, ["{}"] * 2 + ["{:,.2f}"] * 4 + ["{:,}"], strict=True))))
    _, panels = plt.subplots(1, 2, figsize=(10, 0.35 * len(counted) + 1), layout="constrained", sharey=True)
    columns = ("loads an output", "multiply-adds a shared read")
    labels = ("floats loaded from global memory for one output", "multiply-adds for one float read from shared memory")
    for axes, column, label, colour in zip(panels, columns, labels, (SKY, GREEN), strict=True):
        values = counted[column].astype(float).fillna(0)
        bars = axes.barh(counted.index, values, color=colour, edgecolor=BLACK, linewidth=0.6)
        axes.bar_label(bars, [f"{value:.3g}" if value else "no shared memory" for value in values], padding=3)
        axes.set(xlabel=label)
        axes.margins(x=0.2)
        axes.grid(False, axis="y")
    panels[0].invert_yaxis()
    plt.show()


multiplied = attempt("counts of the matrix product", lambda: products(matmul.SOURCE))
if multiplied is not None:
    show_products(multiplied)

# %% [markdown]
# The first two versions load the same floats and differ in sectors only. The tile divides the loads by its edge.
# From then on global memory is not the problem: shared memory is, and each further version feeds more multiply-adds
# with each read.
#
# ### Where that puts them on the roofline
#
# **Predict.** FLOPs over the bytes that a version loads and stores is its intensity. The roofline turns that into
# an upper bound, if every load had to come from memory. Which versions can't reach the ceiling of the arithmetic?
#
# Without a GPU the ceilings are those of a datasheet (H200), with one they are measured.

# %%
SIZE = 4096
HAS_GPU = torch.cuda.is_available()
peaks = hardware.measured_peaks(hardware.detect("cuda")) if HAS_GPU else hardware.datasheet_peaks("h200")
roof = peaks.roof("float32")
bound, grouped = {}, {}
for version in ladder.read(matmul.SOURCE):
    loaded = matmul.predicted_loads(version, SIZE, SIZE, SIZE)
    work = roofline.Work(flops=2 * SIZE**3, bytes=4 * (loaded + SIZE * SIZE))
    bound[short(version.name)] = {
        "FLOP/byte": work.intensity,
        "bound, TFLOP/s": roof.attainable(work) / 1e12,
        "of the peak": roof.attainable(work) / roof.flops,
        "bound by": roof.bound_by(work),
    }
    grouped.setdefault(work.intensity, []).append(short(version.name))
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
xs = np.geomspace(min(grouped) / 4, max(grouped) * 8, 200)
ceiling = np.minimum(roof.flops, xs * roof.bandwidth) / 1e12
name = "this GPU, measured" if HAS_GPU else "H200 by its datasheet"
rates = f"{plots.short(roof.bandwidth)}B/s, {plots.short(roof.flops)}FLOP/s"
axes.plot(xs, ceiling, color=BLUE, linewidth=2, label=f"{name}: {rates}")
bounds = [(intensity, min(roof.flops, intensity * roof.bandwidth) / 1e12) for intensity in grouped]
axes.plot(*zip(*bounds, strict=True), "o", color=ORANGE, markeredgecolor=BLACK, markersize=8)
axes.set(xscale="log", yscale="log", xlabel="intensity, FLOP/byte", ylabel="upper bound, TFLOP/s in float32")
axes.set(title=f"The matrix product at {SIZE}", ylim=(ceiling.min() / 2, ceiling.max() * 3))
axes.legend(loc="lower right", fontsize=9)
names = [", ".join(grouped[intensity]) for intensity, _ in bounds]
plots.label_points(axes, [(name, *at) for name, at in zip(names, bounds, strict=True)])
plt.show()
table(pd.DataFrame(bound).T, {"FLOP/byte": "{:.3g}", "bound, TFLOP/s": "{:.3g}", "of the peak": "{:.1%}"})

# %% [markdown]
# Small tiles are bound by memory, by this count. Caches help them in truth: neighbouring blocks read the same rows,
# and the L2 serves many of those loads. So a measured point may lie *above* its bound here, and the ladder is still
# right about the order. For the versions under the flat roof the bound says nothing more; what separates them is
# shared memory and the occupancy of the next part.
#
# ## 3. Occupancy (task 0.6)
#
# An SM hands out warp slots, block slots, registers and shared memory. What runs out first decides how many warps
# are there to hide latency.
#
# **Predict** from the launch alone, with a guess of 32 registers for one output a thread and 128 for 64 outputs:
# which tile fills the SM, and what limits the others?

# %%
ARCHS = ("sm_80", "sm_90", "sm_120")
GUESS = {1: 32, 16: 64, 64: 128}  # outputs of a thread -> registers
versions = ladder.read(occupancy_kernels.SOURCE)
guessed = {}
for version in versions:
    threads = version.block[0] * version.block[1]
    outputs = version.tile_rows * version.tile_cols // threads
    step = {1: version.tile_rows, 16: 16, 64: 8}[outputs]  # columns of A in a tile
    shared = 4 * step * (2 * version.tile_rows + 1)
    fit = occupancy("sm_90", threads=threads, registers=GUESS[outputs], shared_bytes=shared)
    guessed[short(version.name)] = {
        "tile": version.tile_rows,
        "threads": threads,
        "registers (guess)": GUESS[outputs],
        "shared, bytes": shared,
        "occupancy": fit.fraction,
        "limited by": fit.limiter,
    }
print(f"sm_90: {limits_of('sm_90').name}")
table(pd.DataFrame(guessed).T, {"occupancy": "{:.0%}"})

# %% [markdown]
# Now the compiler, for three generations. It knows the registers, and whether they sufficed: a *spill* is a
# variable that had to move to memory.

# %%


def compiled() -> pd.DataFrame:
    """Static facts of the ladder's kernels, one row for each kernel and architecture."""
    tiles = {version.name: version.tile_rows for version in versions}
    return pd.DataFrame(
        {
            "kernel": short(report.kernel),
            "arch": report.arch,
            "tile": tiles[report.kernel],
            "registers": report.registers,
            "spills, bytes": report.spill_bytes,
            "shared, bytes": report.shared_bytes,
            "occupancy": report.occupancy.fraction,
            "limited by": report.occupancy.limiter,
        }
        for report in report_cuda(occupancy_kernels.SOURCE, ARCHS)
    )


static = attempt("registers and occupancy", compiled)
if static is not None:
    display(table(static[static["arch"] == "sm_90"].set_index("kernel"), {"occupancy": "{:.0%}"}))

# %%
if static is not None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    styles = ((BLUE, "o", "-", 10), (ORANGE, "s", "--", 7), (GREEN, "D", ":", 5))  # large below: equal curves show both
    for (arch, rows), (colour, marker, line, size) in zip(static.groupby("arch", sort=False), styles, strict=True):
        curve, squeezed = (
            rows[(rows["kernel"] == "squeezed") == beside].sort_values("tile") for beside in (False, True)
        )
        look = {"color": colour, "markersize": size}
        label = f"{arch} ({limits_of(arch).name})"
        axes.plot(curve["tile"], 100 * curve["occupancy"], marker + line, linewidth=size / 3, label=label, **look)
        axes.plot(squeezed["tile"] * 1.12, 100 * squeezed["occupancy"], marker, markerfacecolor="none", **look)
    axes.plot(
        [], [], "o", color=BLACK, markerfacecolor="none", markersize=9, label="squeezed (spills), beside its tile"
    )
    axes.set(xscale="log", xlabel="edge of the tile, outputs", ylabel="theoretical occupancy, %", ylim=(0, 108))
    axes.set_xticks(sorted(set(static["tile"])), sorted(set(static["tile"])))
    axes.minorticks_off()
    axes.set_title("More work for each thread leaves fewer warps")
    axes.legend(loc="lower left", fontsize=8)
    plt.show()

# %% [markdown]
# The smallest tile has too few threads a block: block slots run out while half of each warp is empty. The middle
# fills the SM. On an architecture with fewer warp slots the largest block fits only once. The big tiles are limited
# by registers.
#
# Is full occupancy the aim? The same kernels, counted on the CPU:

# %%
tiled = attempt("counts of the tiles", lambda: products(occupancy_kernels.SOURCE))
if tiled is not None:
    show_products(tiled)

# %% [markdown]
# The tiles with full occupancy read two floats of shared memory for each multiply-add, the others much less.
# Occupancy is a means of hiding latency; reuse removes the loads whose latency had to be hidden. `fast` takes both
# in measure.
#
# ## 4. Times
#
# **Predict** with all of the above: the order of the versions of each ladder, and the factor between the first and
# the last.

# %%
if HAS_GPU:
    from phase0_prototype.kernels import harness

    for name in ("coalescing", "matmul", "occupancy"):
        operation = importlib.import_module(f"phase0_prototype.kernels.{name}").OPERATION
        errors = pd.Series({c.version: c.error for c in harness.check(operation)})
        timed = pd.DataFrame([vars(row) for row in harness.bench(operation)]).set_index("version")
        print(f"{operation.name}, size {operation.bench_size}: largest relative error {errors.max():.1e}")
        display(table(timed, dict.fromkeys(timed, "{:.3g}")))
        figure, axes = plt.subplots(figsize=(8, 0.4 * len(timed) + 1), layout="constrained")
        bars = axes.barh([short(v) or v for v in timed.index], timed["seconds"] * 1e6, color=SKY, edgecolor=BLACK)
        axes.bar_label(bars, [f"{seconds * 1e6:,.0f}" for seconds in timed["seconds"]], padding=3)
        axes.set(xlabel="time, µs", xscale="log", title=f"{operation.name} at {operation.bench_size}")
        axes.margins(x=0.15)
        axes.invert_yaxis()
        plt.show()
else:
    print("NOT MEASURED HERE: times need an NVIDIA GPU. Run this notebook on a machine with one, or `make bench-gpu`.")

# %% [markdown]
# ## Your turn
#
# `make start-phase0` puts the `.cu` files of the framework into `workspace/phase0_prototype/kernels`. Their `_fast`
# kernels are the plain ones. Set `MINE` to `"mine"` and watch the counts while you edit; the gates of tasks 0.4 to
# 0.6 grade them.
#
# Before you edit: which one of the five numbers will a tile in shared memory change, and to what?

# %%
MINE = "framework"  # change to "mine"


def my_counts() -> pd.DataFrame:
    """The graded counts of somebody's kernels, beside those of the solution."""
    columns = {}
    for who in (MINE, "solution"):
        use = Use.parse(f"phase0={who}")
        file = {
            n: parts.path("phase0_prototype", f"kernels.{n}", use, suffix=".cu")
            for n in ("coalescing", "matmul", "occupancy")
        }
        columns[who] = {
            "transpose: sectors over the fewest": counts.sector_overhead(file["coalescing"]),
            "transpose: extra passes a shared request": counts.bank_conflicts(file["coalescing"]),
            "transpose: requests for 32 elements": counts.transpose_requests(file["coalescing"]),
            "product: global loads an output": counts.global_loads_per_output(file["matmul"]),
            "occupancy: multiply-adds a shared read": counts.multiply_adds_per_shared_read(file["occupancy"]),
        }
    return pd.DataFrame(columns)


graded = attempt("your counts", my_counts)
if graded is not None:
    display(table(graded, dict.fromkeys(graded, "{:.2f}")))
