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
# # Who runs when
#
# A server has a queue, a model, and a decision at every step: whose tokens are computed now. This notebook looks at the
# decision, not at the model. Five questions:
#
# 1. What does a batch cost that is fixed until its last answer is done?
# 2. How many tokens fit into a step for nothing, and who pays for the rest?
# 3. Who waits, under which order, and for how long at most?
# 4. What does the device do while Python thinks?
# 5. What is left of all that at the end of a socket?
#
# Each part begins with a prediction, a number worked out from lengths and times. Write down your own before you run the
# cell. What is counted must come out exactly, on every machine, and the cells insist on it. What is timed is the
# machine's own: the cells print it, the prose does not.

# %%
import asyncio
import heapq
import itertools
import os
import random
import socket
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes a line at each start and stop
os.environ["OMP_NUM_THREADS"] = "1"  # where others work too, two threads wait for each other after every operation
import torch
from IPython.display import Image, display
from torch.profiler import ProfilerActivity, profile

from module0_profiling import hardware, peak_measure, plots, roofline, traces
from module0_profiling.course.parts import Use, resolve
from module0_profiling.notebooks import table
from module0_profiling.timing import clock_for, interleave
from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.cpu_memory import keep_freed_memory
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import TINY, random_prompts
from phase1_memory.allocator import make_allocator
from phase4_scheduler.async_llm import AsyncLLM
from phase4_scheduler.bench.arrivals import Arrival as Pace
from phase4_scheduler.bench.client import Target
from phase4_scheduler.bench.load import run_load
from phase4_scheduler.bench.workloads import WorkItem, Workload
from phase4_scheduler.llm import LLM
from phase4_scheduler.measures import loop_gates, policy_gates, scheduling_gates
from phase4_scheduler.measures.gates_simulated import Arrival, Simulated
from phase4_scheduler.measures.simulated import Job, request_of
from phase4_scheduler.memory import CountedMemory
from phase4_scheduler.null_executor import NullExecutor
from phase4_scheduler.scheduler_config import SchedulerConfig
from phase4_scheduler.server.options import ServerOptions

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.axisbelow": True})
torch.set_num_threads(1)
keep_freed_memory()  # as the engine's commands do: else a tensor of fresh pages is charged to whoever makes one
WHO = ("framework", "solution")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def part(name: str, who: str):
    """A module of this phase by one of its authors."""
    return resolve("phase4_scheduler", name, Use.parse(f"phase4={who}"))


def engine(who: str, model: str = TINY, **settings) -> LLM:
    """An engine whose steps come one after the other; operations are launched one by one."""
    fixed = {"device": DEVICE, "runner": "eager", "async_scheduling": "off", "num_blocks": 512}
    return LLM(model, use=f"phase4={who}", **(fixed | settings))


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens, always the most likely one."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


machine = hardware.detect(DEVICE)
print(f"{machine.name}, {machine.units} {'SMs' if DEVICE == 'cuda' else 'cores'}, torch {torch.__version__}")

# %% [markdown]
# ## 1. What does a fixed batch cost?
#
# titan-tiny, eight places, 16 requests that are all there at the start: an answer of 10 tokens, one of 200, one of 10,
# and so on. The framework takes eight, computes until all eight are done, and takes the next eight. The solution fills
# a place as soon as it is free.
#
# **Predict** the steps of both, and how many places of these steps are for nobody. The first is a maximum for each
# batch. The second you can do with eight counters: each request goes to the counter that is the lowest.

# %%
PLACES, SHORT, LONG, PROMPT = 8, 10, 200, 16
LENGTHS = [SHORT, LONG] * 8

lowest = [0] * PLACES
for length in LENGTHS:
    heapq.heapreplace(lowest, lowest[0] + length)
predicted = {
    "framework": sum(max(LENGTHS[i : i + PLACES]) for i in range(0, len(LENGTHS), PLACES)),
    "solution": max(lowest),
}


def serve(llm: LLM) -> tuple[list[list[int]], list[float]]:
    """Who got a token in each step, as numbers of requests, and the seconds of each step."""
    prompts = random_prompts(llm.engine.config.vocab_size, [PROMPT] * len(LENGTHS))
    asked = [llm.engine.add_request(p, greedy(n)) for p, n in zip(prompts, LENGTHS, strict=True)]
    number = {name: i for i, name in enumerate(asked)}
    steps, seconds = [], []
    while llm.engine.has_unfinished():
        began = time.perf_counter()
        steps.append([number[output.request_id] for output in llm.engine.step()])
        seconds.append(time.perf_counter() - began)
    return steps, seconds


engines = {who: engine(who, max_num_seqs=PLACES) for who in WHO}
steps, taken = {}, {who: [] for who in WHO}
for round_ in range(3):
    for who in WHO if round_ % 2 else reversed(WHO):
        steps[who], seconds = serve(engines[who])
        taken[who].append(seconds)
assert {who: len(steps[who]) for who in WHO} == predicted
for who in WHO:
    assert [sum(step.count(i) for step in steps[who]) for i in range(len(LENGTHS))] == LENGTHS
    empty = 1 - sum(LENGTHS) / (PLACES * len(steps[who]))
    print(f"{who}: {len(steps[who])} steps as predicted, {empty:.0%} of the places are for nobody")
