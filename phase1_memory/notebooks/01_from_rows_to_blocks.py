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
# # From rows to blocks
#
# Phase 0 gives every sequence a row as long as the longest sequence that there could be. Phase 1 cuts the same memory
# into blocks of 16 tokens and hands them out when they are needed. This notebook asks five things of that:
#
# 1. How much of the memory holds tokens?
# 2. What does a step pay for reading through a table, and how does one pay less?
# 3. What do eight answers to one prompt share?
# 4. What does it cost to run out of blocks?
# 5. What becomes of the memory when a thousand requests grow in it?
#
# Each part begins with a prediction, a number worked out from bytes and blocks. Write down your own before you run the
# cell. What is counted must come out exactly, on every machine, and the cells insist on it. What is timed is the
# machine's own: the cells print it, the prose does not.

# %%
import itertools
import os
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
import torch
from IPython.display import Image, display
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from module0_profiling import attention_costs, hardware, plots, roofline, traces
from module0_profiling.notebooks import table
from module0_profiling.timing import interleave, ratio
from phase0_prototype.llm import LLM as PrototypeLLM
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import random_prompts, run_ours
from phase1_memory.kv_cache import pieces
from phase1_memory.live_map import snapshot
from phase1_memory.llm import LLM
from phase1_memory.memory_map import MemorySnapshot, cells, image_map, terminal_map

MODEL, PAGE = "titan-tiny", 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLUE, ORANGE, GREEN, PINK, SKY, *_, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.axisbelow": True})
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # the operations of a model this small are done before a second thread has begun


def engine(use: str = "solution", **settings) -> LLM:
    """An engine with a paged cache; operations are launched one by one."""
    fixed = {"device": DEVICE, "runner": "eager", "block_size": PAGE, "num_blocks": 256}
    return LLM(MODEL, use=f"phase0=solution,phase1={use}", **{**fixed, **settings})


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens, always the most likely one."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def pages(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // PAGE)


def show(found: MemorySnapshot, title: str = "") -> None:
    """The picture of a snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        display(Image(image_map(found, Path(folder) / "map", title=title)[1].read_bytes()))


framework, solution = engine("framework"), engine("solution")
config, spec = solution.engine.config, solution.engine.model.kv_spec
BLOCK_BYTES = spec.bytes_per_token * PAGE
dtype = str(spec.dtype).removeprefix("torch.")
machine = hardware.detect(DEVICE)
print(f"{machine.name}, {machine.units} {'SMs' if DEVICE == 'cuda' else 'cores'}, torch {torch.__version__}")
print(f"{MODEL}: {spec.num_layers} layers, {spec.num_kv_heads} heads of keys and values, {spec.head_dim} wide, {dtype}")
print(f"a token has {spec.bytes_per_token:,} bytes of keys and values, a block of {PAGE} tokens {BLOCK_BYTES:,}")

# %% [markdown]
# ## 1. How much of the memory holds tokens?
#
# Memory for 2,048 tokens: two rows of 1,024 for phase 0, 128 blocks of 16 for phase 1. Twenty-four requests arrive
# together, with prompts of 16 to 62 tokens, and each wants 24 tokens more.
#
# **Predict.** Look at the moment at which the most tokens are stored. How many requests run, and what share of the
# memory that they were given holds a token? A row is full up to the tokens of its request. The last block of a request
# has room for 15 more at most, for seven or eight on average.

# %%
ROWS, ROW = 2, 1024
LENGTHS, NEW = [16 + 2 * i for i in range(24)], 24
BLOCKS = ROWS * ROW // PAGE


def rows_of(prototype) -> MemorySnapshot:
    """Phase 0's cache as if a row were a run of blocks, so that both pictures have one scale."""
    kv, per_row = prototype.kv, ROW // PAGE
    held = {r.request_id: range(row * per_row, (row + 1) * per_row) for row, r in enumerate(kv.owners)}
    free = range(len(kv.owners) * per_row, BLOCKS)
    stored = {r.request_id: r.num_computed_tokens for r in kv.owners}
    return MemorySnapshot(BLOCKS, PAGE, {name: tuple(blocks) for name, blocks in held.items()}, stored, tuple(free))


def watch(llm, look, prompts, params) -> list:
    """Generate, and look at the engine after each step that left somebody running."""
    for prompt in prompts:
        llm.engine.add_request(prompt, params)
    seen = []
    while llm.engine.has_unfinished():
        llm.engine.step()
        if llm.engine.scheduler.running:
            seen.append(look(llm.engine))
    return seen


def stored_and_given(found: MemorySnapshot) -> tuple[int, int]:
    """Tokens that are stored, and places for tokens that were given out."""
    return sum(found.lengths.values()), PAGE * len({block for blocks in found.tables.values() for block in blocks})


prompts = random_prompts(config.vocab_size, LENGTHS)
in_rows = PrototypeLLM(
    MODEL, device=DEVICE, runner="eager", max_num_seqs=ROWS, max_model_len=ROW, use="phase0=solution"
)
in_blocks = engine(num_blocks=BLOCKS)
history = {
    "rows": watch(in_rows, rows_of, prompts, greedy(NEW)),
    "blocks": watch(in_blocks, snapshot, prompts, greedy(NEW)),
}
fullest = {name: max(seen, key=lambda found: stored_and_given(found)[0]) for name, seen in history.items()}

