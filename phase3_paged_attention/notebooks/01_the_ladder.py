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
# # The ladder
#
# A decode reads all keys and values of its sequence, and does so little with each that nothing else counts. So a kernel
# for decodes is judged by one number: the bytes that it asks for, over those that there are. This notebook climbs from
# a kernel that asks for six times as many to one that asks once, and then keeps a whole GPU at it:
#
# 1. Where does a step's time go on this machine?
# 2. How far is attention from what its memory allows?
# 3. What does each rung of the ladder ask for, and what does it compile to?
# 4. Who works how long? One long sequence, many short ones, 33 programs
# 5. What does a GPU say?
#
# Each part begins with a prediction, a number worked out from bytes. Write down your own before you run the cell. What
# is counted must come out exactly, on every machine, and the cells insist on it. What is timed is the machine's own:
# the cells print it, the prose does not.

# %%
import heapq
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
import torch
from IPython.display import Image, display
from torch.profiler import ProfilerActivity, profile

from module0_profiling import hardware, peak_measure, plots, roofline, rooms, traces
from module0_profiling.course.parts import Use, resolve
from module0_profiling.notebooks import table
from module0_profiling.timing import clock_for, interleave, ratio
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import random_prompts
from phase3_paged_attention.kernels import costs
from phase3_paged_attention.llm import LLM
from phase3_paged_attention.measures import cpu_cases, ladder_cases

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.axisbelow": True})
torch.set_num_threads(1)  # where others work too, two threads wait for each other after every operation
keep_freed_memory()  # as the engine's commands do: else a tensor of fresh pages is charged to whoever makes one
WHO = ("framework", "solution")
GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None  # it is Linux only


def part(name: str, who: str):
    """A module of this phase by one of its authors."""
    return resolve("phase3_paged_attention", name, Use.parse(f"phase3={who}"))


machine = hardware.detect("cpu")
print(f"{machine.name}, {machine.units} cores, torch {torch.__version__}")

# %% [markdown]
# ## 1. Where does a step's time go?
#
# A model with the attention of TinyLlama-1.1B (32 query heads, 4 key heads of 64) and little else, random weights,
# float32, on the CPU. Sixteen sequences decode: one has 1,536 tokens, most have a hundred.
#
# The framework gathers the pages of all sequences side by side, every one as long as the longest. The solution sorts
# them, and gathers groups of nearly one length.
#
# **Predict** how many bytes of the cache a step reads, for both. A token has 2 · 4 · 64 numbers in each of two layers.

# %%
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LENGTHS = (1536, 700, 400, 300, 200, 150, 120, 100, 90, 80, 70, 60, 50, 40, 30, 20)
PAGE, WARM = 16, 4


def engine(path: Path, who: str) -> LLM:
    """An engine on the CPU; operations are launched one by one."""
    room = {"num_blocks": 320, "max_num_seqs": 16, "max_num_batched_tokens": 8192, "block_size": PAGE}
    return LLM(str(path), use=f"phase3={who}", device="cpu", dtype="float32", runner="eager", **room)


def start(llm: LLM, tokens: int) -> list[str]:
    """Requests whose prompts are computed and that decode from here on."""
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [llm.engine.add_request(p, greedy) for p in random_prompts(SHAPE["vocab_size"], list(LENGTHS))]
    for _ in range(WARM):  # the prompts, and three steps
        llm.engine.step()
    return requests


def stop(llm: LLM, requests: list[str]) -> None:
    """Forget requests that `start` began."""
    for request in requests:
        llm.engine.abort(request)