rates = {  # a step that was disturbed in one round was not in another: the shortest of each
    who: sum(LENGTHS) / sum(map(min, *taken[who])) for who in WHO
}
by_steps, gain = predicted["framework"] / predicted["solution"], rates["solution"] / rates["framework"]
print(f"fewer steps: {by_steps:.2f} x; in this run", *(f"{who} {rates[who]:,.0f} tokens/s," for who in WHO), end=" ")
print(f"{gain:.2f} x")
assert gain > 1

# %% [markdown]
# Who holds which place in which step, as the engines have just done it. A bar is a request, from its first token to its
# last. Grey is a place that computes for nobody.

# %%


def bars(found: list[list[int]]) -> list[tuple[int, int, int, int]]:
    """Place, first step, steps and number of each request: who comes takes the lowest place that is free."""
    first, last = {}, {}
    for step, numbers in enumerate(found):
        for number in numbers:
            first.setdefault(number, step)
            last[number] = step
    free, held, drawn = list(range(PLACES)), {}, []
    for step, numbers in enumerate(found):
        for number in [n for n in held if last[n] < step]:
            heapq.heappush(free, held.pop(number))
        for number in (n for n in numbers if first[n] == step):
            held[number] = heapq.heappop(free)
            drawn.append((held[number], step, last[number] - step + 1, number))
    return drawn


figure, panels = plt.subplots(2, 1, figsize=(10, 4.8), sharex=True, layout="constrained")
for axes, who in zip(panels, WHO, strict=True):
    found = steps[who]
    axes.barh(range(PLACES), [len(found)] * PLACES, 0.8, color="0.88")
    for place, begin, count, number in bars(found):
        axes.barh(place, count, 0.8, begin, color=ORANGE if LENGTHS[number] == SHORT else BLUE, edgecolor="white")
        if count > SHORT:
            axes.text(begin + count / 2, place, f"request {number}", ha="center", va="center", color="white", size=7)
    axes.set(ylabel="place", title=f"{who}: {len(found)} steps", yticks=range(PLACES))
    axes.invert_yaxis()
panels[1].set_xlabel("step")
plt.show()

# %% [markdown]
# In the upper picture every short answer is followed by 190 steps of nothing. In the lower one a place is empty only at
# the end, when nobody is left to take it.
#
# The gain in time is not that of the steps. A step with eight rows costs more than one with four. How much more is the
# next question.
#
# ## 2. How many tokens fit into a step for nothing?
#
# A step reads all weights, however few tokens it is for, and multiplies them with each token. With *W* weights of *b*
# bytes that is `W b` bytes and `2 W` operations a token. As long as reading takes longer, tokens are free.
#
# For this question the model must not fit into a processor's cache: here is one with 47 million weights, random ones.
#
# **Predict** the knee, from two peaks of this machine that the next cell measures: the number of tokens at which
# multiplying takes as long as reading.

# %%
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"  # what every CPU multiplies fast
DECODES, LONG_PROMPT, PIECE = 8, 900, 64
WHOLE = {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024, "max_num_seqs": 256}
PIECES = {"max_num_batched_tokens": DECODES + PIECE, "max_num_seqs": DECODES + 1}
with tempfile.TemporaryDirectory() as folder:
    path = write_checkpoint(SHAPE, Path(folder) / "wide", dtype=DTYPE)
    wide = {
        name: engine("solution", str(path), dtype=DTYPE, **settings)
        for name, settings in (("whole prompts", WHOLE), ("in pieces", PIECES))
    }
weight_bytes = wide["in pieces"].engine.model.weight_bytes
weights = weight_bytes // (2 if DTYPE == "bfloat16" else 4)


def work(tokens: int) -> roofline.Work:
    """What a step must do; attention to a few tokens counts for nothing beside it."""
    return roofline.Work(2 * weights * tokens, weight_bytes)


def one_step(llm: LLM, tokens: int) -> None:
    """A step of so many sequences of one token."""
    for prompt in random_prompts(SHAPE["vocab_size"], [1] * tokens):
        llm.engine.add_request(prompt, greedy(1))
    llm.engine.step()
    assert not llm.engine.has_unfinished()


TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
clock = clock_for(DEVICE)
buffer = torch.randn(1 << 27, device=DEVICE)
roof = roofline.Roof(
    peak_measure.matmul_rate(DTYPE, DEVICE, clock),
    peak_measure.read_bandwidth(buffer.view(torch.bfloat16), clock)[0],
    f"{DTYPE}, one thread" if DEVICE == "cpu" else DTYPE,
)
del buffer
knee = roof.ridge * weight_bytes / (2 * weights)
timed = interleave({str(n): partial(one_step, wide["whole prompts"], n) for n in TOKENS}, rounds=4, device=DEVICE)
step_of = {n: timed[str(n)].best for n in TOKENS}
print(f"{weights / 1e6:.0f} million weights, {weight_bytes / 1e6:.0f} MB")
print(f"predicted: the knee is at {knee:.0f} tokens; a token takes {step_of[1] * 1e3:.1f} ms, 8 take", end=" ")
print(f"{step_of[8] / step_of[1]:.1f} x that, 256 take {step_of[256] / step_of[1]:.0f} x")
assert DEVICE == "cuda" or step_of[8] < 4 * step_of[1] < step_of[256]

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
axes.plot(TOKENS, [roof.seconds(work(n)) * 1e3 for n in TOKENS], "--", color=BLACK, label="no step can be faster")
axes.plot(TOKENS, [step_of[n] * 1e3 for n in TOKENS], "o-", color=BLUE, label="measured")
axes.axvline(knee, color=ORANGE, label=f"knee, {knee:.0f} tokens")
axes.set(xscale="log", yscale="log", xlabel="tokens in a step", ylabel="ms", xticks=TOKENS, xticklabels=TOKENS)
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# Left of the knee a step costs its weights, right of it its tokens. (One row is multiplied by another routine than two
# or more, which is where the curve begins with a step of its own.) In bfloat16 a weight has two bytes and two
# operations a token, so there the knee is at the machine's ridge: 184 tokens on an H200.
#
# Now the stall. Eight sequences generate. After 15 and 45 steps a prompt of 900 tokens comes and wants one token.
# Either it is computed whole, beside the eight; or under a budget of 72 tokens a step, of which the eight take theirs
# first and 64 are left for it.
#
# **Predict**, for both: the tokens of the largest step, the steps until the prompt has its token, and from the curve
# above how long the eight wait for their next token at worst.