stored = [length + NEW - 2 for length in LENGTHS]  # before a request's last step: one is to come, the newest waits
expected = {
    "rows": (ROWS, sum(stored[-ROWS:]), ROWS * ROW),
    "blocks": (len(LENGTHS), sum(stored), PAGE * sum(map(pages, stored))),
}
occupied = pd.DataFrame(
    {name: (len(found.tables), *stored_and_given(found)) for name, found in fullest.items()},
    index=["requests that run", "tokens stored", "places given"],
)
assert occupied.to_dict("list") == {name: list(numbers) for name, numbers in expected.items()}
print("every prediction is exact")
shares = occupied.loc["tokens stored"] / occupied.loc["places given"]
print(*(f"{name}: {share:.1%} of the memory that was given holds tokens" for name, share in shares.items()), sep="\n")
assert shares["rows"] < 0.15 and shares["blocks"] > 0.8
occupied

# %%
for name, found in fullest.items():
    show(found, f"{name}: {len(found.tables)} requests, {shares[name]:.1%} of what they were given holds tokens")

# %% [markdown]
# Both pictures show as much memory. What is pale was given and holds nothing. A row is pale nearly to its end, and no
# third request can have any of it; in blocks only the last of a request is pale.
#
# What is that worth? Steps: a request that waits for a row takes part in none. **Predict** how many each engine needs.