class Reads(cpu_cases.CacheReads):
    """Counts the bytes that are read of the cache; new keys and values that are written do not count."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_put" in func.name():
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def read_in_a_step(llm: LLM) -> int:
    """Bytes of the cache."""
    requests = start(llm, 8)
    with Reads([side for layer in llm.engine.kv.layers for side in layer]) as reads:
        llm.engine.step()
    stop(llm, requests)
    return reads.bytes


with tempfile.TemporaryDirectory() as folder:
    path = write_checkpoint(SHAPE, Path(folder) / "model", dtype="float32")
    engines = {who: engine(path, who) for who in WHO}
TOKEN = engines["solution"].engine.model.kv_spec.bytes_per_token
assert TOKEN == 2 * 2 * 4 * 64 * 4
held = [length + WARM for length in LENGTHS]  # at the step that is counted
predicted = len(held) * -(-max(held) // PAGE) * PAGE * TOKEN
read = {who: read_in_a_step(llm) for who, llm in engines.items()}
assert read["framework"] == predicted
assert sum(held) * TOKEN <= read["solution"] < 1.5 * sum(held) * TOKEN
print("the framework's prediction is exact")
for who in WHO:
    print(f"{who}: reads {read[who] / (sum(held) * TOKEN):.2f} x the bytes of the tokens that there are")

# %% [markdown]
# The solution's surplus is pages that are not full, and groups whose sequences differ a little: a group for each
# sequence would read nothing in vain, and pay for calls.
#
# Now the clock. Grey is what the engine does, below it is what torch does for it. **Expect** blue and orange to shrink
# by the bytes. **Look for** what does not shrink.

# %%
KINDS = {  # kind of operation -> colour, words in the names of its operations
    "fetching pages": (ORANGE, ("aten::index", "index_select", "where", "fill")),
    "attention": (BLUE, ("attention", "flash", "softmax", "bmm")),
    "products with weights": (GREEN, ("linear", "::mm", "matmul")),
    "all other": (PINK, ("",)),
}
STAGES = ("schedule", "prepare", "forward", "sample", "finish", "detokenise")
STEPS = 8


def kind_of(name: str) -> str:
    """The first kind that has a word in the name; writing to the cache is not fetching."""
    found = next(kind for kind, (_, words) in KINDS.items() if any(word in name.lower() for word in words))
    return "all other" if "index_put" in name else found


def recorded(llm: LLM) -> traces.Trace:
    """The timeline of some decode steps."""
    requests = start(llm, STEPS + 8)
    with profile(activities=[ProfilerActivity.CPU]) as running:
        for _ in range(STEPS):
            llm.engine.step()
    stop(llm, requests)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        running.export_chrome_trace(str(file))
        return traces.read(file)


def quickest_step(trace: traces.Trace) -> tuple[float, float]:
    """Begin and end of the quickest step, in seconds: what disturbs the machine does not hit all of them."""
    begins = trace.ranges[trace.ranges["name"] == "schedule"]["start"].tolist()
    last = trace.ranges[trace.ranges["name"] == "detokenise"]
    ends = (last["start"] + last["duration"]).tolist()
    return min(zip(begins, ends, strict=True), key=lambda step: step[1] - step[0])


def draw(axes, trace: traces.Trace, begin: float, title: str) -> None:
    """The engine's stages, and torch's operations: callers below what they call."""

    def bars(events) -> list[tuple[float, float]]:
        return list(zip((events["start"] - begin) * 1e3, events["duration"] * 1e3, strict=True))

    for stage, shade in zip(STAGES, ("0.75", "0.9") * 3, strict=True):
        axes.broken_barh(bars(trace.ranges[trace.ranges["name"] == stage]), (0.6, 0.8), color=shade)
    colours = [KINDS[kind_of(name)][0] for name in trace.cpu_ops["name"]]
    axes.broken_barh(bars(trace.cpu_ops), (-0.4, 0.8), facecolors=colours, linewidth=0)
    axes.set(yticks=[1, 0], yticklabels=["engine", "torch"], title=title, xlabel="time, ms")


recordings = {who: recorded(llm) for who, llm in engines.items()}
spans = {who: quickest_step(trace) for who, trace in recordings.items()}
longest = max(end - begin for begin, end in spans.values()) * 1e3
figure, panels = plt.subplots(2, 1, figsize=(10, 4.6), layout="constrained")
for axes, (who, trace) in zip(panels, recordings.items(), strict=True):
    begin, end = spans[who]
    draw(axes, trace, begin, f"{who}: a step of {(end - begin) * 1e3:.1f} ms, which the black line ends")
    axes.axvline((end - begin) * 1e3, color=BLACK)
    axes.set_xlim(0, longest)
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in KINDS.values()]
figure.legend(handles, KINDS, loc="outside lower center", ncols=len(KINDS), fontsize=9)
plt.show()

# %% [markdown]
# As tables: time in operations themselves, without those that they call. *Busy* is the share of the recording in which
# an operation ran.

# %%
totals = {}
for who, trace in recordings.items():
    own = traces.self_times(trace)
    by_kind = own.groupby(own["name"].astype(str).map(kind_of))["duration"].sum().reindex(list(KINDS), fill_value=0.0)
    totals[who] = {
        "operations a step": len(own) / STEPS,
        "busy": traces.busy(trace).share,
        **{f"{kind}, ms": seconds / STEPS * 1e3 for kind, seconds in by_kind.items()},
    }
    top = traces.by_time(own, 6)
    shown = {
        "operation": top["name"].astype(str).str.slice(0, 56),
        "calls a step": top["calls"] / STEPS,
        "µs a step": top["total"] / STEPS * 1e6,
        "share": top["share"],
    }
    print(who)
    display(table(pd.DataFrame(shown), {"calls a step": "{:.0f}", "µs a step": "{:,.0f}", "share": "{:.0%}"}))
totals = pd.DataFrame(totals).T
about_pages = totals["fetching pages, ms"] + totals["attention, ms"]
print(f"by bytes the step's attention should shrink {read['framework'] / read['solution']:.1f} x,", end=" ")
print(f"in this run it did {about_pages['framework'] / about_pages['solution']:.1f} x")
assert about_pages["framework"] > 1.5 * about_pages["solution"]
table(totals, {"operations a step": "{:,.0f}", "busy": "{:.0%}", **{f"{kind}, ms": "{:.2f}" for kind in KINDS}})

# %% [markdown]
# The framework's step *is* fetching: it copies pages to one place, clears what is no token's, and attends to the copy.
# The solution has more operations, each on less, and what is left over begins to be seen.
#
# ## 2. How far is attention from what memory allows?
#
# Attention alone, on more than a CPU's cache holds: 8 and 32 sequences of 1,024 tokens, and 32 of 17 to 4,096. Layers
# take turns.
#
# **Predict.** The framework's gather reads the pages and writes them, clearing reads and writes all of that, and
# attention reads it: five passes through memory, over the longest. What share of this machine's bandwidth can it reach
# at most, in each of the three cases? The solution's copies stay in the CPU's cache: one pass.

# %%
CASES = {"8 x 1,024": [1024] * 8, "32 x 1,024": [1024] * 32, "32 ragged": cpu_cases.ragged(32)}
PASSES = 5
clock = clock_for("cpu")
rate = peak_measure.matmul_rate("float32", "cpu", clock)  # with as many threads, now
buffer = torch.randn(1 << 26)
bandwidth = peak_measure.read_bandwidth(buffer.view(torch.bfloat16), clock)[0]
del buffer
roof = roofline.Roof(rate, bandwidth, "float32")
rows, points, gains = {}, [], {}
for name, lengths in CASES.items():
    step = cpu_cases.decodes(lengths, torch.float32)
    runs = {who: step.paged(part("torch_attention", who).PagedTorchAttention()) for who in WHO}
    timings = interleave(runs, rounds=3, warmup=1)
    gains[name] = ratio(timings["framework"], timings["solution"])
    case = costs.Decode(tuple(lengths), cpu_cases.HEADS, cpu_cases.KV_HEADS, cpu_cases.HEAD_DIM, 4)
    work = roofline.Work(costs.flops(case), costs.minimum(case))
    padded = len(lengths) * max(lengths) / sum(lengths)
    for who in WHO:
        seconds = timings[who].best / len(step.layers)
        points.append(roofline.Point.measured(f"{who}, {name}", work, seconds))
        rows[f"{who}, {name}"] = {
            "MB needed": work.bytes / 1e6,
            "FLOP/byte": work.intensity,
            "ms": seconds * 1e3,
            "GB/s of what is needed": work.bytes / seconds / 1e9,
            "share, at most": min(1 / (PASSES * padded) if who == "framework" else 1.0, roof.ridge / work.intensity),
            "share of the bandwidth": work.bytes / seconds / bandwidth,
        }
    del step, runs
with tempfile.TemporaryDirectory() as folder:
    title = "Decode attention of one layer, one thread"
    display(Image(plots.roofline_plot(points, [roof], Path(folder) / "roofline", title=title)[1].read_bytes()))
print(f"the ridge is at {roof.ridge:.1f} FLOP/byte: the ceiling is that of {roof.bound_by(work)}")
for name, gain in gains.items():
    print(f"{name}: the solution is {gain:.2f} x as fast")
assert gains["32 ragged"] > gains["32 x 1,024"] and gains["32 ragged"] > 2
formats = {"MB needed": "{:.1f}", "ms": "{:.2f}", "share, at most": "{:.0%}", "share of the bandwidth": "{:.0%}"}
table(pd.DataFrame(rows).T, {**dict.fromkeys(rows[points[0].label], "{:.1f}"), **formats})

# %% [markdown]
# All points stand at one intensity, since all compute the same for a byte: 4 FLOPs, which for one thread is near the
# ridge. (On a GPU it is far left of it: 8 for a byte of bfloat16, where an H200 has its ridge at 184.) In the ragged
# batch padding multiplies what copies cost already. What the solution leaves below its ceiling is no longer memory's
# doing: torch's attention is made for many queries, and gets one a head.
#
# On a CPU the way out is to copy little at a time. A GPU kernel needs no copy: a program looks each token up in the
# block table and reads it where it lies. The rest of this notebook is about such kernels.
#
# ## 3. What does each rung ask for?
#
# Five kernels for the same decode, in `kernels/decode_ladder.py`. Open it beside this notebook.
#
# | rung | a program does | its idea |
# |---|---|---|
# | naive | a query head, page by page, twice | first the maximum of the scores, then the sums |
# | online | a query head, page by page | one pass: sums fade when a larger score comes |
# | tiled | a query head, 64 tokens at a time | more loads under way; a tile need not be a page |
# | packed | a KV head, its G query heads as rows | keys that are shared are read once; tensor cores |
# | split | a KV head, a part of the sequence | a few long sequences fill a GPU; a second kernel merges |
#
# No GPU is needed to count. Triton's interpreter runs a kernel on the CPU, every load and store with its addresses, and
# `kernels/trace.py` takes them down. It must be chosen before Triton is imported, so this is a process of its own. And
# what a rung compiles to for an H200 is asked of the real compiler, in another.
#
# **Predict**, for G = 4: how many times is each key asked for, and each value? How many bytes of block table come with
# a token, if a program reads an entry of 4 bytes for each page, or for each token? (Pages of 16, two KV heads of 64,
# float16.) Which rungs can use tensor cores?

# %%
TRACED = """
import json
import torch
from phase3_paged_attention.measures import ladder_cases
from phase3_paged_attention.kernels import decode_ladder
from phase3_paged_attention.kernels.trace import Trace

