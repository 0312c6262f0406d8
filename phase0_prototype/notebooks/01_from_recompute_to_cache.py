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
# # From recomputing to a cache
#
# The framework of phase 0 gives right answers slowly. This notebook looks at why, and climbs from it to the
# solution one step at a time. Each step begins with a prediction: write down your own number before you run the
# cell below it.
#
# Everything is measured on the machine that runs the notebook, with the shipped model. A ratio compares two engines
# that took turns in one run. Times in the prose would be those of another machine, so there are none: the cells
# print them.

# %%
import os
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
import torch
from IPython.display import Image, display
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from module0_profiling import hardware, model_costs, model_shape, plots, roofline
from module0_profiling.notebooks import table
from module0_profiling.timing import interleave, ratio
from phase0_prototype.llm import LLM
from phase0_prototype.profile import profile_decode
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import random_prompts, run_ours

MODEL = "titan-tiny"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})


def engine(use: str, **settings) -> LLM:
    """An engine on the shipped model; operations are launched one by one unless `runner` says otherwise."""
    return LLM(MODEL, device=DEVICE, use=f"phase0={use}", **{"runner": "eager", "max_num_seqs": 1, **settings})


framework, solution = engine("framework"), engine("solution")
config, spec = solution.engine.config, solution.engine.model.kv_spec
machine = hardware.detect(DEVICE)
print(f"{machine.name}, {machine.units} {'SMs' if DEVICE == 'cuda' else 'cores'}, torch {torch.__version__}")
print(
    f"{MODEL}: {config.num_layers} layers, hidden {config.hidden_size}, "
    f"{solution.engine.model.weight_bytes / 1e6:.1f} MB of weights in {str(spec.dtype).removeprefix('torch.')}, "
    f"{spec.bytes_per_token:,} bytes of cache a token"
)

# %% [markdown]
# ## How many tokens go through the model?
#
# A prompt of one token, then *n* tokens generated. The framework keeps nothing: to make token *i* it runs all *i*
# tokens before it. The solution keeps the keys and values of each token and runs only the newest.
#
# **Predict.** How many tokens does each send through the model, for n = 8, 16, 32, 64?

# %%
LENGTHS = (8, 16, 32, 64)


def tokens_computed(llm: LLM, n: int) -> int:
    """Tokens that the model processes for n generated ones."""
    before = llm.engine.runner.forward_tokens
    run_ours(llm, random_prompts(config.vocab_size, [1]), n)
    return llm.engine.runner.forward_tokens - before