# %%
steps = {"rows": in_rows.engine.runner.forward_passes, "blocks": in_blocks.engine.runner.forward_passes}
assert steps == {"rows": len(LENGTHS) // ROWS * NEW, "blocks": NEW}
print(f"steps for the same {len(LENGTHS)} requests in the same memory: {steps['rows']} and {steps['blocks']}")

# %% [markdown]
# ## 2. What does a step pay for reading through a table?
#
# Attention wants the keys and values of a sequence side by side. They are not: the table says where they are. The
# framework of this phase fetches each block with an operation of its own, and puts each sequence together with another
# one. The solution takes the blocks of all sequences with one `index`, once for keys and once for values. And where the
# blocks of a sequence are neighbours it needs no copy at all, only a view.
#
# **Predict**, for one decode step of eight sequences of 250 tokens and for one sequence alone: how many operations read
# the cache, and how many bytes do they copy?

# %%
COPIES = ("aten::cat", "aten::index")


class Reads(TorchDispatchMode):
    """Counts operations: all that compute or move something, and those that read the cache for attention."""

    def __init__(self, kv) -> None:
        super().__init__()
        self.cache = {side.untyped_storage().data_ptr() for layer in kv.layers for side in layer}
        self.total = self.copied_bytes = 0
        self.fetches: Counter[str] = Counter()

    def _is_cache(self, argument) -> bool:
        first = argument[0] if isinstance(argument, list | tuple) and argument else argument
        return isinstance(first, torch.Tensor) and first.untyped_storage().data_ptr() in self.cache

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func._schema.name, func(*args, **(kwargs or {}))
        self.total += not func.is_view
        if name in (*COPIES, "aten::select") and self._is_cache(args[0]):
            self.fetches[name.removeprefix("aten::")] += 1
            self.copied_bytes += out.nbytes if name in COPIES else 0
        return out


def start(llm: LLM, batch: int, context: int, tokens: int) -> list[str]:
    """Requests whose prompts are computed and that decode from here on."""
    asked = random_prompts(config.vocab_size, [context] * batch)
    requests = [llm.engine.add_request(prompt, greedy(tokens)) for prompt in asked]
    for _ in range(3):  # the prompts, and two steps to warm up
        llm.engine.step()
    return requests


def stop(llm: LLM, requests: list[str]) -> None:
    """Forget requests that `start` began."""
    for request in requests:
        llm.engine.abort(request)


def reads_of_a_step(llm: LLM, batch: int, context: int) -> Reads:
    """Counts of one decode step."""
    requests = start(llm, batch, context, 8)
    with Reads(llm.engine.kv) as reads:
        llm.engine.step()
    stop(llm, requests)
    return reads


BATCH, CONTEXT = 8, 250
SIDES = 2 * spec.num_layers  # keys and values of every layer
of_one = pages(CONTEXT + 3)
cases = {  # who, sequences -> engine, blocks fetched one by one, sequences put together, gathers, bytes copied
    ("framework", BATCH): (framework, SIDES * BATCH * of_one, SIDES * BATCH, 0, BATCH * of_one * BLOCK_BYTES),
    ("solution", BATCH): (solution, 0, 0, SIDES, BATCH * of_one * BLOCK_BYTES),
    ("framework", 1): (framework, SIDES * of_one, SIDES, 0, of_one * BLOCK_BYTES),
    ("solution", 1): (solution, 0, 0, 0, 0),
}
rows = {}
for (who, batch), (llm, selects, cats, gathers, copied) in cases.items():
    reads = reads_of_a_step(llm, batch, CONTEXT)
    assert reads.fetches == Counter({"select": selects, "cat": cats, "index": gathers})
    assert reads.copied_bytes == copied
    rows[f"{who}, {batch} sequence{'s' * (batch > 1)}"] = {
        "fetch a block": selects,
        "put together": cats,
        "gather": gathers,
        "MB copied": copied / 1e6,
        "all operations but views": reads.total,
    }
print("every prediction is exact")
counted = pd.DataFrame(rows).T
table(counted, {**dict.fromkeys(counted, "{:,.0f}"), "MB copied": "{:.2f}"})

# %% [markdown]
# With eight sequences both copy the *same* bytes. The gather does it with sixteen calls in place of thousands: it saves
# calls, not bytes. The single sequence saves the bytes too, because its blocks follow one another. Whether they do is
# the allocator's work.
#
# ### Who asks the allocator, and how often
#
# **Predict.** The framework asks for every block, and gives every block back, in a call of its own. The solution speaks
# to its allocator at most once a step. How many calls are that for the 24 requests of the first part?

# %%
from phase1_memory.checks import Watched


def allocator_calls(llm: LLM) -> tuple[int, int, int, float]:
    """All calls, most calls in a step, steps; and runs of neighbours that a request consists of, on average."""
    tables, calls = llm.engine.kv.tables, []
    real = tables.allocator

    def counted(release, wanted):
        calls.append((len(release), len(wanted)))
        return real.step(release, wanted)

    def look(_) -> tuple[int, float]:
        return len(calls), float(np.mean([len(pieces(blocks)) for blocks in tables.tables.values()]))

    tables.allocator = Watched(real, counted)
    seen = watch(llm, look, prompts, greedy(NEW))
    tables.allocator = real
    after = [0, *(total for total, _ in seen), len(calls)]  # the last step leaves nobody to look at
    return len(calls), max(b - a for a, b in itertools.pairwise(after)), len(after) - 1, seen[-1][1]


blocks_in_all = sum(pages(length + NEW) for length in LENGTHS)
columns = ["calls", "most in a step", "steps", "pieces a request"]
talk = pd.DataFrame([allocator_calls(llm) for llm in (framework, solution)], ["framework", "solution"], columns)
print(f"predicted: framework 2 x {blocks_in_all} blocks = {2 * blocks_in_all}, solution at most one a step")
assert talk.loc["framework", "calls"] == 2 * blocks_in_all
assert talk.loc["solution", "most in a step"] <= 1
assert talk.loc["solution", "pieces a request"] < 1.5 < talk.loc["framework", "pieces a request"]
table(talk, {"pieces a request": "{:.2f}"})

# %% [markdown]
# The free list hands memory out in the order in which it came back, and every use shuffles it further. The buddy
# allocator merges what comes back, and puts a request where it can go on.
#
# ### Where a step's time goes
#
# One decode step of the eight sequences, for both. Grey is what the engine does (nearly all of it the model's forward),
# below it is what torch does for it. **Expect** fewer fetches. **Look for** a second colour that shrinks with them.

# %%
KINDS = {  # kind of operation -> colour, words in the names of its operations
    "fetching blocks": (ORANGE, ("select", "cat", "aten::index", "gather", "indexselect")),
    "attention": (BLUE, ("attention", "flash", "fmha", "softmax", "bmm")),
    "products with weights": (GREEN, ("linear", "::mm", "matmul", "gemm", "gemv", "nvjet", "cutlass")),
    "all other": (PINK, ("",)),
}
STAGES = ("schedule", "prepare", "forward", "sample", "finish", "detokenise")
STEPS = 12


def kind_of(name: str) -> str:
    """The first kind that has a word in the name; writing to the cache is not fetching."""
    found = next(kind for kind, (_, words) in KINDS.items() if any(word in name.lower() for word in words))
    return "all other" if "index_put" in name else found


def recorded(llm: LLM) -> traces.Trace:
    """The timeline of some decode steps."""
    requests = start(llm, BATCH, CONTEXT, STEPS + 8)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as running:
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
    """The engine's stages, torch's operations (callers below what they call), and on a GPU its kernels."""

    def bars(events) -> list[tuple[float, float]]:
        return list(zip((events["start"] - begin) * 1e3, events["duration"] * 1e3, strict=True))

    for stage, shade in zip(STAGES, ("0.75", "0.9") * 3, strict=True):
        axes.broken_barh(bars(trace.ranges[trace.ranges["name"] == stage]), (0.6, 0.8), color=shade)
    lower = {"torch": trace.cpu_ops} | ({"GPU": trace.kernels} if len(trace.kernels) else {})
    for place, events in enumerate(lower.values()):
        colours = [KINDS[kind_of(name)][0] for name in events["name"]]
        axes.broken_barh(bars(events), (-0.4 - place, 0.8), facecolors=colours, linewidth=0)
    axes.set(yticks=[1, *range(0, -len(lower), -1)], yticklabels=["engine", *lower], title=title, xlabel="time, ms")


recordings = {"framework": recorded(framework), "solution": recorded(solution)}
spans = {name: quickest_step(trace) for name, trace in recordings.items()}
longest = max(end - begin for begin, end in spans.values()) * 1e3
figure, panels = plt.subplots(2, 1, figsize=(10, 4.6), layout="constrained")
for axes, (name, trace) in zip(panels, recordings.items(), strict=True):
    begin, end = spans[name]
    draw(axes, trace, begin, f"{name}: a step of {(end - begin) * 1e3:.1f} ms, which the black line ends")
    axes.axvline((end - begin) * 1e3, color=BLACK)
    axes.set_xlim(0, longest)
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in KINDS.values()]
figure.legend(handles, KINDS, loc="outside lower center", ncols=len(KINDS), fontsize=9)
plt.show()

