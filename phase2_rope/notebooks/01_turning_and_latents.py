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
# # Turning and latents
#
# Between the product that makes a key and the cache that keeps it, two things can happen. The key is turned by an angle
# that says where its token stands. And in DeepSeek's models it is not kept at all: a latent is, from which the keys and
# values of all heads can be made. This notebook asks five things of that:
#
# 1. What is a turn, and what does a scaling do to it?
# 2. What must a turn move, and what does each version of the kernel move?
# 3. What does it cost on this machine?
# 4. What is a latent worth, and what does it cost to make keys of it at every step?
# 5. From how many new tokens on is it worth making them?
#
# Each part begins with a prediction, a number worked out from bytes and FLOPs. Write down your own before you run the
# cell. What is counted must come out exactly, on every machine, and the cells insist on it. What is timed is the
# machine's own: the cells print it, the prose does not.

# %%
import itertools
import math
import os
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
import torch
from IPython.display import Image, display
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from module0_profiling import attention_costs, costs, hardware, peak_measure, plots, roofline
from module0_profiling.course.parts import Use, resolve
from module0_profiling.gpu_tools import CompileError, MissingTool
from module0_profiling.notebooks import table
from module0_profiling.timing import clock_for, interleave, ratio
from phase0_prototype.batch import Batch
from phase0_prototype.config import RopeConfig
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.kernels import ladder
from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.step import ScheduledRequest, Step
from phase0_prototype.workloads import random_prompts, run_ours
from phase2_rope import mla, mla_cases, mla_checks, rope_cpu_cases, shapes
from phase2_rope.expanded import expanded
from phase2_rope.kernels import counts, rope
from phase2_rope.llm import LLM
from phase2_rope.rotary import Rotary
from phase2_rope.scaling import SCALINGS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.axisbelow": True})
torch.set_num_threads(1)  # where others work too, two threads wait for each other after every operation
ON_CPU = DEVICE == "cpu"  # what is this small is mostly launches on a GPU: there, times are printed and not insisted on
keep_freed_memory()  # as the engine's commands do: else a tensor of fresh pages is charged to whoever makes one


def part(name: str, who: str):
    """A module of this phase by one of its authors."""
    return resolve("phase2_rope", name, Use.parse(f"phase2={who}"))


def attempt(what: str, make):
    """What `make` returns; where a tool is missing, one line that says which, and None."""
    try:
        return make()
    except (MissingTool, CompileError) as error:
        print(f"{what}: NOT MEASURED HERE: {error}")
        return None


machine = hardware.detect(DEVICE)
print(f"{machine.name}, {machine.units} {'SMs' if DEVICE == 'cuda' else 'cores'}, torch {torch.__version__}")

# %% [markdown]
# ## 1. What is a turn?
#
# A head of D numbers is D/2 pairs, and a pair is the end of a clock's hand. A token at position *p* turns the hand of
# pair *i* by *p* · θ^(-2i/D). Below are some of the clocks of a head of 128 with θ = 10,000. In the upper row stand
# eight neighbours, in the lower row eight tokens that are 512 apart: the fast clocks tell neighbours apart, the slow
# ones passages.
#
# **Predict.** How many of the 64 hands have gone round at least once after 4,096 tokens? (2π · θ^(2i/D) ≤ 4096, so the
# logarithm says which *i*.) And what does the turn do to the score of two tokens that are three apart, here or 3,000
# tokens later?

# %%
D, THETA, CONTEXT = 128, 10000.0, 4096
default = Rotary(RopeConfig("default", THETA), D, CONTEXT + 1, torch.float32, CPU)
cos, sin = (side.numpy() for side in default.cos_sin.chunk(2, dim=-1))  # [positions, D/2] each

PAIRS, ROWS = (0, 8, 16, 24, 32, 48, 63), {"next to each other": range(8), "512 apart": range(0, 8 * 512, 512)}
figure, panels = plt.subplots(len(ROWS), len(PAIRS), figsize=(10, 3.4), layout="constrained")
for line, (name, positions) in zip(panels, ROWS.items(), strict=True):
    for axes, pair in zip(line, PAIRS, strict=True):
        axes.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.7"))
        for age, p in enumerate(positions):
            axes.plot([0, cos[p, pair]], [0, sin[p, pair]], color=BLUE, alpha=0.2 + 0.1 * age, linewidth=1 + age / 4)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal", title=f"pair {pair}")
        axes.set_ylabel(name if pair == 0 else "")
plt.show()


def turns_after(pair: float) -> float:
    """Tokens after which the hand of a pair has gone round once: its wavelength."""
    return 2 * math.pi * THETA ** (2 * pair / D)


def pair_of(wavelength: float) -> float:
    """The inverse."""
    return D / 2 * math.log(wavelength / (2 * math.pi)) / math.log(THETA)


predicted = math.floor(pair_of(CONTEXT)) + 1
rounds = np.unwrap(np.arctan2(sin, cos).astype(np.float64), axis=0)[-1] / (2 * math.pi)  # the table's hands, followed
found = int((rounds >= 1).sum())
assert found == predicted
print(f"a round of the first pair takes {turns_after(0):.1f} tokens, of the last {turns_after(D / 2 - 1):,.0f}")
print(f"{found} of {D // 2} hands went round within {CONTEXT:,} tokens, as predicted")

generator = torch.Generator().manual_seed(0)
query, key = torch.randn(2, D, generator=generator)


def score(at_query: int, at_key: int) -> float:
    """The product of the query and the key, turned for these positions by the engine's own code."""
    turned = []
    for x, position in ((query, at_query), (key, at_key)):
        q, k = x.clone().view(1, 1, D), torch.zeros(1, 1, D)
        turned.append(part("rope", "solution").rotate(q, k, *default(torch.tensor([position])))[0].double())
    return float((turned[0] * turned[1]).sum())


scores = [score(p + 3, p) for p in (2, 100, 3000)]
assert max(scores) - min(scores) < 1e-2 < abs(score(4, 2) - scores[0])
print("scores three tokens apart:", *(f"{s:.3f}" for s in scores), "and two apart:", f"{score(4, 2):.3f}")

