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
# # A linear layer with one row, a hundred times
#
# `Linear(4096, 4096)` on a batch of one, called 100 times: that is most of what a decoder does for a token. What
# bounds it? The way there is the same for every operation: predict from FLOPs and bytes, measure, look at the
# timeline, then change one thing at a time.
#
# Each part begins with `MINE`, a place for your predictions: replace `None` before you run the cell below it. A check
# says whether the course's prediction holds, then whether yours does: a count must be exact, a ratio of times within a
# factor of 1.5. The course is wrong somewhere too, and not on every machine in the same place. A prediction that
# fails is worth more than one that holds: it says where to look.
#
# A hundred weights would not fit into a small machine, so a few take turns. Together they are larger than the last
# cache, and each comes from memory whenever its turn comes.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
import torch
import torch.nn.functional as F
from IPython.display import Image, display
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from module0_profiling import costs, hardware, plots, roofline, traces
from module0_profiling.notebooks import table
from module0_profiling.timing import interleave, ratio

SIZE, SMALL, CALLS, WEIGHTS = 4096, 64, 100, 4
DTYPE = "bfloat16"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


machine = hardware.detect(DEVICE)
peaks = hardware.measured_peaks(machine)
if DTYPE not in peaks.matmul:
    DTYPE = "float32"
roof = peaks.roof(DTYPE)
weights = [torch.randn(SIZE, SIZE, device=DEVICE).to(getattr(torch, DTYPE)) for _ in range(WEIGHTS)]
unit = "SMs" if DEVICE == "cuda" else f"cores, {torch.get_num_threads()} threads"
print(f"{machine.name}, {machine.units} {unit}, torch {torch.__version__}")
print(
    f"{DTYPE}: reads {plots.short(roof.bandwidth)}B/s, multiplies {plots.short(roof.flops)}FLOP/s, "
    f"ridge at {roof.ridge:.3g} FLOP/byte"
)
mebibytes = weights[0].nbytes / 2**20
print(
    f"a weight is {mebibytes:.0f} MiB, {WEIGHTS} of them {WEIGHTS * mebibytes:.0f} MiB; "
    f"the last cache has {machine.cache_bytes / 2**20:.0f} MiB"
)

# %% [markdown]
# ## 1. Before anything runs
#
# **Predict** for one call: FLOPs, with a multiply-add as two; the bytes that must move, each input read once and the
# output written once; and with the two rates above, the shortest time.

# %%
MINE = {"FLOPs": None, "bytes": None}

# %%
work = costs.linear(1, SIZE, SIZE, weights[0].element_size())
x = torch.randn(1, SIZE, device=DEVICE).to(weights[0].dtype)
with FlopCounterMode(display=False) as counter:
    y = F.linear(x, weights[0])
judge("FLOPs of a call", counter.get_total_flops(), work.flops, mine=MINE["FLOPs"])
judge("bytes of a call", x.nbytes + weights[0].nbytes + y.nbytes, work.bytes, mine=MINE["bytes"])
print(
    f"intensity {work.intensity:.3f} FLOP/byte, {roof.ridge / work.intensity:.0f} times below the ridge: "
    f"the floor is set by {roof.bound_by(work)}"
)
floors = {"reading": work.bytes / roof.bandwidth, "arithmetic": work.flops / roof.flops}
pd.Series({f"{name}, ms a call": 1e3 * seconds for name, seconds in floors.items()}).round(4).to_frame("floor")

# %% [markdown]
# ## 2. A hundred calls
#
# The memory's rate is not a constant: on a virtual machine it can change within a minute. So the call takes turns with
# something that does nothing but read the same weights, a sum. The ratio of the two needs no peak at all.
#
# **Predict.** How many times as long as reading its weight does a call take, if memory bounds it?

# %%
MINE = {"call / reading": None}

# %%


def repeat(fn, over, calls=CALLS):
    """A function that calls `fn` on the tensors of `over` in turn, so many times."""

    def run():
        for i in range(calls):
            fn(over[i % len(over)])

    return run