# %%
COMES, ANSWER = (15, 45), 75


def disturbed(llm: LLM, seed: int) -> tuple[list[tuple[float, int]], list[tuple[int, float]]]:
    """Seconds and tokens of each step; and of each long prompt, the steps and seconds until it has its token."""
    core, vocabulary = llm.engine, SHAPE["vocab_size"]
    for prompt in random_prompts(vocabulary, [PROMPT] * DECODES, seed):
        core.add_request(prompt, greedy(ANSWER))
    taken, waits, came = [], [], {}
    while core.has_unfinished():
        if len(taken) in COMES:
            (prompt,) = random_prompts(vocabulary, [LONG_PROMPT], seed + len(taken))
            came[core.add_request(prompt, greedy(1))] = len(taken), time.perf_counter()
        before, began = core.loop.counts.tokens, time.perf_counter()
        outputs = core.step()
        taken.append((time.perf_counter() - began, core.loop.counts.tokens - before))
        for output in outputs:
            if output.request_id in came:
                number, at = came[output.request_id]
                waits.append((len(taken) - number, time.perf_counter() - at))
    return taken, waits


def curve(tokens: int) -> float:
    """Seconds of a step, from the measured ones: in proportion between two of them, and beyond the last."""
    known = sorted(step_of)
    left, right = next(((a, b) for a, b in itertools.pairwise(known) if tokens <= b), known[-2:])
    return step_of[left] + (step_of[right] - step_of[left]) * (tokens - left) / (right - left)