# %% [markdown]
# That is the point of it: what a product of two turned vectors sees is their distance.
#
# ### The six types
#
# A model that was trained on 4,096 tokens has seen the fast pairs at every angle, and of the slow ones only a sector.
# Every scaling slows pairs down, so that a text four times as long stays within angles that are known. They differ in
# which pairs they slow. (The factors of `longrope` are searched and stand in the model's file; these are made up.)
#
# **Predict** from the same logarithm: how many pairs does each type leave as they are, and by how much does it slow the
# last one? `llama3` keeps wavelengths below a quarter of the context; `yarn` keeps pairs that go round more than 32
# times in it, up to a whole pair. `dynamic` makes θ so large that the last pair is slowed by factor · n / context -
# (factor - 1), here with n = 4 · context.

# %%
FACTOR, LENGTH = 4.0, 4 * CONTEXT
original = {"factor": FACTOR, "original_max_position_embeddings": CONTEXT}
PARAMETERS = {
    "default": {},
    "linear": {"factor": FACTOR},
    "dynamic": {"factor": FACTOR},
    "yarn": original,
    "llama3": {**original, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        **original,
        "short_factor": [1.0] * (D // 2),
        "long_factor": np.geomspace(1, 2 * FACTOR, D // 2).tolist(),
    },
}
EXPECTED = {  # type -> pairs that are kept, what the last one is slowed by
    "default": (D // 2, 1.0),
    "linear": (0, FACTOR),
    "dynamic": (1, FACTOR * LENGTH / CONTEXT - (FACTOR - 1)),
    "yarn": (math.floor(pair_of(CONTEXT / 32)) + 1, FACTOR),
    "llama3": (math.floor(pair_of(CONTEXT / 4)) + 1, FACTOR),
    "longrope": (1, 2 * FACTOR),
}
made = {
    name: SCALINGS[name](RopeConfig(name, THETA, values), D, CONTEXT, LENGTH) for name, values in PARAMETERS.items()
}
slowed = {name: (made["default"].inv_freq.double() / f.inv_freq.double()).numpy() for name, f in made.items()}
rows = {}
for name, (kept, last) in EXPECTED.items():
    same = int((abs(slowed[name] - 1) < 1e-6).sum())
    assert same == kept and math.isclose(slowed[name][-1], last, rel_tol=1e-4)
    rows[name] = {
        "pairs kept": same,
        "pairs slowed by the factor": int((abs(slowed[name] - FACTOR) < 1e-5).sum()),
        "last pair slowed by": slowed[name][-1],
        "scores grow by": made[name].attention_factor ** 2,
    }
print("every prediction is exact")
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for (name, values), colour, marker in zip(slowed.items(), plots.COLOURS, plots.MARKERS, strict=False):
    axes.plot(values, marker=marker, markevery=8, color=colour, label=name)
axes.axvline(pair_of(CONTEXT), color="0.6", linestyle="--", label="goes round once in the context")
axes.set(xlabel="pair", ylabel="slowed by", yscale="log", title=f"A text of {LENGTH:,} tokens, context {CONTEXT:,}")
axes.set_yticks([1, 2, 4, 8, 13], [1, 2, 4, 8, 13])
axes.minorticks_off()
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
plt.show()
table(pd.DataFrame(rows).T, {**dict.fromkeys(rows["yarn"], "{:.0f}"), "scores grow by": "{:.3f}"})

# %% [markdown]
# `linear` slows even the pairs that tell neighbours apart. `yarn` and `llama3` keep those, slow the ones that never
# went round, and differ in the ramp between. `dynamic` bends the whole curve, and goes further than the factor.
#
# ### Whose length?
#
# `dynamic` (and `longrope`) ask how long the text is. But keys of the cache stay as they were turned, and in a batch
# there are several lengths. The engine's rule: a token at position *p* of a prompt of *n* tokens is turned for the
# length max(n, p + 1).
#
# **Predict** what a context of 64, a factor of 4 and a prompt of 40 or 100 tokens mean for the last pair, token by
# token. What changes if the prompt is cut into chunks, or has a neighbour in its batch?

# %%
SHORT, END, PROMPTS = 64, 160, (40, 100)
by_length = Rotary(RopeConfig("dynamic", THETA, {"factor": FACTOR}), 16, 256, torch.float32, CPU, context=SHORT)


def batch_of(*pieces: tuple[int, int, int]) -> Batch:
    """A batch of (prompt length, first position, number of tokens)."""
    scheduled = []
    for prompt, start, count in pieces:
        request = Request(f"r{len(scheduled)}", [0] * prompt, SamplingParams(), 0, (), 1)
        request.output_token_ids = [0] * max(0, start + count - prompt)
        scheduled.append(ScheduledRequest(request, start, count))
    return Batch.build(Step(tuple(scheduled)), [tuple(range(16)) for _ in pieces], 16, CPU)


def turned_by(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tokens of a batch are turned by [T, R], and what their last pair is slowed by [T]."""
    places = by_length.places(batch)
    speed = by_length.inv_freqs[places[1], -1]
    return torch.cat(by_length(places), dim=-1)[:, 0], by_length.inv_freqs[0, -1] / speed


figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
for prompt, colour, style in zip(PROMPTS, (BLUE, ORANGE), ("-", "--"), strict=True):
    steps = [batch_of((prompt, 0, prompt)), *(batch_of((prompt, p, 1)) for p in range(prompt, END))]
    alone, slower = (torch.cat(parts) for parts in zip(*map(turned_by, steps), strict=True))
    lengths = torch.tensor([max(prompt, p + 1) for p in range(END)])
    expected = torch.where(lengths > SHORT, FACTOR * lengths / SHORT - (FACTOR - 1), 1.0)
    torch.testing.assert_close(slower, expected, rtol=1e-4, atol=0)
    chunks = [turned_by(batch_of((prompt, a, b - a), (120, 0, 30)))[0][: b - a] for a, b in ((0, 24), (24, prompt))]
    assert torch.equal(torch.cat(chunks), alone[:prompt])  # every bit
    axes.plot(slower, style, color=colour, label=f"prompt of {prompt} tokens")
axes.set(xlabel="position of the token", ylabel="last pair slowed by", title=f"dynamic, context {SHORT}")
axes.legend()
plt.show()
print("the rule holds for every token; chunks and neighbours change no bit")

# %% [markdown]
# A prompt is turned for its whole length, also its first token; whatever is generated then has a length of its own.
# `transformers` takes the longest of the batch instead, so there a neighbour changes the answer.
#
# ## 2. What must a turn move?
#
# q and k, read and written once. One row of cosines and sines, in float32, for all heads of a token; and its position.
# That is all: six FLOPs a pair are nothing beside it. The ladder of `rope.cu` needs no GPU to be counted: it is
# compiled for the CPU unchanged, and every address that a warp touches is recorded.
#
# **Predict** for a token of 8 + 2 heads of 128 in bfloat16: how many bytes does each version move, in whole sectors of
# 32 bytes, and how many times does a warp ask for memory? If every head fetches cosines and sines for itself, how many
# bytes are those beside q and k? The cell counts requests from lanes: 32 of them ask together, for 2 bytes each or 16.

# %%
CASE = counts.Case()  # 8 tokens of 8 + 2 heads of 128, bfloat16
PAIRS_OF_TOKEN = CASE.heads * CASE.rotated // 2
WARPS = 8  # of a block of 256 threads


def warps(lanes: int) -> int:
    """Requests of so many lanes: 32 ask together."""
    return -(-lanes // 32)


vectors = warps(PAIRS_OF_TOKEN // 8)  # a lane moves 8 numbers of x and of y at once
REQUESTS = {  # x and y in and out; cos and sin; the position
    "rope_naive": 4 * warps(PAIRS_OF_TOKEN) + 2 * warps(PAIRS_OF_TOKEN) + WARPS,
    "rope_shared": 4 * warps(PAIRS_OF_TOKEN) + 2 * warps(CASE.rotated // 2) + WARPS,
    "rope_vector": 4 * vectors + 2 * warps(CASE.rotated // 2) + WARPS,
    "rope_tokens": 4 * vectors + 2 * 2 + 1,  # one warp: 8 cosines are two requests of 16 bytes
    "rope_fast": 4 * warps((CASE.heads + CASE.k_heads) * 8) + 2 * 2 + 3,  # v too; position, block and place
    "kv_write": 4 * warps(2 * CASE.k_heads * 8) + 2,
}


def climb() -> pd.DataFrame:
    """What every version of the ladder moves for a token, predicted and counted; and is it right?"""
    rows = {}
    for version in ladder.read(rope.SOURCE):
        run = counts.emulate(rope.SOURCE, version.name, CASE, many_tokens=True)
        assert counts.error(run.results) <= 1, f"{version.name} is wrong"
        rows[version.name] = {
            "predicted bytes": counts.predicted_bytes(version.name, CASE) / CASE.tokens,
            "bytes": run.moved / CASE.tokens,
            "fewest": counts.minimum_bytes(version.name, CASE) / CASE.tokens,
            "over the fewest": run.moved / counts.minimum_bytes(version.name, CASE),
            "predicted requests": REQUESTS[version.name],
            "requests": run.requests / CASE.tokens,
        }
    return pd.DataFrame(rows).T


climbed = attempt("bytes and requests of the ladder", climb)
own_rows, data = CASE.heads * CASE.rotated * 4, 2 * CASE.heads * CASE.rotated * CASE.dtype.itemsize
print(f"cosines and sines for each head: {own_rows:,} bytes a token; q and k, in and out: {data:,}")
if climbed is not None:
    assert (climbed["predicted bytes"] == climbed["bytes"]).all()
    assert (climbed["predicted requests"] == climbed["requests"]).all()
    print("every prediction is exact")
    two = climbed.loc["rope_tokens", "bytes"] + climbed.loc["kv_write", "bytes"]
    print(f"turned and written in two launches: {two / climbed.loc['rope_fast', 'bytes']:.2f} x the bytes of one")
    display(table(climbed, {**dict.fromkeys(climbed, "{:,.0f}"), "over the fewest": "{:.2f}"}))
    figure, panels = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    shown = (("over the fewest", "bytes moved / fewest possible"), ("requests", "requests of a warp for a token"))
    for axes, (column, label), colour in zip(panels, shown, (SKY, ORANGE), strict=True):
        bars = axes.barh(climbed.index, climbed[column], color=colour, edgecolor=BLACK, linewidth=0.6)
        axes.bar_label(bars, [f"{value:.3g}" for value in climbed[column]], padding=3)
        axes.set(xlabel=label)
        axes.margins(x=0.15)
    panels[0].invert_yaxis()
    plt.show()

# %% [markdown]
# Sharing a row halves the bytes, nearly; vectors don't change the bytes and cut the requests to a quarter. The last
# step pays a few bytes again (a lane fetches the cosines that it needs itself, in two pieces that share a sector, which
# a cache answers) and gets rid of shared memory and of idle threads. Then the write joins in, and k is moved once.
#
# Times, where there is a GPU:

# %%
if DEVICE == "cuda":
    from module0_profiling.timing import graph_clock
    from phase2_rope import kernel_cases

    copy, rows = kernel_cases.copy_rate("cuda"), {}
    for tokens in (1, 64, 4096, 65536):
        large = counts.Case(tokens, 32, 8, 128, 128)
        timings = interleave(kernel_cases.subjects(large, "cuda", ()), device="cuda", clock=graph_clock("cuda"))
        for name, timing in timings.items():
            fewest = counts.minimum_bytes("rope_fast" if "write" in name or "fast" in name else "rope_tokens", large)
            rows.setdefault(name, {})[f"{tokens:,} tokens, µs"] = timing.median * 1e6
            rows[name][f"{tokens:,}, of a copy"] = fewest / timing.median / copy
        del timings
    timed = pd.DataFrame(rows).T
    display(table(timed, {name: "{:.0%}" if "copy" in name else "{:.1f}" for name in timed}))
else:
    print(
        "times of the kernels: NOT MEASURED HERE: they need an NVIDIA GPU; `python -m phase2_rope.kernels.rope` there"
    )

# %% [markdown]
# ## 3. What does a turn cost on this machine?
#
# torch has no operation that turns pairs in place. The framework writes the formula down: four products, two sums and a
# `cat`, for q and for k. The solution turns both where they lie, in four operations. The floor is a copy of q and k.
#
# **Predict.** Each operation reads and writes halves of heads. Add up: how many times does each version read or write
# all of q and k? A copy does it twice. What share of its speed can each version reach, if bytes are all that counts?

# %%
HEADS, KV_HEADS, DIM = 32, 4, 64  # TinyLlama-1.1B
WHO = ("framework", "solution")


def activation(tokens: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k and v as they come: views of one product's output; float32."""
    return torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM, device=device).split((HEADS, KV_HEADS, KV_HEADS), dim=1)


def quarter_turns(tokens: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """What `Rotary` gives, with quarter turns: they leave the size of numbers alone, however often they are made."""
    angles = torch.randint(4, (tokens, DIM // 2)) * (math.pi / 2)
    rows = torch.cat((angles.cos().round(), angles.sin().round()), dim=-1).to(device)
    if device == "cuda":
        return rows, torch.arange(tokens, device=device)
    first, second = rows.unsqueeze(1).chunk(2, dim=-1)
    return first, second


class Passes(TorchDispatchMode):
    """Counts operations that move numbers, and the numbers that they read or write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            read = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            touched = [x for x in (*read, out) if isinstance(x, torch.Tensor) and x.shape[1] > 1]  # not cos and sin
            self.numbers += sum(x.numel() for x in touched)
        return out


OPERATIONS = {"framework": 2 * (4 + 2 + 1), "solution": 4}
# halves of q and k, read + written: product 1 + 1, sum 2 + 1, cat 2 + 2, in-place product 1 + 1, product and sum 2 + 1
HALVES = {"framework": 4 * (1 + 1) + 2 * (2 + 1) + (2 + 2), "solution": (1 + 1) + (1 + 1) + (2 + 1) + (2 + 1)}
for who in WHO:
    (q, k, _), angles = activation(8), quarter_turns(8)
    with Passes() as passes:
        part("rope", who).rotate(q, k, *angles)
    assert passes.operations == OPERATIONS[who]
    assert passes.numbers * 2 == HALVES[who] * (q.numel() + k.numel())
    print(f"{who}: {passes.operations} operations read or write q and k {HALVES[who] / 2:.0f} times")
print("every prediction is exact")

# %% [markdown]
# Now the clock, on one thread as everything here: a decode of 128 sequences, whose q and k stay in the processor's
# cache, and a prompt of 3,072 tokens. The slopes of the roofline are copies of the same run.

# %%
AMOUNTS = (128, 3072)
passes_of = {who: HALVES[who] / 2 if ON_CPU or who == "framework" else 2 for who in WHO}  # a kernel's are two
rows, points, gains, copies = {}, [], {}, {}
for tokens in AMOUNTS:
    subjects, calls = {}, max(1, AMOUNTS[-1] // tokens)
    for who in WHO:
        q, k, _ = activation(tokens, DEVICE)
        subjects[who] = partial(part("rope", who).rotate, q, k, *quarter_turns(tokens, DEVICE))
    both = torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM, device=DEVICE)[:, : HEADS + KV_HEADS]
    subjects["copy"] = partial(torch.empty(both.shape, device=DEVICE).copy_, both)

    def often(subject, calls=calls) -> None:
        """One call is too short for the clock."""
        with torch.inference_mode():
            for _ in range(calls):
                subject()

    timings = interleave({name: partial(often, s) for name, s in subjects.items()}, rounds=9, device=DEVICE)
    gains[tokens] = ratio(timings["framework"], timings["solution"])
    copies[tokens] = 2 * both.numel() * 4 * calls / timings["copy"].best
    work = roofline.Work(6 * tokens * (HEADS + KV_HEADS) * DIM // 2, 2 * both.numel() * 4 + tokens * DIM * 4)
    for who in WHO:
        seconds = timings[who].best / calls
        points.append(roofline.Point.measured(f"{who}, {tokens:,} tokens", work, seconds))
        rows[points[-1].label] = {
            "µs": seconds * 1e6,
            "GB/s of the fewest bytes": work.bytes / seconds / 1e9,
            "highest share of a copy": 2 / passes_of[who],
            "share of a copy": ratio(timings["copy"], timings[who]),
            "FLOP/byte": work.intensity,
        }
clock, (in_cache, in_memory) = clock_for(DEVICE), copies.values()
rate = peak_measure.matmul_rate("float32", DEVICE, clock)  # with as many threads, now
roof = roofline.Roof(rate, in_memory, "float32")
with tempfile.TemporaryDirectory() as folder:
    look = {"title": "Turning q and k; slopes are copies", "levels": [("cache", in_cache)]}
    display(Image(plots.roofline_plot(points, [roof], Path(folder) / "roofline", **look)[1].read_bytes()))
bytes_say, calls_say = (of["framework"] / of["solution"] for of in (passes_of, OPERATIONS))
print(f"by bytes the solution should be {bytes_say:.2f} x as fast, by the number of operations {calls_say:.2f} x")
for tokens, gain in gains.items():
    print(f"{tokens:,} tokens: it is {gain:.2f} x as fast")
assert not ON_CPU or gains[AMOUNTS[-1]] > 1
formats = {"µs": "{:,.0f}", "GB/s of the fewest bytes": "{:.1f}", "FLOP/byte": "{:.2f}"}
table(pd.DataFrame(rows).T, {**dict.fromkeys(rows[points[0].label], "{:.0%}"), **formats})

# %% [markdown]
# All points stand at one intensity, far left of the ridge: the FLOPs are free. For the long prompt a pass is a pass,
# and the gain should be near that of the bytes. In the processor's cache passes are cheaper, and the number of
# operations has its say. No torch operator can do what one kernel does: read once, turn, write once.
#
# ## 4. What is a latent worth?
#
# **Predict.** DeepSeek-V3 has 128 heads with keys of 192 numbers and values of 128. It keeps a latent of 512 and a
# rotary key of 64. How many bytes a token and layer is either, in bfloat16?

# %%
from module0_profiling.model_costs import Formats, kv_bytes_per_token
from module0_profiling.model_shape import load_shape

V3 = mla_cases.V3
stored = {"DeepSeek-V3, if heads were kept": V3.num_heads * (V3.query + V3.value) * 2}
for name in ("llama3-405b", "llama3-8b", "deepseek-v3", "tinyllama-1.1b"):
    shape = load_shape(name)
    stored[name] = int(kv_bytes_per_token(shape, Formats("bfloat16")) / shape.layers)
assert stored["deepseek-v3"] == V3.entry * 2
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
bars = axes.barh(list(stored), list(stored.values()), color=[ORANGE, SKY, SKY, BLUE, SKY], edgecolor=BLACK)
axes.bar_label(bars, [f"{value:,}" for value in stored.values()], padding=3)
axes.set(xscale="log", xlabel="bytes of a token in one layer, bfloat16")
axes.margins(x=0.1)
axes.invert_yaxis()
plt.show()
heads = stored["DeepSeek-V3, if heads were kept"]
print(f"the latent is {heads / stored['deepseek-v3']:.1f} x smaller than what it stands for")

# %% [markdown]
# Now a model that keeps latents: two layers with the attention of DeepSeek-V2-Lite, 16 heads, and little else, random
# weights in float32. Framework and solution keep the same entries. The framework makes keys and values of them at every
# step; the solution carries W_UK over to the query, and W_UV behind the sum.
#
# **Predict** the bytes of a token in this cache, and whether both say the same.

# %%
SHAPE = {**shapes.V2_LITE_DENSE, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512}
SHAPE |= {"num_hidden_layers": 2, "first_k_dense_replace": 2}
BEHIND, LONGEST, PAGE = 512, 640, 16


def engine(path: Path, use: str, **settings) -> LLM:
    """An engine; operations are launched one by one."""
    fixed = {"device": DEVICE, "dtype": "float32", "runner": "eager", "max_model_len": LONGEST, "num_blocks": 80}
    return LLM(str(path), use=use, **{**fixed, "max_num_seqs": 8, **settings})


def said(llm: LLM) -> list[list[int]]:
    """What an engine says to five prompts of several lengths at once, drawn from its probabilities."""
    asked = random_prompts(SHAPE["vocab_size"], [1, 15, 16, 40, 77])
    drawn = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    ids = [llm.engine.add_request(prompt, SamplingParams(seed=i, **drawn)) for i, prompt in enumerate(asked)]
    done = {}
    while llm.engine.has_unfinished():
        done |= {out.request_id: out.outputs[0].token_ids for out in llm.engine.step() if out.finished}
    return [done[i] for i in ids]


with shapes.checkpoint(SHAPE, "float32") as path:
    engines = {who: engine(path, f"phase2={who}") for who in WHO}
spec, kv = engines["solution"].engine.config.latent, engines["solution"].engine.model.kv_spec
predicted = SHAPE["num_hidden_layers"] * (spec.latent + spec.rope) * 4
assert {llm.engine.model.kv_spec.bytes_per_token for llm in engines.values()} == {predicted}
answers = {who: said(llm) for who, llm in engines.items()}
assert answers["framework"] == answers["solution"]
words = {token for answer in answers["solution"] for token in answer}
assert len(words) > 10
print(f"a token has {predicted:,} bytes in this cache, as predicted; as heads it would have", end=" ")
print(f"{SHAPE['num_hidden_layers'] * spec.num_heads * (spec.query + spec.value) * 4:,}")
print(f"framework and solution say the same, in {len(words)} different tokens")

# %% [markdown]
# ### Where a step's time goes
#
# A decode step behind 512 tokens, for both.
#
# **Predict** the share of expanding. For each cached token and head it is L (P + V) multiply-adds, attention is
# P + R + V. Grey is what the engine does, below it is what torch does for it.

# %%
KINDS = {"expanding": ORANGE, "attention": BLUE, "absorbing": SKY, "products with weights": GREEN, "all other": PINK}
EXPANDS = ("aten::matmul", "aten::mm", "aten::copy_", "aten::fill_")
STAGES = ("schedule", "prepare", "forward", "sample", "finish", "detokenise")
STEPS = {"framework": 6, "solution": 24}


def kind_of(event) -> str:
    """What an operation is for, by its name and the shape of its first input."""
    name, shape = event.name.lower(), (event.input_shapes or [[]])[0]
    if "attention" in name or "softmax" in name:
        return "attention"
    if event.name in EXPANDS and shape and shape[0] > BEHIND:  # a row for each cached token
        return "expanding"
    if "bmm" in name:
        return "absorbing"
    return "products with weights" if any(w in name for w in ("::mm", "matmul", "linear", "addmm")) else "all other"


def start(llm: LLM, batch: int, tokens: int) -> list[str]:
    """Requests whose prompts are computed and that decode from here on."""
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    asked = random_prompts(SHAPE["vocab_size"], [BEHIND] * batch)
    requests = [llm.engine.add_request(prompt, greedy) for prompt in asked]
    for _ in range(4):  # the prompts, and steps to warm up
        llm.engine.step()
    return requests


def stop(llm: LLM, requests: list[str]) -> None:
    """Forget requests that `start` began."""
    for request in requests:
        llm.engine.abort(request)


def recorded(llm: LLM, steps: int) -> list:
    """The profiler's events of some decode steps, with shapes."""
    requests = start(llm, 1, steps + 8)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities, record_shapes=True) as trace:
        for _ in range(steps):
            llm.engine.step()
    stop(llm, requests)
    return [event for event in trace.events() if not event.name.startswith(("ProfilerStep", "USDT"))]


def steps_of(events: list) -> list[tuple[float, float]]:
    """Begin and end of each step, in µs."""
    named = {name: [e.time_range for e in events if e.name == name] for name in (STAGES[0], STAGES[-1])}
    named = {name: sorted(found, key=lambda r: r.start) for name, found in named.items()}
    return [(a.start, b.end) for a, b in zip(*named.values(), strict=True)]


def draw(axes, events: list, begin: float, title: str) -> None:
    """The engine's stages, torch's operations (callers below what they call), and on a GPU its kernels."""

    def bars(found) -> list[tuple[float, float]]:
        return [((e.time_range.start - begin) / 1e3, (e.time_range.end - e.time_range.start) / 1e3) for e in found]

    for stage, shade in zip(STAGES, ("0.75", "0.9") * 3, strict=True):
        axes.broken_barh(bars(e for e in events if e.name == stage and on_cpu(e)), (0.6, 0.8), color=shade)
    found = sorted((e for e in events if is_operation(e) and on_cpu(e)), key=lambda e: e.time_range.start)
    axes.broken_barh(bars(found), (-0.4, 0.8), facecolors=[KINDS[kind_of(e)] for e in found], linewidth=0)
    kernels = [e for e in events if not on_cpu(e) and not e.is_user_annotation]
    axes.broken_barh(bars(kernels), (-1.4, 0.8), color="0.5", linewidth=0)
    ticks = {"engine": 1, "torch": 0} | ({"GPU": -1} if kernels else {})
    axes.set(yticks=list(ticks.values()), yticklabels=list(ticks), title=title, xlabel="time, ms")


def on_cpu(event) -> bool:
    """Whether it ran on the host."""
    return event.device_type == DeviceType.CPU


def is_operation(event) -> bool:
    """Whether it is torch's, not a range of the engine's own or a call of the driver."""
    return not event.is_user_annotation and event.name.startswith("aten::")


recordings = {who: recorded(engines[who], steps) for who, steps in STEPS.items()}
spans = {who: min(steps_of(events), key=lambda step: step[1] - step[0]) for who, events in recordings.items()}
figure, panels = plt.subplots(3, 1, figsize=(10, 6.4), layout="constrained")
lengths = {who: (end - begin) / 1e3 for who, (begin, end) in spans.items()}
widest = max(lengths.values())
views = [("framework", spans["framework"][0], widest, f"a step of {widest:.1f} ms")]
views.append(("solution", steps_of(recordings["solution"])[0][0], widest, "as much time"))
views.append(
    ("solution", spans["solution"][0], lengths["solution"], f"a step of {lengths['solution']:.1f} ms, enlarged")
)
for axes, (who, begin, right, what) in zip(panels, views, strict=True):
    draw(axes, recordings[who], begin, f"{who}: {what}")
    axes.set_xlim(0, right)
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
figure.legend(handles, KINDS, loc="outside lower center", ncols=len(KINDS), fontsize=9)
plt.show()

# %% [markdown]
# As tables: time in operations themselves, without those that they call. *Busy* is its share of the recording.

# %%
totals = {}
for who, events in recordings.items():
    operations, steps = [e for e in events if is_operation(e) and on_cpu(e)], STEPS[who]
    by_kind, by_name = dict.fromkeys(KINDS, 0.0), {}
    for event in operations:
        micros = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
        by_kind[kind_of(event)] += micros / steps
        calls, spent = by_name.get((event.name, kind_of(event)), (0, 0.0))
        by_name[event.name, kind_of(event)] = (calls + 1, spent + micros)
    spent = sum(by_kind.values())
    whole = sum(end - begin for begin, end in steps_of(events)) / steps
    totals[who] = {"calls of torch a step": len(operations) / steps, "busy": spent / whole}
    totals[who] |= {f"{kind}, ms": micros / 1e3 for kind, micros in by_kind.items()}
    totals[who]["share of expanding"] = by_kind["expanding"] / spent
    top = sorted(by_name.items(), key=lambda item: -item[1][1])[:6]
    shown = [(name[:40], kind, n / steps, t / steps, t / steps / spent) for (name, kind), (n, t) in top]
    print(who)
    formats = {"calls a step": "{:.0f}", "µs a step": "{:,.0f}", "share": "{:.0%}"}
    display(table(pd.DataFrame(shown, columns=["operation", "what for", *formats]), formats))
totals = pd.DataFrame(totals).T
through = spec.latent * (spec.nope + spec.value)
print(
    f"of the attention's FLOPs {through / (through + spec.query + spec.value):.1%} are expanding, by the shapes;",
    end=" ",
)
print(f"of all time in operations {totals.loc['framework', 'share of expanding']:.0%} were, in this run")
assert totals.loc["framework", "share of expanding"] > (0.5 if ON_CPU else 0)
assert totals.loc["solution", "share of expanding"] == 0
formats = {"calls of torch a step": "{:,.0f}", "busy": "{:.0%}", "share of expanding": "{:.0%}"}
table(totals, {**dict.fromkeys(totals, "{:.2f}"), **formats})

# %% [markdown]
# The framework's step is making keys and values: one product a layer, and copies of what came out of it. In the
# solution's step no single operation stands out.
#
# ### The ladder
#
# Three engines that differ in two parts only.
#
# | rung | attention over latents | turn |
# |---|---|---|
# | expanded | framework | framework |
# | absorbed | solution | framework |
# | turned in place | solution | solution |
#
# **Predict** from two sides. *Absorbed*: the FLOPs of a step, of all its products. *Turned in place*: FLOPs and bytes
# don't matter for one token, so if every operation costs the same, the gain is the ratio of their numbers.

# %%
from phase1_memory import engine as paged
from phase2_rope.deepseek import ARCHITECTURES
from phase2_rope.layers import RopeLayers


def assemble(attention: str, turn: str, settings, use):
    """The solution's engine with these two parts."""
    layers = partial(RopeLayers, rope=part("rope", turn), mla=part("mla", attention))
    return paged.build(settings, use, layers=layers, architectures=ARCHITECTURES)


RUNGS = {
    "expanded": ("framework", "framework"),
    "absorbed": ("solution", "framework"),
    "turned in place": ("solution", "solution"),
}
ROUNDS, NEW = 5, 16
with shapes.checkpoint(SHAPE, "float32") as path:
    rungs = {name: engine(path, "phase2=solution", assemble=partial(assemble, *parts)) for name, parts in RUNGS.items()}


def counts_of_a_step(llm: LLM) -> tuple[float, int]:
    """FLOPs of products, and operations, of a decode step."""
    requests = start(llm, 1, 16)
    flops = mla_checks.flops(llm.engine.step)
    with rope_cpu_cases.Operations() as operations:
        llm.engine.step()
    stop(llm, requests)
    return flops, operations.count


counted = {name: counts_of_a_step(llm) for name, llm in rungs.items()}
names = list(RUNGS)
predicted = {
    "absorbed": counted["expanded"][0] / counted["absorbed"][0],
    "turned in place": counted["absorbed"][1] / counted["turned in place"][1],
}
prompts, seconds = random_prompts(SHAPE["vocab_size"], [BEHIND]), defaultdict(list)
for round_ in range(ROUNDS + 1):  # the first warms up
    for name in names[:: 1 if round_ % 2 else -1]:
        per_step = run_ours(rungs[name], prompts, NEW).per_step
        seconds[name] += [per_step] * (round_ > 0)
rows = {}
for below, name in itertools.pairwise([None, *names]):
    rows[name] = {
        "MFLOP a step": counted[name][0] / 1e6,
        "operations": counted[name][1],
        "ms": float(np.median(seconds[name])) * 1e3,
        "predicted x": predicted.get(name, math.nan),
        "measured x": float(np.median([a / b for a, b in zip(seconds[below], seconds[name], strict=True)]))
        if below
        else math.nan,
    }
steps = pd.DataFrame(rows).T
assert predicted["absorbed"] > 20 and predicted["turned in place"] > 1
assert not ON_CPU or steps.loc["absorbed", "measured x"] > 2
figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
bars = axes.barh(names, steps["ms"], color=(ORANGE, SKY, GREEN), hatch=plots.HATCHES[:3], edgecolor=BLACK)
axes.bar_label(bars, fmt="%.2f", padding=3)
axes.set(xlabel=f"a decode step behind {BEHIND} tokens, ms")
axes.margins(x=0.12)
axes.invert_yaxis()
plt.show()
table(steps, {"MFLOP a step": "{:,.0f}", "operations": "{:,.0f}", **dict.fromkeys(steps.columns[2:], "{:.2f}")})

# %% [markdown]
# Absorbing takes nearly all FLOPs away and gains less than that: a product of one row reads every weight to use it
# once, a large product uses it many times; and the step's many small operations stay. The next rung removes some of
# those. It can't gain as much as their number says, because they were the small ones; in front of the framework's step
# nobody would have seen it.
#
# ## 5. From how many new tokens on is it worth making keys?
#
# Expanding costs L (P + V) multiply-adds for each of *n* tokens, once for all queries. Absorbing costs that for each of
# *q* queries, and makes each pair of query and key dearer: 2 L + R in place of P + R + V.
#
# **Predict.** If n is large, what is q at the break-even? And with n = 1,024, where new tokens see only what is before
# them?

# %%
spec, KEYS = mla_checks.V2_LITE, 1024


def multiply_adds(form: str, q: int, n: int) -> float:
    """Of the last q tokens of a sequence of n, one head."""
    pairs = q * n - q * (q - 1) / 2  # each sees itself and what is before it
    if form == "absorbed":
        return q * through + pairs * (2 * spec.latent + spec.rope)
    return n * through + pairs * (spec.nope + spec.rope + spec.value)


def absorb(q: int, n: int) -> bool:
    """Whether absorbing is less."""
    return multiply_adds("absorbed", q, n) < multiply_adds("expanded", q, n)


assert all(absorb(q, KEYS) == mla.absorbing_is_less(spec, q, KEYS) for q in range(1, KEYS + 1))
limit = through / (2 * spec.latent - spec.nope - spec.value)
by_flops = next(q for q in range(1, KEYS + 1) if not absorb(q, KEYS))
assert by_flops <= limit and math.ceil(limit) == next(q for q in range(1, 10**6) if not absorb(q, 10**8))
print(f"by FLOPs absorbing is less below {limit:.1f} new tokens if n is large, below {by_flops} if n is {KEYS:,}")

# %%
NEW_TOKENS = (1, 8, 32, 64, 128, 256, 512)
entries = torch.randn(KEYS, spec.entry, generator=generator).to(DEVICE)
up = torch.randn(spec.num_heads, spec.nope + spec.value, spec.latent, generator=generator).to(DEVICE)
up *= spec.latent**-0.5
FORMS = {"absorbed": mla.absorbed, "expanded": expanded}
taken, measured = defaultdict(list), []
for new in NEW_TOKENS:
    q = torch.randn(new, spec.num_heads, spec.query, generator=generator).to(DEVICE)
    with torch.inference_mode():
        said_by = [form(spec, q, entries, up) for form in FORMS.values()]
        torch.testing.assert_close(*said_by, rtol=1e-3, atol=1e-3)
        timings = interleave({n: partial(f, spec, q, entries, up) for n, f in FORMS.items()}, rounds=5, device=DEVICE)
    for name, timing in timings.items():
        taken[name].append(timing.median * 1e3)
    measured.append((new, ratio(timings["expanded"], timings["absorbed"])))
crossing = mla_cases.crossing_of(measured)
flops_say = [multiply_adds("expanded", q, KEYS) / multiply_adds("absorbed", q, KEYS) for q in NEW_TOKENS]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for (name, values), colour, marker in zip(taken.items(), (BLUE, ORANGE), "os", strict=True):
    left.plot(NEW_TOKENS, values, marker + "-", color=colour, label=name)
left.set(xscale="log", yscale="log", xlabel="new tokens", ylabel="ms", title=f"Attention of one layer, {KEYS:,} tokens")
right.plot(NEW_TOKENS, flops_say, "--", color=BLACK, label="by FLOPs")
right.plot(NEW_TOKENS, [r for _, r in measured], "D-", color=GREEN, label="measured")
right.axhline(1, color="0.6")
right.axvline(by_flops, color="0.6", linestyle=":")
right.set(xscale="log", yscale="log", xlabel="new tokens", ylabel="expanded / absorbed", title="Absorbed is faster by")
for axes in (left, right):
    axes.set_xticks(NEW_TOKENS, NEW_TOKENS)
    axes.set_xticks([], minor=True)
    axes.legend()
plt.show()
where = "beyond what was measured" if crossing is None else f"at {crossing:.0f} new tokens"
print(f"the two forms are equally fast {where}; by FLOPs at {by_flops}")
assert not ON_CPU or measured[0][1] > 1 > measured[-1][1]

# %% [markdown]
# Both forms say the same, and at the ends each wins where the FLOPs say so. In between they need not cross where the
# FLOPs do: the forms multiply different shapes, at different rates. (A single new token goes yet another way in the
# engine: its heads become the rows of one product. The next table has that.)
#
# ### The backends
#
# The framework always expands; the solution asks. **Predict** the FLOPs of both, exactly. Two things that a count of
# multiply-adds leaves out: torch multiplies masked pairs too, and it wants values as wide as keys. So a pair costs
# 2 (P + R) expanded and 2 (L + R) absorbed.

# %%
CASES = ((1023, 1), (1016, 8), (928, 96), (768, 256), (0, 512))  # tokens before, new ones: whole pages together


def torch_flops(form: str, before: int, new: int) -> int:
    """What torch multiplies and adds for one sequence, all heads."""
    n = before + new
    tokens, width = (new, spec.latent + spec.rope) if form == "absorbed" else (n, spec.nope + spec.rope)
    return 2 * spec.num_heads * (tokens * through + new * n * 2 * width)


rows = {}
for before, new in CASES:
    chosen = "absorbed" if absorb(new, before + new) else "expanded"
    expected = {"framework": torch_flops("expanded", before, new), "solution": torch_flops(chosen, before, new)}
    work = mla_checks.Work(spec, ((before, new),))
    assert {who: mla_checks.flops(work.call(part("mla", who))) for who in WHO} == expected
    here = mla_checks.Work(spec, ((before, new),), device=torch.device(DEVICE))
    timings = interleave({who: here.call(part("mla", who)) for who in WHO}, rounds=5, device=DEVICE)
    rows[f"{new} new behind {before:,}"] = {
        "solution": chosen,
        "framework, MFLOP": expected["framework"] / 1e6,
        "solution, MFLOP": expected["solution"] / 1e6,
        "predicted x": expected["framework"] / expected["solution"],
        "measured x": ratio(timings["framework"], timings["solution"]),
        "framework, ms": timings["framework"].median * 1e3,
        "solution, ms": timings["solution"].median * 1e3,
    }
print("every prediction is exact")
backends = pd.DataFrame(rows).T
assert not ON_CPU or (backends["measured x"].iloc[:2] > 1.5).all()
formats = {"solution": "{}", "framework, MFLOP": "{:,.0f}", "solution, MFLOP": "{:,.0f}"}
table(backends, {**dict.fromkeys(backends, "{:.2f}"), **formats})

# %% [markdown]
# ### The roofline of a decode
#
# One query behind 1,023 tokens, both points. The framework's bytes are those of its way: it reads latents and W_UK,
# W_UV, writes keys and values, and reads them again. The solution reads latents and weights. The roof is that of one
# thread, measured now.
#
# **Predict** which of the two stands further to the right, which one higher, and which is the better engine.

# %%
H, before, new, size = spec.num_heads, *CASES[0], 4
latent = attention_costs.mla_absorbed(1, new, H, spec.latent, spec.rope, size, prefix=before)
heads = attention_costs.mla_expanded(1, new, H, spec.nope, spec.rope, spec.value, size, prefix=before)
work = {
    "framework": costs.linear(before + new, spec.latent, H * (spec.nope + spec.value), size) + heads,
    "solution": costs.batched_linear(new, H, spec.nope, spec.latent, size)
    + latent
    + costs.batched_linear(new, H, spec.latent, spec.value, size),
}
for who, form in (("framework", "expanded"), ("solution", "absorbed")):  # module 0 counts what this notebook counted
    assert work[who].flops == 2 * H * multiply_adds(form, new, KEYS)
buffer = torch.randn(1 << 26, device=DEVICE)
bandwidth = peak_measure.read_bandwidth(buffer.view(torch.bfloat16), clock)[0]
del buffer
roof = roofline.Roof(rate, bandwidth, "float32")
rows, points = {}, []
for who, needed in work.items():
    spent = backends.loc[f"{new} new behind {before:,}", f"{who}, ms"] / 1e3
    points.append(roofline.Point.measured(who, needed, spent))
    rows[who] = {
        "MFLOP": needed.flops / 1e6,
        "MB": needed.bytes / 1e6,
        "FLOP/byte": needed.intensity,
        "bound by": roof.bound_by(needed),
        "GFLOP/s": needed.flops / spent / 1e9,
        "floor, ms": roof.seconds(needed) * 1e3,
        "ms": spent * 1e3,
    }
with tempfile.TemporaryDirectory() as folder:
    title = f"A decode of {H} heads over {KEYS:,} latents"
    display(Image(plots.roofline_plot(points, [roof], Path(folder) / "roofline", title=title)[1].read_bytes()))
floors = roof.seconds(work["framework"]) / roof.seconds(work["solution"])
print(f"by FLOPs the solution would be {work['framework'].flops / work['solution'].flops:.0f} x faster,", end=" ")
print(f"by the floors {floors:.0f} x, by the clock {rows['framework']['ms'] / rows['solution']['ms']:.0f} x")
print(f"its attention without the weights: {latent.intensity:.1f} FLOP/byte;", end=" ")
v3 = attention_costs.mla_absorbed(1, 1, V3.num_heads, V3.latent, V3.rope, 2, prefix=4095)
print(f"that of DeepSeek-V3, 128 heads over 4,096 latents in bfloat16: {v3.intensity:.0f}")
assert work["framework"].intensity > work["solution"].intensity
assert not ON_CPU or rows["solution"]["ms"] < rows["framework"]["ms"]
formats = {"bound by": "{}", "floor, ms": "{:.2f}", "ms": "{:.2f}"}
table(pd.DataFrame(rows).T, {**dict.fromkeys(rows["solution"], "{:,.1f}"), **formats})

# %% [markdown]
# The framework stands further to the right, mostly higher too, and is the slower engine: FLOPs that nobody needs are
# done well. For a single sequence the solution's bytes are mostly weights, which a batch would share. What is left has
# an intensity that grows with the number of heads, because all of them read one entry. With DeepSeek-V3's heads it is
# about the ridge of a large GPU: latent attention is the one decode that arithmetic can limit. Phase 3 writes its
# kernel.
#
# ## Your turn
#
# 1. `make start-phase2` copies the framework into `workspace/phase2_rope`.
# 2. Turn where it lies (task 2.2), absorb (task 2.3), or take the lesser form (task 2.4); `make hint-phase2 TASK=2.3`
#    helps.
# 3. Set `MINE` below to `"mine"`, restart the kernel and run this notebook again.
# 4. Before you run it: which of the numbers will change, and to what?

# %%
MINE = "framework"  # change to "mine"

from phase2_rope.kernels import gates

mine = Use.parse(f"phase2={MINE}")
with shapes.checkpoint(SHAPE, "float32") as path:
    same = said(engine(path, f"phase2={MINE}")) == answers["solution"]
print(f"{MINE}: {'the same tokens as the solution' if same else 'OTHER TOKENS than the solution'}")
print(f"operations of a turn: {rope_cpu_cases.operations(mine):.0f}, the solution {OPERATIONS['solution']}")
print(f"FLOPs of a decode over those that it needs: {mla_checks.decode_flops(mine).value:.2f}")
print(f"FLOPs over the lesser form's, worst chunk: {mla_checks.lesser_form(mine).value:.2f}")
for what, gate in (("turn", gates.rope_overhead), ("turn and write", gates.write_overhead)):
    overhead = attempt(f"bytes of your {what}", partial(gate, mine))
    if overhead is not None:
        print(f"bytes of your kernel over the fewest, {what}: {overhead:.2f}")