counted = pd.DataFrame(
    {
        "predicted n(n+1)/2": [n * (n + 1) // 2 for n in LENGTHS],
        "framework": [tokens_computed(framework, n) for n in LENGTHS],
        "predicted n": LENGTHS,
        "solution": [tokens_computed(solution, n) for n in LENGTHS],
    },
    index=pd.Index(LENGTHS, name="n"),
)
right = counted["predicted n(n+1)/2"].eq(counted["framework"]) & counted["predicted n"].eq(counted["solution"])
print("every prediction is exact" if right.all() else f"wrong at n = {list(counted.index[~right])}")
counted

# %% [markdown]
# A count is the same on every machine. That is why the gates of task 0.1 grade it before they grade a time.
#
# ## What does that do to the speed?
#
# **Predict.** Draw tokens/s over the length of the text, for both. Which curve is flat? Do the two meet anywhere?

# %%
NEW, ROUNDS = 96, 3


def step_seconds(llm: LLM, n: int) -> list[float]:
    """Seconds of each of n - 1 steps after a prompt of one token; step i has i + 2 tokens behind and in it."""
    llm.engine.add_request(
        random_prompts(config.vocab_size, [1])[0], SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    )
    seconds = []
    while llm.engine.has_unfinished():
        began = time.perf_counter()
        llm.engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


runs = {"framework": [], "solution": []}
for _ in range(ROUNDS):  # in turns, and the fastest round counts at each length: what disturbs one step hits one round
    runs["framework"].append(step_seconds(framework, NEW))
    runs["solution"].append(step_seconds(solution, NEW))
steps = pd.DataFrame({name: [min(at) for at in zip(*done, strict=True)] for name, done in runs.items()})
steps.index = pd.RangeIndex(2, NEW + 1, name="tokens")

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for (name, seconds), colour, marker in zip(steps.items(), (ORANGE, BLUE), "os", strict=True):
    axes.plot(steps.index, 1 / seconds.rolling(5, center=True).median(), color=colour, label=name)
    axes.plot(steps.index, 1 / seconds, marker, color=colour, markersize=3, alpha=0.4)
axes.set(xlabel="length of the sequence, tokens", ylabel="decode speed, tokens/s", ylim=(0, None))
axes.set(title="Speed over the generated length: dots are single steps, lines a median of five")
axes.legend()
plt.show()

ends = steps.iloc[[*range(5), *range(-5, 0)]].groupby([0] * 5 + [1] * 5).median()
for name in steps:
    print(f"{name}: a step at {NEW} tokens takes {ends[name][1] / ends[name][0]:.2f} x as long as one at the start")
print(f"at {NEW} tokens the solution is {ends['framework'][1] / ends['solution'][1]:.1f} x as fast a step")

# %% [markdown]
# The framework slows down with every token that it writes; the solution holds its speed (attention reads a little
# more of the cache each time, which at these lengths is hardly to be seen). The curves don't meet at the left edge
# either, where both compute two tokens: that part of the gap is not the cache, it is how many operations a step is
# made of.
#
# ## Where does a step's time go?
#
# The timeline shows decode steps of both engines. Every bar is one operation that torch ran, in the order in which
# it ran. White between the bars is Python: scheduling, building the batch, launching, sampling, text.
#
# **Expect** a wall of bars for the framework. **Look for** the share of white.

# %%
KINDS = {  # kind of operation -> colour, words in the names of its operations
    "products with weights": (BLUE, ("linear", "matmul", "::mm", "addmm", "gemm", "gemv", "nvjet", "cutlass")),
    "attention": (ORANGE, ("attention", "einsum", "bmm", "softmax", "masked_fill", "flash", "fmha")),
    "moving data": (GREEN, ("copy", "cat", "index", "repeat", "::to", "clone", "embedding", "chunk", "memcpy")),
    "all other": (PINK, ("",)),
}


def kind_of(name: str) -> str:
    """The first kind that has a word in the name."""
    return next(kind for kind, (_, words) in KINDS.items() if any(word in name.lower() for word in words))


def record(llm: LLM, context: int, count: int) -> list:
    """The profiler's events of some decode steps, each step inside an event named "step"."""
    request = llm.engine.add_request(
        random_prompts(config.vocab_size, [context])[0],
        SamplingParams(temperature=0, max_tokens=count + 4, ignore_eos=True),
    )
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    for _ in range(3):  # the prompt, and two steps to warm up
        llm.engine.step()
    with profile(activities=activities) as trace:
        for _ in range(count):
            with record_function("step"):
                llm.engine.step()
    llm.engine.abort(request)
    return list(trace.events())


def draw_timeline(axes, events: list, count: int, title: str) -> list[float]:
    """Bars of operations (and of kernels on a GPU) from the `count` quickest steps in a row on; ends of steps in ms."""
    step_events = [e for e in events if e.name == "step" and e.device_type == DeviceType.CPU]
    spans = [(e.time_range.start, e.time_range.end) for e in step_events]
    windows = list(zip(spans, spans[count - 1 :], strict=False))
    began = min(windows, key=lambda window: window[1][1] - window[0][0])[0][0]
    called = [e for e in events if not e.is_user_annotation and e.cpu_parent is not None]  # not the engine's own ranges
    rows = {"CPU": [e for e in called if e.cpu_parent.is_user_annotation]}
    if DEVICE == "cuda":
        rows["GPU"] = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    for row, found in enumerate(rows.values()):
        for kind, (colour, _) in KINDS.items():
            bars = [e.time_range for e in found if kind_of(e.name) == kind]
            places = [((bar.start - began) / 1e3, (bar.end - bar.start) / 1e3) for bar in bars]
            axes.broken_barh(places, (row - 0.4, 0.8), facecolor=colour, linewidth=0, label=None if row else kind)
    ends = [(end - began) / 1e3 for _, end in spans if end > began]
    axes.vlines([0, *ends], -0.6, len(rows) - 0.4, color=BLACK, linewidth=1)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), title=title, xlabel="time, ms")
    axes.grid(False)
    return ends


events = {"framework": record(framework, 64, 8), "solution": record(solution, 64, 32)}
figure, panels = plt.subplots(3, 1, figsize=(10, 6), layout="constrained")
width = draw_timeline(panels[0], events["framework"], 2, "framework: two decode steps")[1]
ends = draw_timeline(panels[1], events["solution"], 8, "solution: the same stretch of time, black lines end a step")
shortest = draw_timeline(panels[2], events["solution"], 1, "solution: one step, enlarged")[0]
for axes, right in zip(panels, (width, width, shortest), strict=True):
    axes.set_xlim(0, right)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize=9)