as_floats = [w.view(torch.float32) for w in weights]  # two bfloat16 as one float32: the fastest sum on most machines
timed = interleave(
    {"linear": repeat(lambda w: F.linear(x, w), weights), "reading": repeat(torch.sum, as_floats)}, device=DEVICE
)
call, reading = timed["linear"].median / CALLS, timed["reading"].median / CALLS
print(f"a call {call * 1e3:.3f} ms, reading its weight {reading * 1e3:.3f} ms, floor {floors['reading'] * 1e3:.3f} ms")
judge("call / reading", ratio(timed["linear"], timed["reading"]), 0.8, 1.5, MINE["call / reading"])

# %% [markdown]
# If it took much longer than reading, there are three suspects: the time between the calls, the arithmetic, and the
# way in which this kernel reads. Don't argue, look: the timeline speaks for the first, section 4 for the others.
#
# ## 3. The timeline
#
# The same hundred calls under `torch.profiler`, exported to a file as for `titan trace` and read into tables. On a
# CPU the operators do the work; what an operator takes *itself* is without those that it calls. On a GPU the kernels
# do it.
#
# **Predict.** How often does the matrix product appear? Which share of the time is it? What fills the gaps?

# %%
MINE = {"products": None, "share": None}

# %%


def record(run):
    """Profile `run` after one warm-up and read the exported trace."""
    run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "linear.trace.json"
        profiler.export_chrome_trace(str(path))
        return traces.read(path)


def top(trace):
    """The names that took the most time: kernels on a GPU, operators by their own time on a CPU."""
    return traces.by_time(trace.kernels if len(trace.kernels) else traces.self_times(trace), top=6)


def micros(frame, *columns):
    """Times in µs and shares in percent, ready for `table`."""
    shown = frame.assign(**{c: frame[c] * 1e6 for c in columns}).rename(columns={c: f"{c}, µs" for c in columns})
    return table(shown, {**{f"{c}, µs": "{:,.2f}" for c in columns}, "share": "{:.1%}"})


trace = record(repeat(lambda w: F.linear(x, w), weights))
slowest, busy = top(trace), traces.busy(trace)
product = slowest.iloc[0]
called = int((trace.cpu_ops["name"] == "aten::linear").sum())  # a product may take two kernels of a GPU
judge("products in the trace", called, CALLS, mine=MINE["products"])
judge("share of the product", product["total"] / busy.wall, 0.9, 1.0, MINE["share"])
print(
    f"{'kernels' if len(trace.kernels) else 'operators'} run for {busy.share:.1%} of {busy.wall * 1e3:.1f} ms; "
    f"around each product the CPU spends {(busy.wall - product['total']) / CALLS * 1e6:.1f} µs, profiler included"
)
micros(slowest, "total", "mean")

# %% [markdown]
# The gaps, all of them by what the CPU did meanwhile, and the longest ones. On a CPU most are Python between two calls.

# %%
display(micros(traces.idle_by_cause(trace, top=4), "total"))
display(micros(traces.gaps(trace, top=3), "start", "duration"))

# %%


def draw(trace, calls, title, axes):
    """Some calls from the middle of a trace on a time axis, a row for each name."""
    work = trace.kernels if len(trace.kernels) else trace.cpu_ops
    first = trace.cpu_ops[trace.cpu_ops["name"] == "aten::linear"].iloc[CALLS // 2 :][: calls + 1]
    begin, end = first["start"].iloc[0], first["start"].iloc[-1]
    rows = pd.concat([trace.cpu_ops, trace.launches, work]).drop_duplicates(["name", "start"])
    rows = rows[(rows["start"] >= begin) & (rows["start"] < end)]
    names = list(dict.fromkeys(rows["name"]))
    for y, name in enumerate(names):
        spans = rows[rows["name"] == name]
        bars = list(zip((spans["start"] - begin) * 1e6, spans["duration"] * 1e6, strict=True))
        axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=plots.COLOURS[y % 8], edgecolor=BLACK, linewidth=0.4)
    axes.set_yticks(range(len(names)), [name[:32] for name in names])
    axes.set(xlabel="µs", title=title)
    axes.invert_yaxis()


figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
draw(trace, 4, f"Four calls of {SIZE} x {SIZE}", axes)
plt.show()

# %% [markdown]
# ## 4. One change at a time
#
# The operation has 4096 x 4096 weights, one row, a number format, a kernel, and on a CPU some threads. Change one, keep
# the rest, and compare it with the original in the same run. The roofline predicts some of it: below the ridge, time
# follows bytes and not FLOPs.
#
# **Predict** the time over that of the original for each line. Which change multiplies FLOPs, which one bytes?
#
# * 8 rows, then 32, instead of 1;
# * half of the outputs;
# * float32 weights instead of bfloat16;
# * one thread instead of all (CPU): something that memory bounds does not gain from many;
# * another kernel for the same sum: `(w.float() * x).sum(-1)`, fused into one loop by `torch.compile`.

# %%
MINE = {"8 rows": None, "32 rows": None, "half": None, "float32": None, "one thread": None, "compiled": None}

# %%
PASS = 2 * WEIGHTS  # calls in a turn


def one_thread(run):
    """The same function while torch may use one thread."""

    def alone():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run()
        finally:
            torch.set_num_threads(threads)

    return alone


def compiled(fn, *args):
    """`fn` compiled and warm, or None with the reason why not."""
    try:
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise RuntimeError("TORCHDYNAMO_DISABLE is set")
        fused = torch.compile(fn, dynamic=False)
        fused(*args)
        return fused
    except Exception as error:  # no C++ compiler, an unknown Python: many types
        print(f"torch.compile: NOT MEASURED HERE: {str(error).strip().splitlines()[0]}")
        return None


def many(rows):
    """The layer on so many rows."""
    xs = torch.randn(rows, SIZE, device=DEVICE).to(weights[0].dtype)
    return repeat(lambda w: F.linear(xs, w), weights, PASS)


def product_by_hand(w, row):
    return (w.float() * row).sum(-1)