expected = {"whole prompts": (DECODES + LONG_PROMPT, 1), "in pieces": (DECODES + PIECE, -(-LONG_PROMPT // PIECE))}
runs, rows = {}, {}
for name, llm in wide.items():
    runs[name] = taken, waits = disturbed(llm, 1)
    largest, needed = max(tokens for _, tokens in taken[4:]), {count for count, _ in waits}
    assert (largest, needed) == (expected[name][0], {expected[name][1]})
    print(f"{name}: {largest} tokens in the largest step, {needed.pop()} steps to the first token, as predicted")
    stalls = [seconds for seconds, tokens in taken[4:] if tokens > DECODES]
    rows[name] = {
        "a decode, ms": 1e3 * statistics.median(s for s, tokens in taken if tokens == DECODES),
        "longest gap predicted, ms": 1e3 * curve(largest),
        "longest gap, ms": 1e3 * max(stalls),
        "first token of the long, ms": 1e3 * statistics.median(seconds for _, seconds in waits),
    }
gaps = pd.DataFrame(rows).T
assert DEVICE == "cuda" or gaps.loc["whole prompts", "longest gap, ms"] > 2 * gaps.loc["in pieces", "longest gap, ms"]
table(gaps, dict.fromkeys(gaps, "{:,.1f}"))

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for (name, (taken, _)), colour in zip(runs.items(), (ORANGE, BLUE), strict=True):
    ends = list(itertools.accumulate(seconds for seconds, _ in taken))
    panels[0].plot(ends[1:], [1e3 * seconds for seconds, _ in taken[1:]], ".-", color=colour, label=name, linewidth=0.8)
panels[0].set(yscale="log", xlabel="time, s", ylabel="ms since the last token", title="what eight readers see")
panels[0].legend()
panels[1].plot(TOKENS, [step_of[n] * 1e3 for n in TOKENS], "-", color="0.6")
for tokens, colour, label in (
    (DECODES, GREEN, "eight decodes"),
    (DECODES + PIECE, BLUE, "with a piece"),
    (DECODES + LONG_PROMPT, ORANGE, "with a whole prompt"),
):
    seen = [s for taken, _ in runs.values() for s, n in taken[1:] if n == tokens]
    panels[1].plot(tokens, 1e3 * statistics.median(seen), "o", color=colour, label=label)
panels[1].set(xscale="log", yscale="log", xlabel="tokens in a step", ylabel="ms", title="these steps on the curve")
panels[1].legend()
plt.show()
points = [roofline.Point.measured(f"{n} token{'s' * (n > 1)}", work(n), step_of[n]) for n in (1, DECODES, PIECE, 256)]
with tempfile.TemporaryDirectory() as folder:
    drawn = plots.roofline_plot(points, [roof], Path(folder) / "steps", title="Steps by their tokens")
    display(Image(drawn[1].read_bytes()))

# %% [markdown]
# The arithmetic of the prompt is the same in both, so nothing is gained in sum. It is dealt out. The long prompt's own
# first token comes later, by what the eight got meanwhile and by the weights that each piece reads again. Whoever
# chooses the budget chooses between the two.
#
# ## 3. Who waits, and for how long at most?
#
# From here on there is no model: a clock that only steps move, and the real scheduler. First the crowd. 32 requests are
# there, one place, half of the answers 10 tokens and half 200, in random order; a step is a second.
#
# **Predict** the mean time until a request begins, by arrival and with the shortest first: sums of what goes before.

# %%
POLICIES = ("fcfs", "priority", "sjf", "ageing")


def simulated(who: str, policy: str, arrivals: list[Arrival], places: int, rate=100.0, **times) -> Simulated:
    """A run of a scheduler under one order; `rate` is that of ageing."""
    settings = {"max_num_seqs": places, "scheduling_policy": policy, "ageing_rate": rate}
    run = Simulated(Use.parse(f"phase4={who}"), settings, **times)
    run.run(arrivals)
    return run


lengths = [SHORT, LONG] * 16
random.Random(0).shuffle(lengths)
crowd = [Arrival(0, 1, length) for length in lengths]


def mean_start(order: list[int]) -> float:
    """Seconds until one begins, on average, in this order."""
    return statistics.fmean([0, *itertools.accumulate(order)][:-1])


found = {policy: statistics.fmean(simulated("solution", policy, crowd, 1).waits()) for policy in POLICIES}
found["framework"] = statistics.fmean(simulated("framework", "sjf", crowd, 1).waits())
by_arrival, shortest = mean_start(lengths), mean_start(sorted(lengths))
assert found == dict(zip((*POLICIES, "framework"), (by_arrival,) * 2 + (shortest,) * 2 + (by_arrival,), strict=True))
print(f"by arrival {by_arrival:,.0f} s, the shortest first {shortest:,.0f} s on average, both as predicted")

# %% [markdown]
# Nobody had said that anything was urgent, so `priority` is arrival; all came at once, so `ageing` is shortest first;
# and the framework does not know the word.
#
# A crowd ends. A stream does not. One request of 200 tokens comes at second 1. From second 0 on short ones of 10 tokens
# come every 9 seconds, a hundred of them: slightly more than one place can serve.
#
# **Predict** when the long one begins, shortest first. And with ageing at *r* tokens a second: who may pass it? A
# request of work *w* that comes at *t* has the key `w + r t`. Count the short ones whose key is smaller; each of them
# takes 10 seconds.

# %%
STREAM, EVERY = 100, 9
shorts = [Arrival(EVERY * i, 1, SHORT) for i in range(STREAM)]
stream = sorted([*shorts, Arrival(1, 10, LONG)], key=lambda arrival: arrival.at)
RATES = (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)


def begins(policy: str, rate: float = 1.0) -> float:
    """Seconds that the long one waits."""
    run = simulated("solution", policy, stream, 1, rate=rate)
    return run.waits()[stream.index(Arrival(1, 10, LONG))]


def passed_by(rate: float) -> int:
    """Short ones that go first: those with smaller keys."""
    return sum(arrival.prompt + arrival.answer + rate * arrival.at < 10 + LONG + rate for arrival in shorts)


waited = {rate: begins("ageing", rate) for rate in RATES}
assert waited == {rate: passed_by(rate) * SHORT - 1 for rate in RATES}
assert (begins("fcfs"), begins("sjf")) == (SHORT - 1, STREAM * SHORT - 1)
bound = {rate: SHORT * (2 + (10 + LONG) / rate / EVERY) for rate in RATES}  # those that come until w / r, and two
assert all(waited[rate] <= bound[rate] for rate in RATES)
print(f"the long one waits {SHORT - 1} s by arrival, {STREAM * SHORT - 1} s with the shortest first: to the end")
print(f"ageing, 1 token a second: {waited[1.0]:.0f} s, {passed_by(1.0)} go first; every prediction is exact")

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.plot(RATES, [bound[rate] for rate in RATES], "--", color=BLACK, label="bound: those that come until w / rate")
axes.plot(RATES, [waited[rate] for rate in RATES], "o", color=BLUE, label="ageing")
axes.axhline(STREAM * SHORT - 1, color=RED, label="shortest first: until the stream ends")
axes.axhline(SHORT - 1, color=GREEN, label="by arrival")
axes.set(xscale="log", yscale="log", xlabel="tokens that a second of waiting is worth", ylabel="the long one waits, s")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The dashed line holds whatever else comes, a thousand short ones or a million. Shortest first has no such line: its
# red one is where our stream happened to end. (At the left end of the blue points the stream ended too.)
#
# Last, traffic as a server sees it: random arrivals, 16 places, a step of 10 ms and 0.1 ms more for each of its tokens,
# prompts of 128 tokens. **Predict** how many requests a second that can take: a request is 105 tokens on average, each
# a 16th of a full step, and its prompt. Then nine tenths of that come. Which order has the lowest mean to the first
# token, and who pays?

# %%
STEP, TOKEN, SEATS, COUNT = 0.010, 0.0001, 16, 800
a_request = (SHORT + LONG) / 2 * (STEP + SEATS * TOKEN) / SEATS + 128 * TOKEN  # seconds
dice = random.Random(7)
moments = itertools.accumulate(dice.expovariate(0.9 / a_request) for _ in range(COUNT))
traffic = [Arrival(at, 128, dice.choice((SHORT, LONG)), priority=int(dice.random() > 0.1)) for at in moments]
together = [Arrival(0, 128, arrival.answer) for arrival in traffic]
times = {"step_seconds": STEP, "token_seconds": TOKEN}
saturation = COUNT / simulated("solution", "fcfs", together, SEATS, **times).now
print(f"saturation: predicted {1 / a_request:.1f} requests/s, found {saturation:.1f}")
assert 0.9 < saturation * a_request < 1.1

rows, waits = {}, {}
for name, (who, policy) in {
    **{policy: ("solution", policy) for policy in POLICIES},
    "static batches": ("framework", "fcfs"),
}.items():
    run = simulated(who, policy, traffic, SEATS, **times)
    waits[name] = [run.first[r.request_id] - r.arrival for r in run.requests]
    groups = {
        "all": waits[name],
        "short": [w for w, arrival in zip(waits[name], traffic, strict=True) if arrival.answer == SHORT],
        "long": [w for w, arrival in zip(waits[name], traffic, strict=True) if arrival.answer == LONG],
        "urgent": [w for w, arrival in zip(waits[name], traffic, strict=True) if arrival.priority == 0],
    }
    ends = statistics.fmean(run.last[r.request_id] - r.arrival for r in run.requests)
    rows[name] = {f"{kind}, s": statistics.fmean(values) for kind, values in groups.items()}
    rows[name] |= {"longest, s": max(waits[name]), "to the end, s": ends, "preemptions": run.scheduler.preemptions}
policies = pd.DataFrame(rows).T
assert policies["urgent, s"].idxmin() == "priority" and policies["all, s"].idxmax() == "static batches"
assert policies.loc["sjf", "short, s"] < policies.loc["fcfs", "short, s"]
table(policies, {**dict.fromkeys(policies, "{:.2f}"), "preemptions": "{:.0f}"})

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
shares = [1 - i / COUNT for i in range(COUNT)]
for (name, values), colour in zip(waits.items(), (BLACK, PINK, ORANGE, BLUE, "0.6"), strict=True):
    axes.plot(sorted(values), shares, color=colour, label=name)
axes.set(xscale="log", yscale="log", xlabel="s to the first token", ylabel="share that waits longer")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# The same arrivals, the same answers: an order moves waiting from one to another, and the table says to whom. Compare
# the mean to the first token with the mean to the end. Look at the column of preemptions too: whoever loses its place
# computes its prompt again, so the sum of the work grows, and near saturation everybody's queue grows with it. Static
# batches are not slower by a half here. They are past their saturation, and their queue has no end but that of the
# trace.
#
# ## 4. What does the device do while Python thinks?
#
# An executor stands in for the device: a step takes 5 ms, on its own, and the host must spend some time before each of
# them. The framework launches a step, waits for it, and only then decides on the next. The solution decides and
# launches while one runs.
#
# **Predict** the share of the time in which the device is busy, for 2 ms of host and for 6: one after the other, and
# one ahead.

# %%
DEVICE_SECONDS = 0.005


class Recorded(NullExecutor):
    """Notes what host and device do: (what, begin, end) in seconds."""

    def __init__(self, host: float) -> None:
        super().__init__(DEVICE_SECONDS, text=range(7, 107))
        self.host, self.rows, self.spans = host, 0, []

    def launch(self, step, before=None):
        """The host builds a batch; then the device begins, or goes on with the next."""
        began = time.perf_counter()
        while time.perf_counter() < began + self.host:
            pass
        self.spans.append(("prepare", began, time.perf_counter()))
        self.rows += len(step.sampling)
        launched = super().launch(step, before)
        self.spans.append(("step", launched.due - DEVICE_SECONDS, launched.due))
        return launched

    def collect(self, launched):
        """The host waits."""
        began = time.perf_counter()
        done = super().collect(launched)
        self.spans.append(("wait", began, time.perf_counter()))
        return done


def loop_of(who: str, host: float, requests: list):
    """A loop one step ahead, or what the framework has in its place, on the executor that records."""
    memory = CountedMemory(make_allocator(256))
    scheduler = part("scheduler", "solution").Scheduler(memory, SchedulerConfig())
    loop = part("loop", who).AheadLoop(scheduler, Recorded(host))
    for request in requests:
        loop.scheduler.add(request)
    return loop


def recorded(who: str, host: float, tokens: int = 40) -> list[tuple[str, float, float]]:
    """What eight answers of so many tokens look like."""
    loop = loop_of(who, host, [request_of(str(i), Job(0.0, 16, tokens)) for i in range(8)])
    while loop.has_unfinished():
        loop.step()
    return loop.executor.spans


def share(spans: list[tuple[str, float, float]]) -> float:
    """Of the time from one step to the next, the part in which one ran; the median, as a late wake-up is not ours."""
    began = [begin for what, begin, _ in spans if what == "step"]
    return DEVICE_SECONDS / statistics.median(b - a for a, b in itertools.pairwise(began))


HOSTS = (0.0005, 0.002, 0.004, 0.006, 0.008)
reckoned = {
    "framework": [DEVICE_SECONDS / (DEVICE_SECONDS + host) for host in HOSTS],
    "solution": [DEVICE_SECONDS / max(DEVICE_SECONDS, host) for host in HOSTS],
}
lines = {(who, host): recorded(who, host) for host in HOSTS for who in WHO}
busy = {who: [share(lines[who, host]) for host in HOSTS] for who in WHO}
assert all(after < ahead for after, ahead in zip(busy["framework"], busy["solution"], strict=True))
for who, how in zip(WHO, ("one after the other", "one ahead"), strict=True):
    print(f"{how}: predicted {reckoned[who][1]:.0%} busy with 2 ms of host, {reckoned[who][3]:.0%} with 6;", end=" ")
    print(f"in this run {busy[who][1]:.0%} and {busy[who][3]:.0%}")

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), width_ratios=(3, 3, 2.4), layout="constrained", sharey=False)
COLOURS = {"prepare": ORANGE, "wait": "0.85", "step": BLUE}
for axes, who in zip(panels, WHO, strict=False):
    spans = lines[who, HOSTS[1]]
    began = [begin for what, begin, _ in spans if what == "prepare"][10]
    for what, colour in COLOURS.items():
        place = (0.6 if what == "step" else 1.6, 0.8)
        seen = [(1e3 * (begin - began), 1e3 * (end - begin)) for kind, begin, end in spans if kind == what]
        axes.broken_barh(seen, place, facecolors=colour, edgecolor="white", label=what)
    axes.set(xlim=(0, 32), yticks=[1, 2], yticklabels=["device", "host"], xlabel="time, ms", title=who)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
for who, colour in zip(WHO, (ORANGE, BLUE), strict=True):
    panels[2].plot([1e3 * h for h in HOSTS], reckoned[who], "--", color=colour)
    panels[2].plot([1e3 * h for h in HOSTS], busy[who], "o", color=colour, label=who)
panels[2].set(xlabel="host before a step, ms", ylabel="busy", ylim=(0, 1.05), title="dashed: predicted")
panels[2].legend(fontsize=8)
plt.show()

# %% [markdown]
# Running ahead hides the host, as long as there is less of it than of the device. What does it cost? The next step is
# launched before anybody knows the token of this one. **Predict** the rows that are computed for nothing, for eight
# answers that end by their length, and for eight that end with a stop token.

# %%


def in_vain(who: str, stop: list[int]) -> int:
    """Rows whose tokens nobody got: eight answers of 60 tokens at most, which stop at one of these tokens."""
    requests = [request_of(str(i), Job(0.0, 16, 60)) for i in range(8)]
    for place, request in enumerate(requests):
        request.seed, request.params = 5 * place, SamplingParams(max_tokens=60, stop_token_ids=stop)
    loop = loop_of(who, 0.0, requests)
    while loop.has_unfinished():
        loop.step()
    return loop.executor.rows - sum(len(request.output_token_ids) for request in requests)


lost = {who: (in_vain(who, []), in_vain(who, [50])) for who in WHO}
assert lost == {"framework": (0, 0), "solution": (0, 8)}
print(f"rows for nothing, by length and by stop token: {lost['framework']} and {lost['solution']}, as predicted")

# %% [markdown]
# ### A profile
#
# Back to titan-tiny and the workload of the first part, twelve steps of each engine, after the first short answers have
# ended. Grey is what the engine does, below it is what torch does for it. **Expect** as many operations in a step of
# the framework, for half as many tokens.

# %%
KINDS = {  # kind of operation -> colour, words in the names of its operations
    "fetching pages": (ORANGE, ("aten::index", "index_select", "gather", "aten::cat")),
    "attention": (BLUE, ("attention", "flash", "softmax", "bmm", "paged")),
    "products with weights": (GREEN, ("linear", "::mm", "matmul", "gemm", "gemv", "nvjet", "cutlass")),
    "all other": (PINK, ("",)),
}
STAGES = ("schedule", "prepare", "forward", "sample", "finish", "detokenise")
SKIPPED, STEPS = 40, 12


def kind_of(name: str) -> str:
    """The first kind that has a word in the name; writing to the cache is not fetching."""
    found = next(kind for kind, (_, words) in KINDS.items() if any(word in name.lower() for word in words))
    return "all other" if "index_put" in name else found


def profiled(llm: LLM) -> tuple[traces.Trace, int]:
    """The timeline of some steps, and their tokens."""
    core = llm.engine
    for prompt, length in zip(random_prompts(core.config.vocab_size, [PROMPT] * len(LENGTHS), 9), LENGTHS, strict=True):
        core.add_request(prompt, greedy(length))
    for _ in range(SKIPPED):
        core.step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as running:
        got = sum(len(core.step()) for _ in range(STEPS))
    core.abort_all()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        running.export_chrome_trace(str(file))
        return traces.read(file), got


def quickest_step(trace: traces.Trace) -> tuple[float, float]:
    """Begin and end of the quickest step, in seconds: what disturbs the machine does not hit all of them."""
    begins_at = trace.ranges[trace.ranges["name"] == "schedule"]["start"].tolist()
    last = trace.ranges[trace.ranges["name"] == "detokenise"]
    ends_at = (last["start"] + last["duration"]).tolist()
    return min(zip(begins_at, ends_at, strict=True), key=lambda step: step[1] - step[0])


def draw(axes, trace: traces.Trace, begin: float, title: str) -> None:
    """The engine's stages, torch's operations (callers below what they call), and on a GPU its kernels."""

    def bars_of(events) -> list[tuple[float, float]]:
        return list(zip((events["start"] - begin) * 1e3, events["duration"] * 1e3, strict=True))

    for stage, shade in zip(STAGES, ("0.75", "0.9") * 3, strict=True):
        axes.broken_barh(bars_of(trace.ranges[trace.ranges["name"] == stage]), (0.6, 0.8), color=shade)
    lower = {"torch": trace.cpu_ops} | ({"GPU": trace.kernels} if len(trace.kernels) else {})
    for place, events in enumerate(lower.values()):
        colours = [KINDS[kind_of(name)][0] for name in events["name"]]
        axes.broken_barh(bars_of(events), (-0.4 - place, 0.8), facecolors=colours, linewidth=0)
    axes.set(yticks=[1, *range(0, -len(lower), -1)], yticklabels=["engine", *lower], title=title, xlabel="time, ms")


profiles = {who: profiled(llm) for who, llm in engines.items()}
spans_of = {who: quickest_step(trace) for who, (trace, _) in profiles.items()}
longest = max(end - begin for begin, end in spans_of.values()) * 1e3
figure, panels = plt.subplots(2, 1, figsize=(10, 4.4), layout="constrained")
for axes, (who, (trace, got)) in zip(panels, profiles.items(), strict=True):
    begin, end = spans_of[who]
    draw(axes, trace, begin, f"{who}: {got // STEPS} tokens in {(end - begin) * 1e3:.1f} ms, which the black line ends")
    axes.axvline((end - begin) * 1e3, color=BLACK)
    axes.set_xlim(0, longest)
handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in KINDS.values()]
figure.legend(handles, KINDS, loc="outside lower center", ncols=len(KINDS), fontsize=9)
plt.show()