plt.show()
print(f"steps in {width:.1f} ms: framework 2, solution {sum(end <= width for end in ends)}")

# %% [markdown]
# The same as tables: the time inside each operation itself, without what it calls. *Busy* is the time inside
# operations over the time of a step without the profiler. The profiler makes every operation a little longer, so
# busy is an upper bound, most of all where operations are tiny.

# %%
profiles = {"framework": profile_decode(framework, steps=12), "solution": profile_decode(solution, steps=12)}


def top_operations(measured, count: int = 6) -> pd.DataFrame:
    """The slowest operations of a step."""
    total = sum(op.seconds for op in measured.operations)
    rows = [(op.name[:48], op.calls, op.seconds * 1e6, op.seconds / total) for op in measured.operations[:count]]
    return pd.DataFrame(rows, columns=["operation", "calls a step", "µs a step", "share"])


for name, measured in profiles.items():
    calls = sum(op.calls for op in measured.operations)
    print(f"{name}: {measured.wall * 1e3:.2f} ms a step, {calls:,.0f} calls of operations, busy {measured.busy:.0%}")
    formats = {"calls a step": "{:.0f}", "µs a step": "{:.0f}", "share": "{:.0%}"}
    display(table(top_operations(measured), formats))

# %% [markdown]
# The cache removed most of the *work* of a step. What is left is spread over many small operations, each of which
# costs its launch. So the next steps of the ladder are: fewer operations, more sequences for each of them, and no
# launches.
#
# ## The roofline
#
# A machine has two ceilings: bytes/s and FLOP/s. A step's *intensity* (FLOPs for each byte that it must move) says
# which of them is the nearer one. The points below are steps at one length: the framework runs the whole sequence
# as if it were a prompt, the solution runs one token, or one token for each of eight sequences.
#
# **Predict.** Which of the three has the highest FLOP/s? Which one is the best engine?

# %%
peaks = hardware.measured_peaks(machine)
dtype = str(spec.dtype).removeprefix("torch.")
roof = peaks.roof(dtype if dtype in peaks.matmul else next(iter(peaks.matmul)))
dims = model_shape.ModelShape(
    hidden=config.hidden_size,
    intermediate=config.intermediate_size,
    layers=config.num_layers,
    heads=config.num_heads,
    kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    vocab=config.vocab_size,
)
fmt = model_costs.Formats(dtype)
CONTEXT = NEW - 4  # the middle of the last eight steps measured above
eight = engine("solution", max_num_seqs=8)
prompts_of_8 = random_prompts(config.vocab_size, [CONTEXT - 8] * 8)
measured_steps = {
    "framework, 1 sequence": (model_costs.prefill_step(dims, 1, CONTEXT, fmt), steps["framework"].iloc[-8:].median()),
    "solution, 1 sequence": (model_costs.decode_step(dims, 1, CONTEXT, fmt), steps["solution"].iloc[-8:].median()),
    "solution, 8 sequences": (
        model_costs.decode_step(dims, 8, CONTEXT, fmt),
        min(run_ours(eight, prompts_of_8, 16).per_step for _ in range(ROUNDS)),
    ),
}
rows, points = {}, []
for name, (operations, seconds) in measured_steps.items():
    work, floor = model_costs.total(operations), model_costs.step_seconds(operations, roof)
    points.append(roofline.Point.measured(name, work, seconds))
    new_tokens = 8 if "8" in name else 1
    rows[name] = {
        "MFLOP": work.flops / 1e6,
        "MB": work.bytes / 1e6,
        "FLOP/byte": work.intensity,
        "GFLOP/s": work.flops / seconds / 1e9,
        "step, ms": seconds * 1e3,
        "floor, ms": floor * 1e3,
        "new tokens/s": new_tokens / seconds,
    }

with tempfile.TemporaryDirectory() as folder:
    title = f"Decode steps of {MODEL} at {CONTEXT} tokens, peaks {peaks.source}"
    _, png = plots.roofline_plot(points, [roof], Path(folder) / "roofline", title=title)
    display(Image(png.read_bytes()))
reached = pd.DataFrame(rows).T
table(reached, dict.fromkeys(reached, "{:,.3g}"))