row = x[0].float()
wide = [w.float() for w in weights]
fused = compiled(product_by_hand, weights[0], row)
original = repeat(lambda w: F.linear(x, w), weights, PASS)
changes = {
    "original": original,
    "8 rows": many(8),
    "32 rows": many(32),
    "half": repeat(lambda w: F.linear(x, w), [w[: SIZE // 2] for w in weights], PASS),
    "float32": repeat(lambda w: F.linear(row[None], w), wide, PASS),  # no change where there is no bfloat16
    "reading": repeat(torch.sum, as_floats, PASS),
}
if DEVICE == "cpu" and torch.get_num_threads() > 1:
    changes |= {"one thread": one_thread(original), "reading, one thread": one_thread(changes["reading"])}
if fused is not None:
    changes["compiled"] = repeat(lambda w: fused(w, row), weights, PASS)
timed = interleave(changes, rounds=7, device=DEVICE)
del wide
over = {name: ratio(timing, timed["original"]) for name, timing in timed.items()}

# %%
element = weights[0].element_size()
done = {
    "8 rows": costs.linear(8, SIZE, SIZE, element),
    "32 rows": costs.linear(32, SIZE, SIZE, element),
    "half": costs.linear(1, SIZE, SIZE // 2, element),
    "float32": costs.linear(1, SIZE, SIZE, 4),
}
rows = {}
for name, value in over.items():
    its = done.get(name, work)
    rows[name] = {
        "FLOPs": its.flops / work.flops,
        "bytes": its.bytes / work.bytes,
        "time": value,
        "ms a call": timed[name].median / PASS * 1e3,
        "time / reading": ratio(timed[name], timed["reading"]),
        "spread": timed[name].spread,
    }
judge("8 rows / 1 row, FLOPs x 8", over["8 rows"], 0.7, 1.5, MINE["8 rows"])
judge("32 rows / 1 row, FLOPs x 32", over["32 rows"], 0.7, 4, MINE["32 rows"])
judge("half of the outputs", over["half"], 0.35, 0.7, MINE["half"])
judge("float32 / bfloat16", over["float32"], 1.5, 2.7, MINE["float32"])
if "one thread" in over:
    judge("one thread / all", over["one thread"], 0.8, 1.3, MINE["one thread"])
else:
    print("one thread: NOT MEASURED HERE: a GPU, or one thread only")
if "compiled" in over:
    judge("compiled / reading", rows["compiled"]["time / reading"], 0.7, 1.6)
    judge("compiled / original", over["compiled"], 0.8, 1.2, MINE["compiled"])
quiet = "one thread" not in over or rows["reading, one thread"]["time / reading"] > 0.8
if not quiet:
    print("one thread reads faster than all: another process has the cores, and the times of this run say little")
formats = ["{:.2f}", "{:.2f}", "{:.2f}", "{:.3f}", "{:.2f}", "{:.0%}"]
table(pd.DataFrame(rows).T, dict(zip(next(iter(rows.values())), formats, strict=True)))

# %% [markdown]
# Read the table like this.
#
# * *Rows.* If 8 rows cost about what one costs, the time is spent on weights, not on FLOPs. This is why batching is
#   nearly free until the ridge.
# * *Half.* The time follows the bytes.
# * *Threads and reading.* If the original gains more from threads than reading does, or takes much longer than reading,
#   then memory is the bound of the *operation* and something else that of this *kernel*: it works on each weight while
#   it could be loading the next ones. The compiled loop shows that the operation itself can go as fast as its bytes
#   arrive.
#
# ## 5. A small layer
#
# The same hundred calls with 64 x 64. The floor falls with the bytes; what a call costs around its product does not.
#
# **Predict.** How many times its floor does a call take? And which share of the hundred calls goes away when one
# call does all of it, with the hundred weights stacked into one of 6400 x 64: the same FLOPs, the same bytes of
# weights?

# %%
MINE = {"call / floor": None, "share of the calls": None}

# %%
small = [torch.randn(SMALL, SMALL, device=DEVICE).to(weights[0].dtype) for _ in range(CALLS)]
stacked, x_small = torch.cat(small), x[:, :SMALL].contiguous()


def hundred():
    return [F.linear(x_small, w) for w in small]


def at_once():
    return F.linear(x_small, stacked)


runs = {"hundred calls": hundred, "one call": at_once}
if (fused_hundred := compiled(hundred)) is not None:
    runs["hundred, compiled"] = fused_hundred
if DEVICE == "cuda":
    graph = torch.cuda.CUDAGraph()
    hundred()
    with torch.cuda.graph(graph):
        hundred()
    runs["hundred, CUDA graph"] = graph.replay
else:
    print("CUDA graph: NOT MEASURED HERE: no GPU")
with FlopCounterMode(display=False) as apart:
    hundred()
with FlopCounterMode(display=False) as together:
    at_once()
judge("FLOPs of one call over those of a hundred", together.get_total_flops() / apart.get_total_flops(), 1.0)
same = torch.allclose(torch.cat(hundred(), -1).float(), at_once().float(), rtol=2e-2, atol=0.25)
judge("results of the hundred that the stacked weights give", CALLS if same else 0, CALLS)

timed_small = interleave(runs, rounds=31, warmup=3, device=DEVICE)
small_work = costs.linear(1, SMALL, SMALL, element)
call_small = timed_small["hundred calls"].median / CALLS
gone = 1 - 1 / ratio(timed_small["hundred calls"], timed_small["one call"])
judge("call / floor at 64 x 64", call_small / roof.seconds(small_work), 5, 1e5, MINE["call / floor"])
judge("share of the calls", gone, 0.5, 1.0, MINE["share of the calls"])
pd.DataFrame(
    {
        name: {"µs for all": t.median * 1e6, "times faster": ratio(timed_small["hundred calls"], t)}
        for name, t in timed_small.items()
    }
).T.round(2)

# %% [markdown]
# Compiling the hundred calls is no sure gain: before it runs, the compiled function checks each of its weights, and
# that is a cost of the same kind.
#
# The timeline of the small calls, to see where the time is now:

# %%
trace_small = record(hundred)
slowest_small, busy_small = top(trace_small), traces.busy(trace_small)
print(
    f"the product itself is {slowest_small.iloc[0]['total'] / busy_small.wall:.0%} of the time, at {SIZE} it was "
    f"{product['total'] / busy.wall:.0%}; something runs for {busy_small.share:.0%} of it, before {busy.share:.0%}"
)
display(micros(slowest_small, "total", "mean"))
if len(trace_small.kernels):
    display(micros(traces.launch_overhead(trace_small).groupby("name", observed=True).mean().reset_index(),
                   "call", "delay", "duration"))  # fmt: skip
figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
draw(trace_small, 4, f"Four calls of {SMALL} x {SMALL}, under the profiler", axes)
plt.show()

# %% [markdown]
# ## 6. All of it on one roofline
#
# Below the slope there is time to win; how far below says how much at most. The small layer lies in a cache, so the
# slope of the memory is not even its bound.

# %%
labels = {"original": "1 row", "8 rows": "8 rows", "32 rows": "32 rows", "compiled": "1 row, compiled"}
points = [
    roofline.Point.measured(label, done.get(name, work), timed[name].median / PASS)
    for name, label in labels.items()
    if name in timed
]
points.append(roofline.Point.measured("64 x 64, 1 row", small_work, call_small))
points.append(roofline.Point.measured("64 x 64, stacked", small_work, timed_small["one call"].median / CALLS))
with tempfile.TemporaryDirectory() as folder:
    _, drawn = plots.roofline_plot(points, [roof], Path(folder) / "linear", title=f"{machine.name}, {DTYPE}")
    display(Image(drawn.read_bytes()))

# %% [markdown]
# ## Verdict
#
# Written by a rule from the figures above, unless another process had the cores. A call counts as bound by the *memory*
# when it takes at most 1.6 times as long as reading its bytes in the same run, as bound by *calls* when most of its
# time goes away in one call, and as *its kernel's* fault when neither is true.

# %%


def verdict(name):
    """(what bounds it, evidence) of a run of section 4."""
    share, evidence = rows[name]["time / reading"], [f"{rows[name]['time / reading']:.2f} x reading"]
    if name == "original":
        evidence.append(f"8 rows cost {over['8 rows']:.2f} x one")
        if "one thread" in over:
            reading_alone = rows["reading, one thread"]["time / reading"]
            evidence.append(f"one thread takes {over['one thread']:.2f} x all, when reading {reading_alone:.2f} x")
    bound = "memory" if share <= 1.6 else "its kernel: memory delivers faster"
    return bound if quiet else "not decided: the cores were busy", "; ".join(evidence)


verdicts = {f"{SIZE} x {SIZE}, 1 row": verdict("original")}
if "compiled" in over:
    verdicts[f"{SIZE} x {SIZE}, 1 row, compiled"] = verdict("compiled")
verdicts[f"{SMALL} x {SMALL}, 1 row"] = (
    "not decided: the cores were busy" if not quiet else "calls" if gone > 0.5 else "its bytes or FLOPs",
    f"{gone:.0%} of the time goes away in one call; {call_small * 1e6:.1f} µs a call",
)
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(verdicts, index=["bound by", "evidence"]).T)

# %% [markdown]
# ## Your turn
#
# * `SIZE = 1024`: the weights together now fit into the cache of many CPUs. Predict which points cross the slope.
# * `many(128)`: on which side of the ridge is it? Predict its time from 32 rows.
# * Where is the size at which calls and bytes cost the same? Predict it from the cost of a small call and the rate of
#   reading, then test your prediction with one more `interleave`.
