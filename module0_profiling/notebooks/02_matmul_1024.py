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
# # One matrix product, 1024 x 1024
#
# C = A B in float32. Every version below does the same FLOPs; they differ in the bytes that they ask for, in how many
# calls they need, and on a GPU in which thread reads what. The first half runs torch on this machine. The second half
# looks at four CUDA C++ kernels: what the compiler made of them, and every address that they touch, neither of which
# needs a GPU.
#
# Each part begins with `MINE`, a place for your predictions: replace `None` before you run the cell below it. A check
# says whether the course's prediction holds, then whether yours does: a count must be exact, a ratio of times within a
# factor of 1.5.

# %%
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image, display
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import module0_profiling
from module0_profiling import costs, hardware, ncu, ncu_csv, ncu_verdict, plots, roofline
from module0_profiling.cuda_on_cpu import emulator
from module0_profiling.gpu_tools import CompileError, MissingTool
from module0_profiling.notebooks import table
from module0_profiling.peak_measure import matmul_rate
from module0_profiling.static_report import report_cuda
from module0_profiling.timing import clock_for, interleave, ratio

N = 1024
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
HERE = Path(module0_profiling.__file__).parent
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
torch.set_grad_enabled(False)
torch.manual_seed(0)


def judge(what, found, low, high=None, mine=None):
    """Say whether a prediction holds, and then yours: one number for a count, a range for a time."""
    count = high is None
    holds = found == low if count else low <= found <= high
    said = f"{low:,}, found {found:,}" if count else f"{low:g} to {high:g}, found {found:.3g}"
    print(f"prediction {'holds' if holds else 'is wrong'} ({'count' if count else 'time'}): {what}: predicted {said}")
    if mine is not None:
        good = found == mine if count else 2 / 3 <= found / mine <= 1.5
        print(f"    yours, {mine:,}, {'holds' if good else 'is wrong'}")


def attempt(what, make):
    """What `make` returns; where a tool is missing, one line that says which, and None."""
    try:
        return make()
    except (MissingTool, CompileError) as error:
        print(f"{what}: NOT MEASURED HERE: {error}")
        return None


machine = hardware.detect(DEVICE)
peaks = hardware.measured_peaks(machine)
rate = max(peaks.matmul.get("float32", 0.0), matmul_rate("float32", machine.torch_name, clock_for(DEVICE)))
roof = roofline.Roof(rate, peaks.read_bandwidth, "float32")
a, b = (torch.randn(N, N, device=DEVICE) for _ in range(2))
c = torch.empty(N, N, device=DEVICE)
print(f"{machine.name}, {machine.units} {'SMs' if HAS_GPU else 'cores'}, torch {torch.__version__}")
print(
    f"float32: reads {plots.short(roof.bandwidth)}B/s, multiplies {plots.short(roof.flops)}FLOP/s, "
    f"ridge at {roof.ridge:.3g} FLOP/byte; a matrix is {a.nbytes / 2**20:.0f} MiB"
)

# %% [markdown]
# ## 1. The fewest bytes
#
# **Predict** FLOPs and the fewest bytes. On which side of the ridge is the product, and what is its floor?

# %%
MINE = {"FLOPs": None, "bytes": None}

# %%
fewest = costs.linear(N, N, N, 4)
with FlopCounterMode(display=False) as counter:
    torch.mm(a, b, out=c)
judge("FLOPs", counter.get_total_flops(), fewest.flops, mine=MINE["FLOPs"])
judge("bytes", a.nbytes + b.nbytes + c.nbytes, fewest.bytes, mine=MINE["bytes"])
print(
    f"intensity {fewest.intensity:.0f} FLOP/byte, {fewest.intensity / roof.ridge:.0f} times the ridge: bound by "
    f"{roof.bound_by(fewest)}, floor {roof.seconds(fewest) * 1e3:.2f} ms"
)