# %% [markdown]
# The framework can stand *higher* on the roofline than the solution at one sequence, and yet is the slower engine:
# it does many FLOPs that nobody needs. The roofline rates how well work is done, not whether it had to be done. The
# column on the right is what counts. (A model this small fits into the last cache of many CPUs, so the memory's
# roof is not strictly above it; and all points lie far below it, as the timeline made us expect: launches take the
# time.)
#
# Eight sequences move nearly the same bytes as one, for eight tokens. That is what batching is for.
#
# ## The ladder
#
# Eight requests of eight tokens each are answered with a few tokens more. Each rung is measured against the rung
# below it, in turns; then it is the rung to beat.

# %%
PROMPTS, ANSWER = random_prompts(config.vocab_size, [8] * 8), 24
ladder = pd.DataFrame(columns=["tokens/s", "predicted x", "measured x", "spread"])


def whole(llm: LLM) -> None:
    """The workload of the ladder."""
    run_ours(llm, PROMPTS, ANSWER)


def climb(name: str, below: LLM, above: LLM, predicted: float) -> None:
    """Measure a rung against the one below it, and note both the prediction and the result."""
    timings = interleave({"below": lambda: whole(below), "above": lambda: whole(above)}, rounds=ROUNDS)
    tokens = len(PROMPTS) * ANSWER
    if ladder.empty:
        ladder.loc["framework"] = (tokens / timings["below"].median, float("nan"), 1.0, timings["below"].spread)
    gained = ratio(timings["below"], timings["above"])
    ladder.loc[name] = (tokens / timings["above"].median, predicted, gained, timings["above"].spread)
    print(f"{name}: predicted {predicted:.2f} x, measured {gained:.2f} x, {ladder.loc[name, 'tokens/s']:,.0f} tokens/s")


# %% [markdown]
# ### Rung 1: a KV cache
#
# To see the cache alone, this rung keeps the framework's three products for q, k and v, its two for gate and up,
# and the weights as they lie in the checkpoint. `Layers` is the seam: one method of it builds every linear layer of
# the model.

# %%
from phase0_prototype.attention import TorchAttention
from phase0_prototype.engine import Engine, build
from phase0_prototype.hub import resolve_model
from phase0_prototype.kv_cache import KVCache
from phase0_prototype.layers import Layers
from phase0_prototype.linear import Dense
from phase0_prototype.model import DecoderModel
from phase0_prototype.runner import Runner
from phase0_prototype.scheduler import Scheduler
from phase0_prototype.weights import load_weights


class Separate(torch.nn.ModuleList):
    """Linear layers that read the same input, one product after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, sum of outs]."""
        return torch.cat([layer(x) for layer in self], dim=-1) if len(self) > 1 else self[0](x)


class SeparateLayers(Layers):
    """One product for each matrix of the checkpoint."""

    def linear(self, name, parts, in_features, *, bias=False):
        """A linear layer for each part."""
        return Separate(super(SeparateLayers, self).linear(name, (part,), in_features, bias=bias) for part in parts)


def assemble_separate(settings, use) -> Engine:
    """The solution's engine around a model of separate, unpacked products."""
    whole, directory = build(settings, use), resolve_model(settings.model)
    config, device, length = whole.config, whole.device, whole.max_model_len
    layers = SeparateLayers(config, spec.dtype, device, TorchAttention(), length, Dense())
    model = DecoderModel(config, layers)
    load_weights(directory, model.destinations(), ignore=model.ignores)
    kv = KVCache(model.kv_spec, settings.max_num_seqs, length, device)
    scheduler = Scheduler(kv, settings.max_num_batched_tokens)
    rest = {"config": config, "tokenizer": whole.tokenizer, "max_model_len": length, "device": device, "seed": 0}
    return Engine(model, kv, scheduler, Runner(model, kv), **rest)


cached = engine("solution", assemble=assemble_separate)

# %% [markdown]
# **Predict**, from the framework alone: fit a straight line through its steps above, *a* + *b* · tokens. The
# framework pays it for 8, 9, 10 … tokens. With a cache it would pay it once for the prompt, and then for one token
# at a time.

# %%
slope, base = (
    torch.linalg.lstsq(  # seconds = base + slope * tokens
        torch.tensor([[float(n), 1.0] for n in steps.index], dtype=torch.float64),
        torch.tensor(steps["framework"].to_numpy(), dtype=torch.float64)[:, None],
    )
    .solution.flatten()
    .tolist()
)
without = sum(base + slope * (8 + i) for i in range(ANSWER))
with_cache = base + slope * 8 + (ANSWER - 1) * (base + slope)
print(f"a step of the framework: {base * 1e3:.2f} ms + {slope * 1e6:.0f} µs a token")
climb("KV cache", framework, cached, predicted=without / with_cache)