case = ladder_cases.TRACED
q, (keys, values), lengths, tables = ladder_cases.inputs(case)

dense = []  # attention in float64, sequence by sequence, written without a look at the kernels
for b, n in enumerate(case.lengths):
    blocks = tables[b].long()
    k, v = (side[blocks].flatten(0, 1)[:n].double().repeat_interleave(case.heads // case.kv_heads, 1)
            for side in (keys, values))  # [n, Hq, D]
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q[b].double(), k) * case.dim**-0.5, 1)
    dense.append(torch.einsum("hn,nhd->hd", weights, v))
dense = torch.stack(dense)

found = {}
sizes = {"block_n": ladder_cases.BLOCK_N, "splits": ladder_cases.SPLITS}
for rung in decode_ladder.RUNGS:
    with Trace({"q": q, "keys": keys, "values": values, "lengths": lengths, "tables": tables}) as trace:
        out = decode_ladder.run(rung, q, keys, values, lengths, tables, case.dim**-0.5, **sizes)
    found[rung] = {
        "error": float((out.double() - dense).abs().max() / dense.abs().max()),
        "bytes": trace.bytes(),
        "distinct": trace.loads("keys", "values").distinct,
        **{name: trace.loads(name).requested for name in ("keys", "values", "tables")},
    }