# %% [markdown]
# As tables: time in operations themselves, without those that they call. *Busy* is the share of the recording in which
# an operation (on a GPU: a kernel) ran; the profiler makes each operation longer.

# %%
totals = {}
for who, (trace, got) in profiles.items():
    own = trace.kernels if len(trace.kernels) else traces.self_times(trace)
    by_kind = own.groupby(own["name"].astype(str).map(kind_of))["duration"].sum().reindex(list(KINDS), fill_value=0.0)
    scheduling = trace.ranges[trace.ranges["name"].isin(["schedule", "finish"])].groupby("name", observed=True)
    totals[who] = {
        "tokens a step": got / STEPS,
        "operations a step": len(own) / STEPS,
        "operations a token": len(own) / got,
        "busy": traces.busy(trace).share,
        "scheduling, µs": scheduling["duration"].median().sum() * 1e6,
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
assert totals["tokens a step"].tolist() == [PLACES / 2, PLACES]
per_token = totals.loc["framework", "operations a token"] / totals.loc["solution", "operations a token"]
print(f"tokens a step: framework {PLACES // 2}, solution {PLACES}, as predicted")
assert 1.5 < per_token < 2.5
written = dict.fromkeys(totals, "{:,.0f}") | {"busy": "{:.0%}"} | {f"{kind}, ms": "{:.2f}" for kind in KINDS}
table(totals, written)

# %% [markdown]
# A step of a model this small is a number of calls, and calls don't count rows. What the scheduler itself takes is the
# column in microseconds: it has to be little beside a step, since on a CPU nothing hides it.
#
# ## 5. What is left of it at the end of a socket?
#
# The engine in a process of its own, an `AsyncLLM` here, and before it the server, in this process too: so both ways
# lead to one engine. (`titan serve` is the same with a process to itself.) Eight streams at a time, prompts of 32
# tokens, answers of 40, directly and over HTTP, in turns; then one request at a time.
#
# **Predict.** A step takes what the profile says. How long does a stream wait between two tokens? Until the first, if
# all eight prompts fit into one budget but do not arrive in one moment? And what does HTTP add to that: a body to
# parse, headers to write, and a chunk for each token?

# %%
STREAMS, ASKED, NEW = 8, 32, 40


class Streamed:
    """Seconds from the request to each piece of one answer; the tokens in it."""

    def __init__(self) -> None:
        self.began, self.times, self.tokens = time.perf_counter(), [], []

    def came(self, tokens: list[int]) -> None:
        """A piece is here."""
        self.times.append(time.perf_counter() - self.began)
        self.tokens += tokens


async def direct(llm: AsyncLLM, prompt: list[int], tokens: int) -> Streamed:
    """One answer of `AsyncLLM`."""
    got = Streamed()
    async with llm.submit(prompt, greedy(tokens)) as stream:
        async for pieces in stream:
            got.came([token for piece in pieces for token in piece.token_ids])
    return got


async def over_http(url: str, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    """Answers of the server, as many at a time as there are prompts: seconds from each request to its chunks."""
    load = Workload("streams", tuple(WorkItem(tuple(prompt), tokens) for prompt in prompts))
    result = await run_load(Target(url, "model"), load, Pace.closed_loop(len(prompts)))
    assert all(sample.ok and sample.output_tokens == tokens for sample in result.samples)
    return [[at - sample.sent for at in sample.times] for sample in result.samples]


async def whole_path() -> dict[str, object]:
    """Start everything, ask, and end it."""
    llm = AsyncLLM(
        TINY, {"device": DEVICE, "max_num_seqs": STREAMS, "num_blocks": 256, "dtype": "float32", "runner": "eager"}
    )
    await llm.start()
    stop = asyncio.Event()
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio asks for TCP by number
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    options = ServerOptions(served_names=("model",), log_interval=0)
    server = asyncio.create_task(part("server.front", "solution").serve(llm, options, listening, stop))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        await llm.ready(120)
        found = {"AsyncLLM": [], "HTTP": [], "one": {"AsyncLLM": [], "HTTP": []}, "steps": []}
        for round_ in range(4):
            prompts = random_prompts(4096, [ASKED] * STREAMS, round_)
            answers = await asyncio.gather(*(direct(llm, prompt, NEW) for prompt in prompts))
            sent = await over_http(url, prompts, NEW)
            if round_:  # the first warms up
                found["AsyncLLM"] += [answer.times for answer in answers]
                found["HTTP"] += sent
        found["prompts"], found["tokens"] = prompts, [answer.tokens for answer in answers]
        for turn in range(24):
            prompt = prompts[turn % STREAMS]
            found["one"]["AsyncLLM"].append((await direct(llm, prompt, 2)).times[0])
            found["one"]["HTTP"].append((await over_http(url, [prompt], 2))[0][0])
        found["open"] = llm.in_flight
    finally:
        stop.set()
        await server
        await llm.shutdown()
    return found | {"state": llm.state}


with ThreadPoolExecutor(1) as pool:  # a notebook has an event loop already
    asked = pool.submit(asyncio.run, whole_path()).result()
offline = engine("solution", max_num_seqs=STREAMS, dtype="float32")
alone = [answer.outputs[0].token_ids for answer in offline.generate(asked["prompts"], greedy(NEW), progress=False)]
assert asked["tokens"] == alone
assert (asked["open"], asked["state"]) == (0, "stopped")
rows = {}
for way in ("AsyncLLM", "HTTP"):
    gaps_of = sorted(b - a for stream_times in asked[way] for a, b in itertools.pairwise(stream_times))
    rows[way] = {
        "first token, ms": 1e3 * statistics.median(stream_times[0] for stream_times in asked[way]),
        "last of the eight, ms": 1e3 * max(stream_times[0] for stream_times in asked[way]),
        "a token more, ms": 1e3 * statistics.median(gaps_of),
        "p99, ms": 1e3 * gaps_of[int(0.99 * len(gaps_of))],
        "alone, first token, ms": 1e3 * statistics.median(asked["one"][way]),
    }
adds = statistics.median(b - a for a, b in zip(*asked["one"].values(), strict=True))
print("tokens of the streams are those of the offline engine; nothing is left open, and no process")
print(f"HTTP adds {1e3 * adds:.1f} ms to the first token of a request alone, its client's work included")
assert adds < 0.1
table(pd.DataFrame(rows).T, dict.fromkeys(rows["HTTP"], "{:.1f}"))

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for place, (way, colour) in enumerate((("AsyncLLM", BLUE), ("HTTP", ORANGE))):
    first = [1e3 * stream_times[0] for stream_times in asked[way]]
    panels[0].plot(first, [place + 0.04 * (i % STREAMS) for i in range(len(first))], "o", color=colour, markersize=4)
    gaps_of = sorted(1e3 * (b - a) for stream_times in asked[way] for a, b in itertools.pairwise(stream_times))
    panels[1].plot(gaps_of, [1 - i / len(gaps_of) for i in range(len(gaps_of))], color=colour, label=way)
panels[0].set(yticks=[0.14, 1.14], yticklabels=["AsyncLLM", "HTTP"], xlabel="ms to the first token", xlim=(0, None))
panels[1].set(yscale="log", xlabel="ms between tokens", ylabel="share that is longer", xlim=(0, None))
panels[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# Dots in a column got their first token from the same step. Whoever comes first may have a step to itself, and those
# who come a moment later wait for its end: that is what `batch_wait` can trade for a little patience. Between a step
# and its reader are a message, a token turned into text, a line of JSON and a socket. While they happen, the engine's
# process is in its next step.
#
# One line of the cell above is there for a reason. A listening socket that is made without naming TCP as its protocol
# works; but asyncio switches Nagle's algorithm off only where the number says TCP. Then small chunks wait for an
# acknowledgement that the other side delays. Change it, and **predict** what becomes of the first token.
#
# ## Your turn
#
# 1. `make start-phase4` copies the framework into `workspace/phase4_scheduler`.
# 2. Write the scheduler (task 4.1), the policies (task 4.2) and the loop (task 4.3); `make hint-phase4 TASK=4.1` helps.
# 3. Set `MINE` below to `"mine"`, restart the kernel and run this notebook again.
# 4. Before you run it: which of the numbers will change, and to what?

# %%
MINE = "framework"  # change to "mine"

mine = Use.parse(f"phase4={MINE}")
fewest = scheduling_gates.steps_over_fewest(mine)
print(f"short and long answers: {fewest.value:.2f} x the fewest steps ({fewest.detail})")
stall = scheduling_gates.longest_stall(mine)
print(f"longest stall of an answer while prompts come: {stall.value:.0f} steps")
order = policy_gates.shortest_first(mine)
print(f"shortest first: {order.value:.2f} x the wait by arrival")
ahead = loop_gates.overlapped(mine)
print(f"launched before the last step was collected: {ahead.value:.0%} of the steps")