# %% [markdown]
# At a few tokens most of a step is *a*, so the cache gains little on this short workload; at the right end of the
# first plot it gained the most. A measured gain above the predicted one is not the cache: the solution's norms,
# rotary embedding and attention are single calls where the framework writes them out.
#
# ### Rung 2: fewer products, packed weights
#
# q, k and v become one product; so do gate and up. On a CPU with bfloat16 the weights are also packed once for the
# library that multiplies, instead of at each call.
#
# **Predict**: all operations cost about the same, their launch. So the gain is the ratio of their numbers.

# %%
from torch.utils._python_dispatch import TorchDispatchMode

from phase0_prototype.linear import OneDNNPacked


class Count(TorchDispatchMode):
    """Counts the operations that torch is asked for, views left out: they move and compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.total += not func.is_view
        self.products += name.endswith(("linear", "::mm", "addmm", "linear_pointwise", "packed_linear"))
        return func(*args, **(kwargs or {}))


def operations_of_a_step(llm: LLM) -> Count:
    """Counts of one decode step."""
    request = llm.engine.add_request(PROMPTS[0], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    llm.engine.step()
    with Count() as count:
        llm.engine.step()
    llm.engine.abort(request)
    return count


before = operations_of_a_step(cached)
fewer = config.num_layers * (3 - 1 + 2 - 1)  # products; each pair or triple also spares the `cat` behind it
after = before.total - fewer - config.num_layers * 2
left = before.products - fewer
print(f"{before.total} operations a step, {before.products} of them products; predicted {after} and {left}")
climb("fewer products", cached, solution, predicted=before.total / after)
found = operations_of_a_step(solution)
print(f"counted now: {found.total} operations, {found.products} products")
print(
    "packed: " + ("; ".join(OneDNNPacked.why_not(torch.device(DEVICE), spec.dtype)) or "yes, for bfloat16 on this CPU")
)

# %% [markdown]
# The prediction counts launches and knows nothing of the packed layout. What was measured beyond it is the time
# that the library no longer spends on putting the weights in order, call by call.
#
# ### Rung 3: batching
#
# One forward pass for all eight requests instead of eight.
#
# **Predict**: the model's part of a step is shared by all eight, what the engine does around it is not shared at
# all.

# %%
GREEDY = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)


def forward_share(llm: LLM, prompts: list[list[int]]) -> tuple[float, float]:
    """Median seconds of a decode step: in the model, and around it."""
    requests = [llm.engine.add_request(prompt, GREEDY) for prompt in prompts]
    runner, inside, steps = llm.engine.runner, [], []
    forward = runner.forward

    def timed(batch):
        began = time.perf_counter()
        logits = forward(batch)
        if logits.is_cuda:
            torch.cuda.synchronize()
        inside.append(time.perf_counter() - began)
        return logits

    runner.forward = timed
    try:
        while llm.engine.has_unfinished():
            began = time.perf_counter()
            llm.engine.step()
            steps.append(time.perf_counter() - began)
    finally:
        del runner.forward  # the method of the class is back
        for request in requests:
            llm.engine.abort(request)
    model = statistics.median(inside[1:])
    return model, statistics.median(steps[1:]) - model


in_model, around = forward_share(solution, PROMPTS[:1])
shared = 8 * (in_model + around) / (in_model + 8 * around)
print(f"of a step at batch 1, {in_model * 1e3:.2f} ms are in the model and {around * 1e3:.2f} ms around it")
climb("batch of 8", solution, eight, predicted=shared)
model_of_8, around_8 = forward_share(eight, PROMPTS)
print(f"at batch 8, {model_of_8 * 1e3:.2f} ms are in the model and {around_8 * 1e3:.2f} ms around it")

# %% [markdown]
# The two assumptions err in opposite directions. Eight rows are not free for the model, which multiplies and
# attends for each of them. And the engine samples and plans for all sequences at once, so the part around the model
# is shared too.
#
# ### Rung 4: no launches
#
# What is left between the bars of the timeline is Python that launches operations. On a CPU `torch.compile` fuses a
# decode step into a few C++ functions; on a GPU a CUDA graph replays all of a step's kernels with one call.
#
# **Predict** an upper bound: the model's part falls to its roofline, and what the engine does around it stays.

# %%
import sysconfig

from module0_profiling.gpu_tools import MissingTool, find_host_compiler


def why_not_compile() -> str:
    """The reason, in one line, why the last rung can't be climbed here; empty if it can."""
    if DEVICE == "cuda":
        return ""  # a CUDA graph needs no compiler
    try:
        find_host_compiler()
    except MissingTool as error:
        return str(error)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"{header} not found: install the headers of Python (Debian: python3-dev)"