# %% [markdown]
# ## 2. The same FLOPs, more bytes
#
# Loops over single elements would take minutes in Python, so the innermost loop is torch's everywhere:
#
# * `outer products`: C += column k of A times row k of B, for each k. Every step reads and writes all of C;
# * `row by row`: each row of C is a row of A times B. Every step reads all of B;
# * `tiles of t`: C in tiles of t x t, each a strip of A times a strip of B;
# * `whole`: one call.
#
# **Predict** the bytes that each version asks for, if nothing stays in a cache between two calls: matrices in, result
# out, for each call. With n = 1024, in floats: outer products n (2 n² + 2 n), row by row n (n² + 2 n), tiles of t
# (n/t)² (2 t n + t²). The check counts them: a dispatch mode sees each operator with its tensors.

# %%
MINE = {"outer products": None, "row by row": None, "tiles of 64": None}

# %%
TILES = (16, 64, 128, 256)


def outer_products():
    c.zero_()
    for k in range(N):
        c.addr_(a[:, k], b[k])


def row_by_row():
    for i in range(N):
        torch.mm(a[i : i + 1], b, out=c[i : i + 1])


def whole():
    torch.mm(a, b, out=c)


def tiles_of(t):
    def run():
        for i in range(0, N, t):
            for j in range(0, N, t):
                torch.mm(a[i : i + t], b[:, j : j + t], out=c[i : i + t, j : j + t])

    return run