# %% [markdown]
# The same as tables: the time that operations take themselves, without those that they call. *Busy* is the share of the
# recording in which an operation (on a GPU: a kernel) ran. The profiler makes each operation longer, so the many small
# ones look worse here than they are.

# %%
totals = {}
for name, trace in recordings.items():
    own = trace.kernels if len(trace.kernels) else traces.self_times(trace)
    by_kind = own.groupby(own["name"].astype(str).map(kind_of))["duration"].sum().reindex(list(KINDS), fill_value=0.0)
    totals[name] = {
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
    print(name)
    display(table(pd.DataFrame(shown), {"calls a step": "{:.0f}", "µs a step": "{:,.0f}", "share": "{:.0%}"}))
totals = pd.DataFrame(totals).T
assert totals.loc["framework", "operations a step"] > 2 * totals.loc["solution", "operations a step"]
table(totals, {"operations a step": "{:,.0f}", "busy": "{:.0%}", **{f"{kind}, ms": "{:.2f}" for kind in KINDS}})

# %% [markdown]
# The fetches are by far the most calls. But a call of attention is dearer than a fetch, and those became fewer too: the
# framework attends for each sequence on its own, eight times a layer. With the sequences gathered side by side, one
# call serves all of them. The gather copies as much as before, and it pays twice.
#
# ### The ladder
#
# Three engines. All have the scheduler and the block tables of the solution; they differ in two parts only:
#
# | rung | attention | allocator |
# |---|---|---|
# | block by block | framework | free list |
# | one gather | solution | free list |
# | read in place | solution | buddies |
#
# Before anything is timed, the 24 requests come and go in each of them. In a memory that was never used even a free
# list hands out neighbours.

# %%
from module0_profiling.course.parts import Use, resolve
from phase0_prototype.engine import Engine
from phase0_prototype.loading import describe
from phase0_prototype.model import DecoderModel
from phase0_prototype.runner import Runner
from phase0_prototype.tokenizer import load_tokenizer
from phase1_memory.block_tables import BlockTables
from phase1_memory.kv_cache import PagedKVCache
from phase1_memory.scheduler import Scheduler


def part(name: str, who: str):
    """A module of this phase by one of its authors."""
    return resolve("phase1_memory", name, Use.parse(f"phase1={who}"))


def assemble(attention: str, allocator: str, settings, use) -> Engine:
    """The solution's engine with these two parts."""
    described = describe(settings, DecoderModel, part("attention", attention).PagedTorchAttention())
    described.load(lambda done, total: None)
    model, device = described.model, described.device
    tables = BlockTables(part("allocator", allocator).make_allocator(settings.num_blocks), PAGE)
    kv = PagedKVCache(model.kv_spec, tables, device)
    scheduler = Scheduler(kv, settings.max_num_batched_tokens, settings.max_seqs)
    rest = {"config": described.config, "tokenizer": load_tokenizer(described.directory), "max_model_len": ROW}
    return Engine(model, kv, scheduler, Runner(model, kv), **rest, device=device, seed=0)


RUNGS = {
    "block by block": ("framework", "framework"),
    "one gather": ("solution", "framework"),
    "read in place": ("solution", "solution"),
}
rungs = {name: engine(assemble=partial(assemble, *parts_of)) for name, parts_of in RUNGS.items()}
for llm in rungs.values():
    run_ours(llm, prompts, NEW)

# %% [markdown]
# **Predict** from two different sides.
#
# * *One gather*, eight sequences: the bytes stay, the calls go. If every operation costs the same, its launch, the gain
#   is the ratio of their numbers. (Views are left out: they move nothing.)
# * *Read in place*, one sequence of 900 tokens: the bytes go. A gathered cache is read, written and read again; in
#   place it is read. If bytes are all that counts, a step takes as long as the weights and those bytes.

# %%
LONG, ANSWER, ROUNDS = 900, 24, 3
calls = {name: reads_of_a_step(rungs[name], BATCH, CONTEXT) for name in ("block by block", "one gather")}
alone = {name: reads_of_a_step(llm, 1, LONG) for name, llm in rungs.items()}
cache, weights = pages(LONG + 3) * BLOCK_BYTES, solution.engine.model.weight_bytes
assert {name: reads.copied_bytes for name, reads in alone.items()} == {
    "block by block": cache,
    "one gather": cache,
    "read in place": 0,
}
predicted = {
    "one gather": calls["block by block"].total / calls["one gather"].total,
    "read in place": (weights + 3 * cache) / (weights + cache),
}


def decode_seconds(pair: dict[str, LLM], batch: int, context: int) -> dict[str, list[float]]:
    """Seconds of a decode step of each engine, a number a round; the engines take turns."""
    asked = random_prompts(config.vocab_size, [context] * batch)
    seconds = {name: [] for name in pair}
    for round_ in range(ROUNDS + 1):  # the first warms up
        for name, llm in list(pair.items())[:: 1 if round_ % 2 else -1]:
            per_step = run_ours(llm, asked, ANSWER).per_step
            seconds[name] += [per_step] * (round_ > 0)
    return seconds


def gain(seconds: dict[str, list[float]], below: str, above: str) -> float:
    """The median over the rounds of how many times faster `above` is."""
    return float(np.median([a / b for a, b in zip(seconds[below], seconds[above], strict=True)]))


steps_of_8 = decode_seconds({name: rungs[name] for name in calls}, BATCH, CONTEXT)
steps_of_1 = decode_seconds(rungs, 1, LONG)
measured = {
    "one gather": gain(steps_of_8, "block by block", "one gather"),
    "read in place": gain(steps_of_1, "one gather", "read in place"),
}
ladder = pd.DataFrame({"predicted x": predicted, "measured x": measured})
ladder.insert(0, "workload", [f"{BATCH} sequences of {CONTEXT} tokens", f"1 sequence of {LONG} tokens"])
assert measured["one gather"] > 1
table(ladder, {"predicted x": "{:.2f}", "measured x": "{:.2f}"})

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axes, seconds, title in zip(panels, (steps_of_8, steps_of_1), ladder["workload"], strict=True):
    medians = [float(np.median(values)) * 1e3 for values in seconds.values()]
    for place, height in enumerate(medians):
        style = {"color": (ORANGE, SKY, GREEN)[place], "hatch": plots.HATCHES[place], "edgecolor": BLACK}
        axes.bar_label(axes.bar(place, height, **style), fmt="%.2f")
    axes.set_xticks(range(len(seconds)), list(seconds))
    axes.set(ylabel="a decode step, ms", title=title)
    axes.margins(y=0.15)
plt.show()

# %% [markdown]
# Neither prediction knows what the other one counts. On a model this small a step is mostly calls, and its cache fits
# into the processor's own: there the bytes of the gather cost less than they would on a large model. The roofline shows
# the attention without the rest.
#
# ### The roofline of decode attention
#
# One layer with the heads of TinyLlama-1.1B (32 for queries, 4 for keys and values, 64 wide) and a cache of 32,768
# tokens: 32 sequences of 1,024, or a single one. All points stand at the same intensity, that of the work itself: every
# key and value read once. What a copy adds is not work, so it shows as height that is missing.
#
# **Predict.** A gather moves every byte three times. How high can its point be, at most?

# %%
from phase0_prototype.attention import AttentionSpec
from phase0_prototype.batch import Batch
from phase0_prototype.request import Request
from phase0_prototype.step import ScheduledRequest, Step

HEADS = AttentionSpec(32, 4, 64, 64**-0.5)
TOKENS = 32 * 1024
generator = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    """Numbers in the model's dtype, on its device."""
    return torch.randn(*shape, generator=generator).to(DEVICE, spec.dtype)


cache_of_layer = tuple(noise(TOKENS // PAGE, PAGE, HEADS.num_kv_heads, HEADS.head_dim) for _ in "kv")


def attention(who: str, batch: int, *, scattered: bool):
    """A function that attends for `batch` sequences, which have the whole cache among them."""
    backend, length = part("attention", who).PagedTorchAttention(), TOKENS // batch
    order = torch.randperm(TOKENS // PAGE, generator=generator) if scattered else torch.arange(TOKENS // PAGE)
    tables = [tuple(blocks) for blocks in order.view(batch, -1).tolist()]
    requests = [Request(str(i), [0] * length, SamplingParams(), 0, (), 1) for i in range(batch)]
    step = Step(tuple(ScheduledRequest(request, length - 1, 1) for request in requests))
    plan = backend.plan(Batch.build(step, tables, PAGE, torch.device(DEVICE)), frozenset({None}), PAGE)
    q = noise(batch, HEADS.num_heads, HEADS.head_dim)
    k, v = (noise(batch, HEADS.num_kv_heads, HEADS.head_dim) for _ in "kv")
    return lambda: backend.run(HEADS, q, k, v, cache_of_layer, plan)


variants = {
    "block by block, 32 x 1,024": (attention("framework", 32, scattered=True), 32),
    "one gather, 32 x 1,024": (attention("solution", 32, scattered=True), 32),
    "one gather, 1 x 32,768": (attention("solution", 1, scattered=True), 1),
    "read in place, 1 x 32,768": (attention("solution", 1, scattered=False), 1),
}
torch.set_num_threads(THREADS)  # these operations are large, and the roof is that of the whole machine
timings = interleave({name: run for name, (run, _) in variants.items()}, rounds=5, device=DEVICE)
peaks = hardware.measured_peaks(machine)
torch.set_num_threads(1)
roof = peaks.roof(dtype if dtype in peaks.matmul else next(iter(peaks.matmul)))
rows, points = {}, []
for name, (_, batch) in variants.items():
    shape = (HEADS.num_heads, HEADS.num_kv_heads, HEADS.head_dim, spec.dtype.itemsize)
    work, seconds = attention_costs.attention_decode(batch, TOKENS // batch, *shape), timings[name].best
    moved = work.bytes * (1 if "place" in name else 3)
    points.append(roofline.Point.measured(name, work, seconds))
    rows[name] = {
        "FLOP/byte": work.intensity,
        "MB needed": work.bytes / 1e6,
        "MB moved": moved / 1e6,
        "highest share of the roof": roof.seconds(work) / max(roof.seconds(work), moved / roof.bandwidth),
        "reached": roof.seconds(work) / seconds,
        "ms": seconds * 1e3,
    }
with tempfile.TemporaryDirectory() as folder:
    title = f"Decode attention over {TOKENS:,} tokens, peaks {peaks.source}"
    display(Image(plots.roofline_plot(points, [roof], Path(folder) / "roofline", title=title)[1].read_bytes()))
in_place = ratio(timings["one gather, 1 x 32,768"], timings["read in place, 1 x 32,768"])
print(f"read in place is {in_place:.1f} x as fast as one gather; bytes alone would make it 3 x")
assert in_place > 1
formats = {"FLOP/byte": "{:.1f}", "MB needed": "{:.0f}", "MB moved": "{:.0f}", "ms": "{:.2f}"}
table(pd.DataFrame(rows).T, {**formats, "highest share of the roof": "{:.0%}", "reached": "{:.1%}"})

# %% [markdown]
# About a third of the roof is the most that any gather can reach, however well it is written, unless the processor's
# own cache holds all of these bytes. Where even the point in place lies far below the roof, it is not the memory that
# holds it down but the library's attention: the gather's bytes are then a smaller part of a longer time.
#
# A batch always gathers here: its sequences do not lie at even distances, as rows do. Phase 3 writes kernels that
# follow the table while they attend; then nobody copies anything.

# %% [markdown]
# ## 3. What do eight answers to one prompt share?
#
# Eight continuations of a prompt of 100 tokens (`n=8`). Keys and values of the prompt are the same for all, so one copy
# will do, as long as nobody writes into it.
#
# **Predict**, for the framework, where each sequence has blocks of its own, and for the solution: how many tokens does
# the model compute before each of the eight has its first token, and how many blocks are taken then? How many when all
# have written one token more? A prompt of 100 tokens ends within its seventh block, at place 4 of 16.

# %%
N, PROMPT = 8, 100
(prompt,) = random_prompts(config.vocab_size, [PROMPT])
sampled = SamplingParams(temperature=1.0, n=N, seed=7, max_tokens=NEW, ignore_eos=True)


def branch(llm: LLM) -> tuple[dict[str, int], list[MemorySnapshot], list[list[int]]]:
    """Counts, the memory before and after the first write of the branches, and what they said."""
    kv, runner = llm.engine.kv, llm.engine.runner
    computed, copied, found = runner.forward_tokens, kv.copied_blocks, []
    llm.engine.add_request(prompt, sampled)
    llm.engine.step()
    computed = runner.forward_tokens - computed
    found.append(snapshot(llm.engine))
    taken = [kv.tables.num_blocks - kv.num_free]
    llm.engine.step()
    found.append(snapshot(llm.engine))
    taken.append(kv.tables.num_blocks - kv.num_free)
    while not (outputs := llm.engine.step()) or not outputs[0].finished:
        pass
    counts = dict(zip(("tokens computed", "blocks before", "blocks after"), (computed, *taken), strict=True))
    counts["blocks copied"] = kv.copied_blocks - copied
    counts["bytes copied"] = counts["blocks copied"] * kv.block_bytes
    return counts, found, [completion.token_ids for completion in outputs[0].outputs]


exact = {"dtype": "float32", "num_blocks": 64}  # so that rounding has no say in who draws which token
results = {name: branch(engine(name, **exact)) for name in ("framework", "solution")}
full, begun = divmod(PROMPT, PAGE)
reserved = pages(PROMPT + NEW)  # what the framework takes at once
wanted = {
    "framework": {"tokens computed": N * PROMPT, "blocks before": N * reserved, "blocks after": N * reserved},
    "solution": {"tokens computed": PROMPT, "blocks before": full + 1, "blocks after": full + N},
}
copies = {"framework": 0, "solution": N - 1}  # the last of the eight has the block to itself by then
for name, number in copies.items():
    wanted[name] |= {
        "blocks copied": number,
        "bytes copied": number * PAGE * SIDES * spec.num_kv_heads * spec.head_dim * 4,
    }
assert {name: counts for name, (counts, *_) in results.items()} == wanted and begun
said = [tokens for *_, tokens in results.values()]
assert said[0] == said[1] and len(set(map(tuple, said[0]))) > 1
print("every prediction is exact, and both engines say the same eight things")
print(f"{copies['solution']} blocks are copied so that {(N - 1) * PROMPT} tokens need not be computed")
pd.DataFrame(wanted)

# %%
before, after = results["solution"][1]
show(before, f"n={N}, the prompt is computed: {full + 1} blocks that all eight share")
show(after, f"every branch has written: {full} shared blocks, and one of its own for each")
assert [cell.references for cell in cells(before) if cell.references] == [N] * (full + 1)
assert sorted(cell.references for cell in cells(after) if cell.references) == [1] * N + [N] * full

# %% [markdown]
# Hatched blocks are shared. Before a branch writes its first token, the begun seventh block is shared like the six full
# ones. Then the first seven to write get copies of it; for the eighth nobody else is left, and it writes where it is.
# The six full blocks stay shared to the end, because nobody writes there again.

# %% [markdown]
# ## 4. What does it cost to run out of blocks?
#
# A dozen requests in a quarter of the blocks that they need at once. Nobody reserves for the worst case, so blocks run
# out between two tokens, and the youngest has to give up its own. Its keys and values can be
#
# * *recomputed*: dropped, and computed again from the tokens, which are known;
# * *swapped* to main memory and back;
# * swapped to a *file* and back, where main memory is short too.
#
# **Predict** the price of one token of the victim: a token through the model costs two FLOPs a weight; a token moved
# costs its bytes, out and in. At the rates of this machine, which is cheaper?

# %%
COUNT, GROW = 12, 48
crowd = random_prompts(config.vocab_size, [32 + 4 * i for i in range(COUNT)])
need = sum(pages(len(prompt) + GROW) for prompt in crowd)
scarce = max(need // 4, pages(len(crowd[-1]) + GROW) + 1)
plain = engine(dtype="float32", num_blocks=2 * need, max_model_len=scarce * PAGE)
wide = plain.engine.model.kv_spec  # of float32
parameters = plain.engine.model.weight_bytes / wide.dtype.itemsize
recompute_seconds = 2 * parameters / peaks.matmul.get("float32", roof.flops)
here = torch.zeros(1 << 26, dtype=torch.uint8, device=DEVICE)
there = torch.zeros(1 << 26, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
copying = interleave({"out": lambda: there.copy_(here)}, rounds=3, device=DEVICE)["out"].best / here.nbytes
swap_seconds = 2 * wide.bytes_per_token * copying  # out and in
print(f"{need} blocks are needed at once, {scarce} are there")
print(f"recompute a token: {2 * parameters / 1e6:.1f} MFLOP, at least {recompute_seconds * 1e6:.2f} µs")
print(f"swap a token: {2 * wide.bytes_per_token / 1e3:.1f} kB, at least {swap_seconds * 1e6:.2f} µs")
print(f"swapping is {recompute_seconds / swap_seconds:.1f} x cheaper, if nothing but FLOPs and bytes counts")


# %%
class Counted:
    """A store that counts what goes out and comes back."""

    def __init__(self, store) -> None:
        self.real, self.bytes_out, self.bytes_in = store, 0, 0
        self.prefetch, self.ready, self.drop = store.prefetch, store.ready, store.drop

    def save(self, key: str, blocks: torch.Tensor) -> bool:
        """See `OffloadStore`."""
        kept = self.real.save(key, blocks)
        self.bytes_out += blocks.nbytes * kept
        return kept

    def load(self, key: str) -> torch.Tensor | None:
        """See `OffloadStore`."""
        data = self.real.load(key)
        self.bytes_in += 0 if data is None else data.nbytes
        return data


def under_pressure(llm: LLM) -> tuple[dict[str, float], list[list[int]], MemorySnapshot]:
    """What a run cost, what was said, and the memory when the first victim had left."""
    scheduler, runner, seen = llm.engine.scheduler, llm.engine.runner, []
    if scheduler.store is not None:
        scheduler.store = Counted(scheduler.store)
    ids = [llm.engine.add_request(prompt, greedy(GROW)) for prompt in crowd]
    said, most, began = {}, 0, time.perf_counter()
    while llm.engine.has_unfinished():
        said |= {o.request_id: o.outputs[0].token_ids for o in llm.engine.step() if o.finished}
        most = max(most, len(scheduler.running))
        if scheduler.preemptions and not seen:
            seen.append(snapshot(llm.engine))
    costs = {
        "seconds": time.perf_counter() - began,
        "steps": runner.forward_passes,
        "most at once": most,
        "preemptions": scheduler.preemptions,
        "tokens through the model": runner.forward_tokens,
        "computed again": scheduler.recomputed_tokens,
        "MB out": scheduler.store.bytes_out / 1e6 if scheduler.store else 0.0,
        "MB in": scheduler.store.bytes_in / 1e6 if scheduler.store else 0.0,
    }
    if scheduler.store is not None:
        scheduler.store.real.close()
    return costs, [said[i] for i in ids], (seen or [snapshot(llm.engine)])[0]


tight = {"dtype": "float32", "num_blocks": scarce, "max_model_len": scarce * PAGE}
with tempfile.TemporaryDirectory() as folder:
    file = {"swap_bytes": 0, "offload_dir": folder, "offload_bytes": 1 << 26}
    crowded = {
        "plenty": under_pressure(plain),
        "recompute": under_pressure(engine(**tight)),
        "swap to memory": under_pressure(engine(**tight, preemption="swap")),
        "swap to a file": under_pressure(engine(**tight, preemption="swap", **file)),
    }
costs = pd.DataFrame({name: found for name, (found, *_) in crowded.items()}).T
spoken = [tokens for _, tokens, _ in crowded.values()]
assert all(tokens == spoken[0] for tokens in spoken), "running out of blocks changed a token"
assert costs.loc["plenty", "preemptions"] == 0 and (costs["preemptions"].drop("plenty") > 0).all()
again = costs["tokens through the model"] - costs.loc["plenty", "tokens through the model"]
assert (again == costs["computed again"]).all() and costs.loc["recompute", "computed again"] > 0
assert (costs["computed again"].filter(like="swap") == 0).all()
assert (costs["MB out"] == costs["MB in"]).all() and (costs["MB out"].filter(like="swap") > 0).all()
print(f"the same {COUNT * GROW} tokens four times")
lost = costs["seconds"] - costs.loc["plenty", "seconds"]
for name, floor in (
    ("recompute", costs.loc["recompute", "computed again"] * recompute_seconds),
    ("swap to memory", 2e6 * costs.loc["swap to memory", "MB out"] * copying),
):
    print(f"{name}: at least {floor * 1e3:.1f} ms at the rates above, {lost[name] * 1e3:.0f} ms slower than plenty")
formats = {"seconds": "{:.2f}", "MB out": "{:.2f}", "MB in": "{:.2f}"}
table(costs, {**dict.fromkeys(costs, "{:,.0f}"), **formats})

# %% [markdown]
# Who recomputes pays in tokens and in nothing else, who swaps pays in bytes; every byte that went out came back. That
# much is exact. Seconds are of this one run. Most of what is lost against plenty is neither tokens nor bytes: fewer
# sequences run together, so there are more steps, and on a model this small steps are what costs. On a large one the
# two prices count, and they grow apart: FLOPs a token with all of its weights, bytes with layers and heads only.
#
# This is the memory after the first victim has left (`recompute`). Letters are requests, small ones blocks that are not
# full yet:

# %%
print(terminal_map(crowded["recompute"][2], 80, colour=False))

# %% [markdown]
# ## 5. What becomes of the memory when a thousand requests grow in it?
#
# Now without a model, so that there can be a thousand requests: a simulator replays when they come, grow and end, and
# asks a policy for memory. The memory holds 800,000 tokens. The policies:
#
# * `max`: one run of 2,048 tokens for each, as phase 0 does it;
# * `oracle`: one run of exactly what a request will need in the end, which nobody knows;
# * `runs`: one run of a power of two of pages, doubled when it is full (and moved, where its neighbours are taken);
# * `pages`: what the engine does.
#
# **Predict.** `max` can serve 800,000 / 2,048 requests, whatever they need. For `pages` and `runs` the lengths say it
# all: round every request up to whole pages, or to a power of two of them, at every step of its life.

# %%
from phase1_memory import simulator_cases
from phase1_memory import traces as workloads
from phase1_memory.policies import power_of_two

SIZES = simulator_cases.Sizes(alive=1000, steps=1000)
simulations = simulator_cases.growing(("max", "oracle", "runs", "pages"), SIZES)

tokens_of, rounded, doubled = (np.zeros(SIZES.steps, np.int64) for _ in range(3))
for job in workloads.growing(0, SIZES.alive, SIZES.steps).jobs:
    life = slice(job.arrival, min(job.arrival + job.output, SIZES.steps))
    tokens = job.prompt + 1 + np.arange(life.stop - life.start)
    tokens_of[life] += tokens
    rounded[life] += PAGE * -(-tokens // PAGE)
    doubled[life] += PAGE * np.array([power_of_two(pages(int(count))) for count in tokens])
expected = {"pages": 1 - tokens_of.sum() / rounded.sum(), "runs": 1 - tokens_of.sum() / doubled.sum()}
found = {name: simulation.summary for name, simulation in simulations.items()}
most = simulator_cases.ROOMY.tokens // 2048
assert found["max"].largest_batch == most
print(f"max: {most} requests, as predicted")
for name, share in expected.items():
    print(f"{name}: {share:.2%} of what was given holds no token by the lengths, {found[name].fragmentation:.2%} found")
    assert abs(share - found[name].fragmentation) < 0.005
columns = ("mean_batch", "stored", "reserved", "internal", "external", "fragmentation", "copied_tokens", "pieces")
compared = pd.DataFrame({name: {key: getattr(s, key) for key in columns} for name, s in found.items()}).T
shown = dict.fromkeys(("stored", "reserved", "internal", "external", "fragmentation"), "{:.1%}")
table(compared, {**shown, "mean_batch": "{:,.0f}", "copied_tokens": "{:,.0f}", "pieces": "{:.2f}"})

# %%
with tempfile.TemporaryDirectory() as folder:
    three = {name: simulation for name, simulation in simulations.items() if name != "max"}
    simulator_cases.draw(three, Path(folder) / "growing")
    display(Image((Path(folder) / "growing-memory.png").read_bytes()))
assert found["pages"].fragmentation < 0.04 < found["runs"].fragmentation < found["max"].fragmentation
assert found["pages"].mean_batch > 2 * found["max"].mean_batch
assert found["oracle"].external > 0 == found["pages"].external

# %% [markdown]
# Rows of the longest length are full of what might come, and more than half of the requests wait. Even who knows the
# future can't run all of them: what a request needs in the end it does not need now, and the memory that is left lies
# in holes too small for the next (*external*). Runs that double take memory as they grow; a third of it holds nothing,
# and what is in the way has to move. Pages waste half of a block for each request, and that is all. With room around
# them, the buddy allocator keeps nearly every request in one piece besides.
#
# ## Your turn
#
# 1. `make start-phase1` copies the framework into `workspace/phase1_memory`.
# 2. Write the gather (task 1.5), or the fork (task 1.2); `make hint-phase1 TASK=1.5` helps.
# 3. Set `MINE` below to `"mine"`, restart the kernel and run this notebook again.
# 4. Before you run it: which of the numbers will change, and to what?

# %%
MINE = "framework"  # change to "mine"

mine = engine(MINE)
reads = reads_of_a_step(mine, BATCH, CONTEXT)
counts, _, tokens = branch(engine(MINE, **exact))
print(f"{MINE}: {'the same tokens as the solution' if tokens == said[1] else 'OTHER TOKENS than the solution'}")
print(f"operations that read the cache in a step: {reads.fetches.total():,}, the solution {SIDES}")
print(f"tokens computed for {N} answers: {counts['tokens computed']}, the solution {PROMPT}")
print(f"blocks then: {counts['blocks before']}, the solution {full + 1}")