floor = model_costs.step_seconds(model_costs.decode_step(dims, 8, 8 + ANSWER // 2, fmt), roof)
print(f"the roofline of a step at batch 8: {floor * 1e3:.2f} ms")
if reason := why_not_compile():
    print(f"NOT MEASURED HERE: {reason}")
else:
    runner = "cuda-graph" if DEVICE == "cuda" else "compile"
    compiled = engine("solution", max_num_seqs=8, runner=runner)
    began = time.perf_counter()
    whole(compiled)  # compiles, or captures
    print(f"the first run takes {time.perf_counter() - began:.1f} s")
    climb(runner, eight, compiled, predicted=(model_of_8 + around_8) / (floor + around_8))
    alone = engine("solution", max_num_seqs=1, runner=runner)
    run_ours(alone, PROMPTS[:1], ANSWER)
    timings = interleave(
        {n: lambda e=e: run_ours(e, PROMPTS[:1], ANSWER) for n, e in (("eager", solution), (runner, alone))}, rounds=3
    )
    print(f"one sequence: {runner} is {ratio(timings['eager'], timings[runner]):.2f} x as fast as eager")

# %% [markdown]
# The first run pays for compiling or capturing, once for each batch size and each 256 tokens of length: worth it
# for a server, not for one answer. For eight sequences the bound is out of reach on a CPU: each product is still a
# call of a library, which costs more than its arithmetic. For one sequence the compiler writes the products itself
# (`matvec.py`), and there is no library left to call.
#
# ### All rungs
#
# Tokens/s on a log axis. The line is where the prediction put a rung, given the rung below it.

# %%
speeds = ladder["tokens/s"]
left = speeds.min() / 3
figure, axes = plt.subplots(figsize=(8, 0.6 * len(ladder) + 1.4), layout="constrained")
axes.barh(range(len(ladder)), speeds - left, left=left, color=SKY, edgecolor=BLACK, linewidth=0.6)
for place, speed in enumerate(speeds):
    axes.text(left * 1.08, place, f"{speed:,.0f}", verticalalignment="center")
predicted = (speeds.shift() * ladder["predicted x"])[1:]
for place, speed in enumerate(predicted, start=1):
    axes.vlines(speed, place - 0.4, place + 0.4, color=RED, linewidth=3, label="predicted" if place == 1 else None)
axes.set(xscale="log", xlabel="8 requests, all their tokens: tokens/s", xlim=(left, 1.5 * max(*speeds, *predicted)))
axes.set_yticks(range(len(ladder)), ladder.index)
axes.invert_yaxis()
axes.grid(False, axis="y")
figure.legend(loc="outside upper right")
plt.show()
print(f"from the framework to the last rung: {speeds.iloc[-1] / speeds.iloc[0]:.1f} x")
table(ladder, {"tokens/s": "{:,.0f}", "predicted x": "{:.2f}", "measured x": "{:.2f}", "spread": "{:.0%}"})

# %% [markdown]
# ## Your turn
#
# 1. `make start-phase0` copies the framework into `workspace/phase0_prototype`.
# 2. Make `kv_cache.py` and `model.py` keep what they compute (task 0.1; `make hint-phase0 TASK=0.1` helps).
# 3. Set `MINE` below to `"mine"`, restart the kernel and run this notebook again. The cell says whether your tokens
#    are those of the solution, how many go through the model, and where your speed lies between the two.
# 4. Before you run it: how many tokens will your model compute for 64 generated ones? How many times faster will
#    that be?

# %%
MINE = "framework"  # change to "mine"

mine = engine(MINE)
prompt = random_prompts(config.vocab_size, [1])
expected, got = (run_ours(llm, prompt, 32).token_ids for llm in (solution, mine))
print(f"{MINE}: {'the same tokens as the solution' if got == expected else 'OTHER TOKENS than the solution'}")
print(f"through the model for 64 tokens: {tokens_computed(mine, 64):,}, the solution {counted.loc[64, 'solution']}")
timings = interleave(
    {n: lambda e=e: run_ours(e, prompt, 48) for n, e in (("mine", mine), ("solution", solution))}, rounds=3
)
print(f"the solution is {ratio(timings['mine'], timings['solution']):.2f} x as fast")