class Asked(TorchDispatchMode):
    """Counts calls and bytes of matrix operators: tensors that go in, and the one that comes out."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addr_):
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for t in (*args, result) if isinstance(t, torch.Tensor))
        return result


versions = {"outer products": outer_products, "row by row": row_by_row}
versions |= {f"tiles of {t}": tiles_of(t) for t in TILES} | {"whole": whole}
predicted = {
    "outer products": N * (2 * N * N + 2 * N) * 4,
    "row by row": N * (N * N + 2 * N) * 4,
    **{f"tiles of {t}": (N // t) ** 2 * (2 * t * N + t * t) * 4 for t in TILES},
    "whole": 12 * N * N,
}
exact = a.double() @ b.double()
asked, errors = {}, {}
for name, run in versions.items():
    c.fill_(float("nan"))  # what an earlier version wrote must not pass for a result
    with Asked() as asked[name]:
        run()
    errors[name] = float((c.double() - exact).abs().max() / exact.abs().max())
    judge(f"bytes of {name}", asked[name].bytes, predicted[name], mine=MINE.get(name))
judge("versions with a relative error below 1e-5", sum(e < 1e-5 for e in errors.values()), len(versions))
works = {name: roofline.Work(fewest.flops, asked[name].bytes) for name in versions}

# %% [markdown]
# ## 3. Micro profile
#
# **Predict.** If all of these bytes came from memory, the roofline would give each version a bound. Where is the
# bound already that of the arithmetic? How many times as long as `whole` do the others take? Which version pays for
# its number of calls?

# %%
MINE = {"row by row": None, "outer products": None, "tiles of 16": None, "tiles of 256": None, "whole": None}

# %%
tiny = torch.zeros(4, 4, device=DEVICE)


def tiny_calls():
    for _ in range(1000):
        torch.mm(tiny[0:4], tiny[:, 0:4], out=tiny[0:4, 0:4])  # the slices are part of a tile's price


def read_cached():
    for _ in range(100):
        b.sum()


def whole_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole()
    finally:
        torch.set_num_threads(threads)


timed = interleave(
    {**versions, "whole, one thread": whole_alone, "tiny calls": tiny_calls, "read cached": read_cached},
    rounds=5,
    device=DEVICE,
)
call_seconds, cached = timed["tiny calls"].median / 1000, 100 * b.nbytes / timed["read cached"].median
over = {name: ratio(timed[name], timed["whole"]) for name in versions}
rates = {name: fewest.flops / timed[name].median for name in versions}
profile = pd.DataFrame(
    {
        name: {
            "calls": asked[name].calls,
            "MB asked": works[name].bytes / 1e6,
            "x fewest": works[name].bytes / fewest.bytes,
            "FLOP/byte": works[name].intensity,
            "bound if from memory, ms": roof.seconds(works[name]) * 1e3,
            "ms": timed[name].median * 1e3,
            "x whole": over[name],
            "GFLOP/s": rates[name] / 1e9,
            "of the peak": rates[name] / roof.flops,
            "GB/s asked": works[name].bytes / timed[name].median / 1e9,
            "in calls": asked[name].calls * call_seconds / timed[name].median,
        }
        for name in versions
    }
).T
quiet = DEVICE != "cpu" or torch.get_num_threads() == 1 or ratio(timed["whole, one thread"], timed["whole"]) > 1.2
if not quiet:
    print("all threads are no faster than one: another process has the cores, and these times say little")
judge("row by row / whole", over["row by row"], 5, 100, MINE["row by row"])
judge("outer products / row by row: twice the bytes", over["outer products"] / over["row by row"], 1.4, 2.8)
if MINE["outer products"] is not None:
    judge("outer products / whole", over["outer products"], 5, 200, MINE["outer products"])
judge("tiles of 16 / whole", over["tiles of 16"], 2, 50, MINE["tiles of 16"])
judge("tiles of 256 / whole", over["tiles of 256"], 0.8, 1.6, MINE["tiles of 256"])
judge("whole, share of the peak", profile.loc["whole", "of the peak"], 0.6, 1.3, MINE["whole"])
print(f"a tile of 4 x 4 with its slices takes {call_seconds * 1e6:.1f} µs")
print(f"{b.nbytes / 2**20:.0f} MiB that were read just before are read at {plots.short(cached)}B/s")
formats = ["{:,.0f}", "{:,.1f}", "{:,.0f}", "{:.3g}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f}", "{:.0%}", "{:.1f}"]
table(profile, dict(zip(profile, [*formats, "{:.0%}"], strict=True)))

# %% [markdown]
# *GB/s asked* says whether the bytes came from memory at all. Where it is above what memory delivers, a cache
# answered: the matrices fit into that of most machines. So bytes that are asked for are an upper bound of the bytes
# that move, and a point may lie *above* its slope. The dashed slope is the rate at which this machine reads one of the
# matrices again and again.

# %%
points = [roofline.Point.measured(name, works[name], timed[name].median) for name in versions]
levels = [("cached", cached)] if cached > roof.bandwidth else []
with tempfile.TemporaryDirectory() as folder:
    title = f"1024 x 1024 on {machine.name}"
    _, drawn = plots.roofline_plot(points, [roof], Path(folder) / "matmul", title=title, levels=levels)
    display(Image(drawn.read_bytes()))

# %% [markdown]
# ## 4. The same on a GPU: who reads what
#
# `kernels/matmul_1024.cu` has four kernels, each with blocks of 16 x 16 threads and a thread for each output.
# `naive` and `coalesced` differ in one line: which of `threadIdx.x` and `threadIdx.y` is the row. `tiled` loads tiles
# into shared memory. `conflicting` is `tiled` with one mistake: the tile of B lies transposed.

# %%
SOURCE = HERE / "kernels" / "matmul_1024.cu"
text = SOURCE.read_text()
print(text[text.index('extern "C"') : text.index("// kTransposed")].strip())

# %% [markdown]
# The kernels run on the CPU, unchanged, and every access of a warp is recorded. A warp here is two rows of 16
# threads. A sector is 32 bytes, 8 floats. Shared memory has 32 banks of 4 bytes.
#
# **Predict** for n = 64:
#
# * the sectors that one warp's load of A and its load of B touch in `naive`, and in `coalesced`;
# * floats loaded for an output, without tiles and with tiles of 16;
# * passes over shared memory that `conflicting` takes for one read of B: lane x wants bank (16 x + i) mod 32.

# %%
MINE = {"naive": None, "coalesced": None, "tiled": None, "passes": None}

# %%
COUNTED = 64
# sectors a warp touches with (one load of A, one load of B, its store of C)
SECTORS = {"naive": (16, 1, 16), "coalesced": (2, 2, 4), "tiled": (4, 4, 4), "conflicting": (4, 4, 4)}
TILE, PASSES = 16, 8


def predicted_counts(kernel, n):
    """Sectors loaded and stored, floats loaded for an output, extra passes over shared memory."""
    warps, through_tiles = n * n // 32, kernel in ("tiled", "conflicting")
    steps = n // TILE if through_tiles else n
    of_a, of_b, of_c = SECTORS[kernel]
    extra = (PASSES - 1) * warps * (n + n // TILE) if kernel == "conflicting" else 0  # reads of B's tile, and writes
    return warps * steps * (of_a + of_b), warps * of_c, 2 * steps, extra


def counts():
    """Counts of each kernel, one row each."""
    kernels = emulator(SOURCE)
    left, right = np.random.default_rng(0).standard_normal((2, COUNTED, COUNTED), dtype=np.float32)
    rows = {}
    for kernel in kernels.kernels:
        out = np.full((COUNTED, COUNTED), np.nan, dtype=np.float32)
        grid = (COUNTED // TILE, COUNTED // TILE)
        traffic = kernels.launch(kernel, grid, (TILE, TILE), (left, right, out, COUNTED))
        want = (torch.from_numpy(left).double() @ torch.from_numpy(right).double()).numpy()
        shared = traffic.shared_loads.requests + traffic.shared_stores.requests
        rows[kernel] = {
            "sectors loaded": traffic.global_loads.transactions,
            "sectors stored": traffic.global_stores.transactions,
            "floats loaded an output": traffic.global_loads.bytes // 4 // COUNTED**2,
            "extra passes": traffic.bank_conflicts,
            "sectors a load of a warp": traffic.global_loads.transactions / traffic.global_loads.requests,
            "passes a shared request": 1 + traffic.bank_conflicts / shared if shared else float("nan"),
            "outside or misaligned": traffic.out_of_bounds + traffic.misaligned,
            "relative error": float(np.abs(out - want).max() / np.abs(want).max()),
        }
    return pd.DataFrame(rows).T


counted = attempt("counts of the kernels", counts)
if counted is not None:
    columns = list(counted)[:4]
    for kernel in counted.index:
        for what, found, wanted in zip(columns, counted.loc[kernel], predicted_counts(kernel, COUNTED), strict=False):
            judge(f"{kernel}, {what}", int(found), wanted)
    judge("kernels with an error below 1e-5", int((counted["relative error"] < 1e-5).sum()), len(counted))
    judge("accesses outside or misaligned", int(counted["outside or misaligned"].sum()), 0)
    yours = {
        "naive": ("sectors of one load of A and one of B", sum(SECTORS["naive"][:2])),
        "coalesced": ("sectors of one load of A and one of B", sum(SECTORS["coalesced"][:2])),
        "tiled": ("floats loaded for an output", int(counted.loc["tiled", "floats loaded an output"])),
        "passes": ("of conflicting for one read of B", PASSES),
    }
    for key, (what, found) in yours.items():
        if MINE[key] is not None:
            print(f"    yours, {MINE[key]:,}, {'holds' if MINE[key] == found else 'is wrong'}: {key}, {what}: {found}")
    display(table(counted, dict(zip(counted, ["{:,.0f}"] * 4 + ["{:.1f}"] * 2 + ["{:.0f}", "{:.0e}"], strict=True))))

# %%
if counted is not None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 2.2), layout="constrained", sharey=True)
    shown = ("sectors loaded", "floats loaded an output", "passes a shared request")
    for axes, column, colour in zip(panels, shown, (SKY, GREEN, ORANGE), strict=True):
        values = counted[column].fillna(0)
        bars = axes.barh(counted.index, values, color=colour, edgecolor=BLACK, linewidth=0.6)
        axes.bar_label(bars, [f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in values], padding=3)
        axes.set(xlabel=column)
        axes.margins(x=0.3)
        axes.grid(False, axis="y")
    panels[0].invert_yaxis()
    plt.show()

# %% [markdown]
# One line turns `naive` into `coalesced`: as many loads, fewer sectors. The tile then divides the loads by its edge.
# The mistake of `conflicting` changes nothing in global memory.
#
# ## 5. What the compiler made of them
#
# **Predict** for 256 threads a block: spills, 128-bit loads, shared memory in bytes. Up to how many registers a thread
# is an SM with 65,536 registers and 2,048 threads full?

# %%
MINE = {"shared bytes": None, "registers": None}

# %%
ARCHS = ("sm_80", "sm_90", "sm_120")
reports = attempt("registers and occupancy", lambda: report_cuda(SOURCE, ARCHS))
if reports is not None:
    judge("bytes of spills, all kernels", sum(r.spill_bytes for r in reports), 0)
    judge("128-bit loads from global memory", sum(r.mix.vector_loads for r in reports), 0)
    tiled_bytes = {r.shared_bytes for r in reports if r.kernel == "tiled"}
    judge("shared bytes of tiled", max(tiled_bytes), 2 * TILE * TILE * 4, mine=MINE["shared bytes"])
    if MINE["registers"] is not None:
        judge("registers that fill an SM", 65536 // 2048, MINE["registers"])
    static = pd.DataFrame(
        {
            "kernel": r.kernel,
            "arch": r.arch,
            "threads": r.threads,
            "registers": r.registers,
            "spills": r.spill_bytes,
            "shared": r.shared_bytes,
            "occupancy": r.occupancy.fraction,
            "limited by": r.occupancy.limiter,
            "LDG": r.mix.global_loads,
            "128-bit": r.mix.vector_loads,
            "LDS": r.mix.shared_loads,
            "FFMA": r.mix.ffma,
        }
        for r in reports
    )
    display(table(static.set_index(["kernel", "arch"]), {"occupancy": "{:.0%}"}))
    print(f"{reports[0].compiler}; a loop body counts once in LDG, LDS and FFMA ({reports[0].mix.source})")

# %% [markdown]
# Two things to notice.
#
# * Occupancy hardly tells these kernels apart, and their speeds will differ by far more. It says how much latency can
#   be hidden, not how much there is.
# * Compare LDS for FFMA of `tiled` and `conflicting`. The transposed tile has the floats that a thread reads next to
#   each other, so the compiler can load several at once. The counts of section 4 are of the *source*, one read at a
#   time; the hardware's conflicts will be fewer than eight passes for each multiply-add. How many, only counters say.
#
# ## 6. Bounds at 1024
#
# The sectors of section 4 follow a formula that was exact at n = 64, so they hold at 1024 too. If every sector came
# from memory, the roofline would bound each kernel. The L2 serves many of them in truth, so these are lower bounds of
# the speed with no cache.
#
# **Predict.** Which kernels stay below the ceiling of the arithmetic, even if memory were their only trouble?

# %%
gpu_roof = roof if HAS_GPU else hardware.datasheet_peaks("h200").roof("float32")
print(f"{machine.name + ', measured' if HAS_GPU else 'H200 by its datasheet: no GPU here'}; "
      f"ridge at {gpu_roof.ridge:.3g} FLOP/byte")  # fmt: skip
bounds = {}
for kernel in SECTORS:
    loaded, stored, _, extra = predicted_counts(kernel, N)
    work = roofline.Work(fewest.flops, 32 * (loaded + stored))
    bounds[kernel] = {
        "MB in sectors": work.bytes / 1e6,
        "FLOP/byte": work.intensity,
        "bound, TFLOP/s": gpu_roof.attainable(work) / 1e12,
        "of the peak": gpu_roof.attainable(work) / gpu_roof.flops,
        "bound by": gpu_roof.bound_by(work),
    }
table(pd.DataFrame(bounds).T, {"MB in sectors": "{:,.0f}", "FLOP/byte": "{:.3g}", "bound, TFLOP/s": "{:.3g}",
                               "of the peak": "{:.1%}"})  # fmt: skip

# %% [markdown]
# ## 7. Times and counters on a GPU
#
# **Predict** the order of the four kernels and of `torch.mm`, and the factor between `naive` and `coalesced`.

# %%
gpu_times = None
if HAS_GPU:
    grid, block = (N // TILE, N // TILE, 1), (TILE, TILE, 1)
    built = {k: torch.cuda._compile_kernel(SOURCE.read_text(), k) for k in SECTORS}

    def launcher(kernel):
        return lambda: kernel(grid=grid, block=block, args=[a, b, c, N])

    launches = {name: launcher(kernel) for name, kernel in built.items()}
    for name, launch in launches.items():
        c.fill_(float("nan"))
        launch()
        judge(f"{name} is right", int((c.double() - exact).abs().max() / exact.abs().max() < 1e-5), 1)
    gpu_times = interleave({**launches, "torch.mm": whole}, rounds=11, device=DEVICE)
    judge("naive / coalesced", ratio(gpu_times["naive"], gpu_times["coalesced"]), 1.5, 10)
    judge("coalesced / tiled", ratio(gpu_times["coalesced"], gpu_times["tiled"]), 1.05, 10)
    display(pd.DataFrame({k: {"µs": t.median * 1e6, "TFLOP/s": fewest.flops / t.median / 1e12}
                          for k, t in gpu_times.items()}).T.round(2))  # fmt: skip
else:
    print("NOT MEASURED HERE: no GPU")

# %% [markdown]
# A time says how fast; the hardware's counters say why. Nsight Compute takes them while this notebook's script runs.
# `titan ncu-command` writes the line, `titan ncu` reads what it prints.

# %%
RECORDED = HERE / "examples" / "matmul_1024.ncu.csv"
script = "module0_profiling/notebooks/02_matmul_1024.py"
if RECORDED.exists():
    for counters in ncu_csv.read(RECORDED):
        found = ncu_verdict.judge(counters)
        print(f"{counters.kernel}: {found.bound}: {'; '.join(found.evidence)}")
else:
    print(ncu.command(("python", script), kernel="|".join(SECTORS), count=2 * len(SECTORS)), "> counters.csv")
    print(f"\nNOT MEASURED HERE: no counters are recorded{'' if shutil.which('ncu') else ', and ncu is not here'}")

# %% [markdown]
# ## Verdict
#
# By rules, from the figures above, unless another process had the cores. On this machine: a version is bound by the
# *latency of its calls* when they take more than half of its time, and by *arithmetic* when it reaches more than half
# of the peak. It is bound by *memory* when its bytes come at more than half of the rate of memory, or, where the three
# matrices fit into the last cache, by that *cache*, whose rate is the fastest that any version here saw. Otherwise it
# waits inside of its kernel. Without a GPU the kernels get the verdict of their counts, and it is about what they ask
# for.

# %%


def verdict(name):
    """(what bounds it, evidence) of a version of section 3."""
    row = profile.loc[name]
    rate, share = works[name].bytes / timed[name].median, row["of the peak"]
    evidence = f"{share:.0%} of the peak, {rate / 1e9:.0f} GB/s asked, {row['in calls']:.0%} in calls"
    if not quiet:
        return "not decided: the cores were busy", evidence
    if row["in calls"] > 0.5:
        return "latency of its calls", evidence
    if share > 0.5:
        return "arithmetic", evidence
    in_cache = 3 * a.nbytes < machine.cache_bytes
    slope = max(cached, profile["GB/s asked"].max() * 1e9) if in_cache else roof.bandwidth
    if rate > 0.5 * slope:
        return "cache" if in_cache else "memory", evidence
    return "latency in its kernel", evidence


def kernel_verdict(kernel):
    """(what bounds it, evidence) of a CUDA kernel, from counts, and a time where there is one."""
    its = bounds[kernel]
    evidence = f"{its['FLOP/byte']:.3g} FLOP/byte in sectors, ridge at {gpu_roof.ridge:.3g}"
    bound = "memory, by its sectors" if its["bound by"] == "memory" else "arithmetic"
    if counted is not None and counted.loc[kernel, "extra passes"] > 0:
        evidence += f"; {counted.loc[kernel, 'passes a shared request']:.1f} passes a shared request"
        bound = "shared memory, by its conflicts"
    if gpu_times is not None:
        evidence += f"; {fewest.flops / gpu_times[kernel].median / gpu_roof.flops:.0%} of the peak"
    return bound, evidence if gpu_times is not None else f"{evidence}; time NOT MEASURED HERE"


verdicts = {name: verdict(name) for name in versions} | {f"CUDA: {k}": kernel_verdict(k) for k in SECTORS}
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(verdicts, index=["bound by", "evidence"]).T)

# %% [markdown]
# ## Your turn
#
# * Repair `conflicting` without turning the tile back: one more column of padding. Predict the extra passes first.
# * Tiles of 32 instead of 16: predict floats loaded for an output, shared bytes and occupancy, then edit `kTile`, the
#   launch bounds and `TILE`.
# * `N = 4096` on the CPU (leave out the two slow versions): B no longer fits into the cache. Which verdict changes?