print(json.dumps(found))
"""


def ask(*arguments: str, interpret: bool) -> object:
    """The JSON that another process prints last; in it Triton interprets, or compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=rooms.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


counted = compiled = None
if TRITON:
    with ThreadPoolExecutor(2) as pool:
        interpreting = pool.submit(ask, "-c", TRACED, interpret=True)
        compiling = pool.submit(
            ask, "-m", "phase3_paged_attention.measures.ladder_cases", "static", "sm_90", "--dry", interpret=False
        )
    counted, compiled = interpreting.result(), compiling.result()
else:
    print("bytes and builds of the ladder: NOT MEASURED HERE: Triton is not installed (it is Linux only)")

# %%
case = ladder_cases.TRACED  # 150, 70 and 7 tokens, 8 query heads, 2 KV heads of 64, float16
G = case.heads // case.kv_heads
TIMES = {  # rung -> times that each key is asked for, each value, and programs of a sequence
    "naive": (2 * G, G, case.heads),
    "online": (G, G, case.heads),
    "tiled": (G, G, case.heads),
    "packed": (1, 1, case.kv_heads),
    "split": (1, 1, case.kv_heads),
}


def entries(rung: str) -> int:
    """Entries of the block table that the programs of a rung read: one a page in every pass, or one a token."""
    by_page = sum(-(-length // case.page) for length in case.lengths)
    return TIMES[rung][2] * {"naive": 2 * by_page, "online": by_page}.get(rung, case.tokens)


print("times that each key is asked for:", *(f"{rung} {times[0]}" for rung, times in TIMES.items()))
if counted is not None:
    rows = {}
    for rung, (of_keys, of_values, _) in TIMES.items():
        found, side = counted[rung], case.cached
        model = costs.requested(rung, case, splits=ladder_cases.SPLITS, block_n=ladder_cases.BLOCK_N)
        assert (found["keys"], found["values"]) == (of_keys * side, of_values * side)
        assert found["tables"] == 4 * entries(rung)
        assert found["bytes"] == sum(model.values())
        assert found["distinct"] == 2 * side and found["error"] < 1e-3
        rows[rung] = {
            "error": found["error"],
            "K and V, times": (found["keys"] + found["values"]) / (2 * side),
            "table, bytes a token": found["tables"] / case.tokens,
            "all, bytes a token": found["bytes"] / case.tokens,
            "by the model": sum(model.values()) / case.tokens,
            "over the minimum": found["bytes"] / costs.minimum(case),
        }
    print("every rung agrees with float64; every prediction is exact, and so is the model of all tensors")
    formats = {"error": "{:.0e}", "over the minimum": "{:.2f}"}
    display(table(pd.DataFrame(rows).T, {**dict.fromkeys(rows["naive"], "{:,.1f}"), **formats}))

# %% [markdown]
# `tiled` asks for *more* than `online`, since every token brings its table entry. What it is for is in the next table.
# The splits' surplus here is partial results of a tiny batch, which go out and come back; on long sequences it is about
# 1 %.
#
# The model is exact, so it may say what nobody wants to interpret: 64 sequences of 8,192 tokens of an 8B model.

# %%
from phase3_paged_attention.measures.ladder_cases import LARGE

asked = {name: costs.total(found(LARGE)) for name, found in (("unfused", costs.unfused), ("SDPA", costs.gathered_sdpa))}
over = {"PyTorch, written out": asked["unfused"], "PyTorch, gather + SDPA": asked["SDPA"]}
over |= {rung: sum(costs.requested(rung, LARGE).values()) for rung in TIMES}
over = {name: moved / costs.minimum(LARGE) for name, moved in over.items()}
figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
bars = axes.barh(list(over), list(over.values()), color=[ORANGE] * 2 + [SKY] * 3 + [GREEN] * 2, edgecolor=BLACK)
axes.bar_label(bars, [f"{value:.3g}" for value in over.values()], padding=3)
axes.set(xlabel="bytes asked for / bytes that there are", title="64 sequences of 8,192 tokens, 32/8 heads of 128")
axes.margins(x=0.1)
axes.invert_yaxis()
plt.show()
assert 5.9 < over["naive"] < 6.1 and over["packed"] < 1.01
print(
    f"PyTorch written out moves {over['PyTorch, written out'] / over['packed']:.1f} x what the packed kernel asks for"
)

# %% [markdown]
# PyTorch's operations move their bytes through memory, each time. A kernel's repeats may be answered by the L2: the G
# programs that want the same keys run side by side. So between what it asks for and what memory gives lies luck.
#
# Now what the compiler made of them, for an H200. *Resident* are programs that fit on an SM at once. Two more are
# exhibits, `packed` with one table entry a page, reshaped to the tile: `page_rows` reshapes row numbers, `page_gather`
# whole addresses.
#
# **Predict** which of the two keeps 16-byte loads, and which rungs load in the background (`cp.async`).

# %%
if compiled is not None:
    builds = {}
    for found in compiled:
        name, what = found["name"].split("/")
        builds.setdefault(name.split(",")[0], {})[what] = found["value"]
    builds = pd.DataFrame(builds).T.rename(columns={"blocks on an SM": "resident"})
    assert (builds["spills"] == 0).all() and (builds["resident"] >= 2).all()
    background = builds["cp.async"] > 0
    assert background[["packed", "split", "page_rows"]].all() and not background[["naive", "online", "tiled"]].any()
    assert builds.loc["page_gather", "cp.async"] == 0 < builds.loc["page_gather", "loads below 4 bytes"]
    print("no rung spills; loads go on in the background in", ", ".join(background.index[background]))
    display(table(builds, dict.fromkeys(builds, "{:,.0f}")))

# %% [markdown]
# Triton's pipeline serves operands of products, so it begins with `packed`. The exhibit is a trap: after the reshape
# the compiler no longer knows that neighbours lie side by side, loads two bytes at a time, and waits for each.
#
# ### What will an H200 take?
#
# **Predict** from bytes: it reads about 4.3 TB/s. Two numbers for each rung: if the L2 answers every repeat, and if it
# answers none. Then the same for one sequence of 131,072 tokens: a rung of 8 programs keeps 8 of 132 SMs at work. Say
# that an SM gets no more than its share of the bandwidth. What does packing do for that sequence?

# %%
H200, SMS = 4.3e12, 132
from phase3_paged_attention.measures.ladder_cases import FEW_LONG

PROGRAMS, BLOCK_N = 264, 64  # two on an SM; tokens of a tile


def splits_for(batch: int, kv_heads: int, longest: int) -> int:
    """Parts of a sequence that give so many programs, with a tile each."""
    return max(1, min(PROGRAMS // (batch * kv_heads), -(-longest // BLOCK_N), 64))


def expected(rung: str, case: costs.Decode) -> dict[str, float]:
    """What bytes say of a rung's time, in µs. Nothing of it is measured."""
    splits = splits_for(case.batch, case.kv_heads, max(case.lengths)) if rung == "split" else 1
    asked = sum(costs.requested(rung, case, splits=splits, block_n=BLOCK_N).values())
    passes = 1.5 if rung == "naive" else 1.0  # of K and V; the second finds nothing of the first in an L2
    programs = case.batch * (case.heads if TIMES[rung][0] >= G else case.kv_heads) * splits
    speed = H200 * min(1.0, programs / SMS)
    return {
        "programs": programs,
        "L2 answers all repeats, µs": passes * costs.minimum(case) / speed * 1e6,
        "it answers none, µs": asked / speed * 1e6,
    }


predictions = {}
for what, step in (("64 x 8k", LARGE), ("1 x 128k", FEW_LONG)):
    rungs_of = pd.DataFrame({rung: expected(rung, step) for rung in TIMES}).T
    predictions[what] = rungs_of
    print(f"PREDICTION, not measured, {what}: floor {costs.floor_seconds(step, H200) * 1e6:.0f} µs")
    display(table(rungs_of, dict.fromkeys(rungs_of, "{:,.0f}")))
one = predictions["1 x 128k"]
assert one.loc["packed", "L2 answers all repeats, µs"] > one.loc["online", "L2 answers all repeats, µs"]
assert one.loc["split"].iloc[1:].max() < 1.05 * costs.floor_seconds(FEW_LONG, H200) * 1e6
print(
    "packing makes programs fewer: one long sequence gets slower by it, if the L2 was answering; splitting mends that"
)

# %% [markdown]
# ## 4. Who works how long?
#
# `split` cuts every sequence into as many parts. A batch is rarely so even. The engine's kernel therefore reads a list:
# items of (sequence, range of tokens), longest first, made on the host in every step (`work.py`). A program takes the
# item of its number, so 264 programs at once serve 33 items for 8 KV heads.
#
# The framework lists one item a sequence. The solution cuts what is longer than a share.
#
# **Predict** for 64 sequences whose rank r has 32,768 / r tokens: how long is the busiest program at work, in tokens,
# before and after? What is the least that is possible?

# %%
from phase3_paged_attention.measures.attention_inputs import zipf_lengths

KV_HEADS, GROUP, DIM = 8, 4, 128
LANES = PROGRAMS // KV_HEADS
RAGGED = zipf_lengths(64, 32768)


def planned(who: str, lengths: tuple[int, ...]):
    """The list of a decode."""
    sizes = {"group": GROUP, "kv_heads": KV_HEADS, "block_n": BLOCK_N, "tokens": 1, "programs": PROGRAMS}
    return part("work", who).plan_work([1] * len(lengths), lengths, window=None, device=torch.device("cpu"), **sizes)


def lanes(work) -> list[list[tuple[int, int, int]]]:
    """Items (begin, tokens, sequence) as a GPU runs them: in the order of the list, where a program ends first."""
    free, done = [(0, lane) for lane in range(LANES)], [[] for _ in range(LANES)]
    for sequence, _, begin, end, *_ in work.items.tolist():
        at, lane = heapq.heappop(free)
        done[lane].append((at, end - begin, sequence))
        heapq.heappush(free, (at + end - begin, lane))
    return done


def busiest(work) -> int:
    """Tokens of the program that ends last."""
    return max(at + tokens for lane in lanes(work) for at, tokens, _ in lane)


lists = {who: planned(who, RAGGED) for who in WHO}
share = math.ceil(sum(RAGGED) / LANES)
figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharex=True, sharey=True)
for axes, who in zip(panels, WHO, strict=True):
    for lane, items in enumerate(lanes(lists[who])):
        colours = [plots.COLOURS[sequence % 8] for _, _, sequence in items]
        axes.broken_barh(
            [(at, n) for at, n, _ in items], (lane, 0.9), facecolors=colours, edgecolor="white", linewidth=0.4
        )
    axes.axvline(share, color=BLACK, linestyle="--", label="an even share")
    axes.set(xlabel="tokens read", title=f"{who}: the last ends at {busiest(lists[who]):,}")
panels[0].set_ylabel("programs of one KV head")
panels[0].legend(loc="center right")
plt.show()
assert busiest(lists["framework"]) >= max(RAGGED)
assert share <= busiest(lists["solution"]) < 1.25 * share
print(f"an even share is {share:,} tokens; the busiest has {busiest(lists['framework']):,},", end=" ")
print(f"split {busiest(lists['solution']):,}")

# %% [markdown]
# Colours are sequences. On the left most programs have ended long before the one that reads the longest. On the right
# that sequence is many items.
#
# Splitting is not free: a partial result is D + 1 numbers of float32 for each query head, written and read again. A
# cached token is 2 D numbers of 2 bytes for each KV head. **Predict** when it must not happen at all, and its price in
# bytes where it does.

# %%
BATCHES = {
    "ragged, 64 sequences": RAGGED,
    "64 x 8,192": (8192,) * 64,
    "8 x 2,048": (2048,) * 8,
    "1 x 131,072": (131072,),
}
rows = {}
for name, lengths in BATCHES.items():
    work, plain, share = planned("solution", lengths), planned("framework", lengths), sum(lengths) / LANES
    splits = len(work.items) - len(lengths)
    moved = 2 * 4 * GROUP * (DIM + 1) * work.slots
    rows[name] = {
        "items": len(work.items),
        "partial results": work.slots,
        "their bytes": moved / (2 * 2 * DIM * sum(lengths)),
        "framework, busiest / share": busiest(plain) / share,
        "solution, busiest / share": busiest(work) / share,
    }
balance = pd.DataFrame(rows).T
assert balance.loc["64 x 8,192", "partial results"] == 0  # enough items without
assert (balance["their bytes"] < 0.04).all() and (balance["solution, busiest / share"] < 1.25).all()
print("64 even sequences are never split; where sequences are, partial results cost", end=" ")
print(f"{balance['their bytes'].iloc[[0, 2, 3]].min():.1%} to {balance['their bytes'].max():.1%} of the bytes")
formats = {"their bytes": "{:.1%}", "items": "{:.0f}", "partial results": "{:.0f}"}
table(balance, {**dict.fromkeys(balance, "{:.2f}"), **formats})

# %% [markdown]
# The list is made while the GPU waits, or at best while it does the step before. **Predict**: the framework walks in
# Python, the solution in numpy. From how many sequences on is numpy faster?

# %%
counts = (1, 4, 16, 64, 256)
spent = {who: [] for who in WHO}
for count in counts:
    lengths = zipf_lengths(count, 32768)
    timings = interleave({who: partial(planned, who, lengths) for who in WHO}, rounds=15, warmup=2)
    for who in WHO:
        spent[who].append(timings[who].median * 1e6)
table(pd.DataFrame(spent, index=[f"{n} sequences, µs" for n in counts]), dict.fromkeys(WHO, "{:,.0f}"))

# %% [markdown]
# The solution does more: it cuts, sorts, and says what to merge. But it calls numpy as often for hundreds of sequences
# as for one, and all of the list goes to the device in one copy.
#
# ## 5. What does a GPU say?
#
# Times of the rungs beside the predictions above, and of the engine's kernel (`ours`): a CUDA graph on inputs that take
# turns, so that none is in the L2.
#
# **Predict** the place of each rung in its interval: the nearer to the left number, the more often the L2 answered.

# %%
if GPU:
    from phase3_paged_attention.measures.attention_inputs import decode
    from phase3_paged_attention.measures.attention_timing import OURS, OURS_ALONE, Bench, timed
    from phase3_paged_attention.measures.gpu_cases import rungs

    for what, step in (("64 x 8k", LARGE), ("1 x 128k", FEW_LONG)):
        same = decode(step.batch, step.lengths[0], (step.heads, step.kv_heads, step.dim))
        found = timed(same, Bench.within(120, "cuda", 5, False), must={**OURS_ALONE, **rungs(False)})
        measured = {name.removeprefix("rung "): t.median * 1e6 for name, t in found.timings.items()}
        beside = predictions[what].assign(**{"measured, µs": pd.Series(measured)})
        print(f"{what}: ours {measured[OURS]:,.1f} µs, {costs.minimum(step) / measured[OURS] / 1e6:.2f} TB/s")
        display(table(beside, {**dict.fromkeys(beside, "{:,.0f}"), "measured, µs": "{:,.1f}"}))
else:
    print("times of the kernels: NOT MEASURED HERE: they need an NVIDIA GPU; there,", end=" ")
    print("`python -m phase3_paged_attention.benchmark paged_kinds` takes them too")

# %% [markdown]
# ## Your turn
#
# 1. `make start-phase3` copies the framework into `workspace/phase3_paged_attention`.
# 2. Write the kernel (task 3.1), the planner (task 3.2) and the CPU's groups (task 3.3); `make hint-phase3 TASK=3.1`
#    helps.
# 3. Set `MINE` below to `"mine"`, restart the kernel and run this notebook again.
# 4. Before you run it: which of the numbers will change, and to what?

# %%
MINE = "framework"  # change to "mine"

mine = Use.parse(f"phase3={MINE}")
step = cpu_cases.padding_ratio(mine)
print(f"CPU, ragged batch: reads {step.value:.2f} x what it needs")
load = busiest(planned(MINE, RAGGED)) * LANES / sum(RAGGED)
print(f"plan of the ragged batch: the busiest program has {load:.2f} x its share")
if TRITON:
    asked = ask("-m", "phase3_paged_attention.measures.kernel_gates", "paged", f"phase3={MINE}", interpret=True)
    print(f"kernel: K and V {asked['decode']:.2f} x in a decode, {asked['prompt']:.2f} x in a prompt,", end=" ")
    print(f"error {asked['error']:.2f} of what is allowed ({asked['step']})")
