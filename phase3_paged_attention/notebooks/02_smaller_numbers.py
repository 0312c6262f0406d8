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
# # Smaller numbers
#
# A decode waits for its cache. The kernels of the first notebook ask for each byte once, so what is left is to have
# fewer of them: eight bits a number, or a latent in place of heads. This notebook asks five things of that:
#
# 1. What can eight bits say, and what happens to what they can't?
# 2. Which scale, and how wrong may it be?
# 3. What does it cost to write such a cache?
# 4. What does a model lose?
# 5. Is it faster for latents too?
#
# Each part begins with a prediction. Write down your own before you run the cell. What is counted must come out
# exactly, on every machine, and the cells insist on it. What a GPU would take is marked as a prediction.

# %%
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from module0_profiling import attention_costs, hardware, plots
from module0_profiling.notebooks import table
from module0_profiling.roofline import Roof
from phase0_prototype.quality import read_held_out
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.workloads import TINY
from phase3_paged_attention.kv_format import FORMATS, dequantise
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.layers import QuantisedAttention
from phase3_paged_attention.llm import LLM
from phase3_paged_attention.measures.interpreted import in_process

BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update({"figure.dpi": 100, "axes.axisbelow": True})
torch.set_num_threads(1)  # where others work too, two threads wait for each other after every operation
WHO = ("framework", "solution")
TRITON = importlib.util.find_spec("triton") is not None  # it is Linux only
E4M3, E5M2, PER_TOKEN = (FORMATS[name] for name in ("fp8_e4m3", "fp8_e5m2", "fp8_per_token_head"))
MANTISSA = {E4M3: 3, E5M2: 2}  # bits
SMALLEST_NORMAL = {E4M3: 2.0**-6, E5M2: 2.0**-14}
ONE = torch.ones(1)


@cache
def gate(module: str, question: str, who: str) -> dict:
    """What a gate asks of somebody's kernels, in Triton's interpreter, in a process of its own."""
    return in_process(f"phase3_paged_attention.measures.{module}", question, f"phase3={who}")


machine = hardware.detect("cpu")
print(f"{machine.name}, {machine.units} cores, torch {torch.__version__}")

# %% [markdown]
# ## 1. What can eight bits say?
#
# A sign, an exponent, a mantissa, as in any float. e4m3 has 4 and 3 bits and no infinity: of its 256 codes two are NaN.
# e5m2 has 5 and 2, two infinities and six NaN.
#
# **Predict.** How many different numbers has each? What is the largest error of a number between the smallest normal
# one and the end, as a share of it? (The worst lies in the middle of 1 and its neighbour 1 + 2^-m.) And over how many
# powers of two does that hold?

# %%
LEVELS = 1 << 12  # numbers that are looked at in each power of two


def rounded(kind, x: torch.Tensor, scale: torch.Tensor = ONE) -> torch.Tensor:
    """What a cache of this format returns."""
    return dequantise(kind.quantise(x.unsqueeze(-1), scale), scale, torch.float32).squeeze(-1)


codes = torch.arange(256, dtype=torch.uint8)
rows = {}
for kind, mantissa in MANTISSA.items():
    numbers = codes.view(kind.dtype).float()
    finite = numbers[numbers.isfinite()].unique()  # 0 and -0 are one
    x = torch.logspace(math.log2(SMALLEST_NORMAL[kind]), math.log2(kind.largest), LEVELS * 16, base=2.0)
    error = ((rounded(kind, x) - x).abs() / x).max().item()
    half = 2.0 ** -(mantissa + 1)
    rows[kind.name] = {
        "numbers": len(finite),
        "largest": finite.max().item(),
        "smallest above 0": finite[finite > 0].min().item(),
        "largest error, predicted": half / (1 + half),
        "largest error": error,
        "powers of two": math.log2(kind.largest / SMALLEST_NORMAL[kind]),
    }
    assert math.isclose(error, half / (1 + half), rel_tol=1e-2)
said = pd.DataFrame(rows).T
assert said["numbers"].tolist() == [256 - 2 - 1, 256 - 2 - 6 - 1]
assert said["largest"].tolist() == [448, 57344]
print("numbers of e4m3 and e5m2:", *(f"{count:.0f}" for count in said["numbers"]), "as predicted")

x = torch.logspace(-12, 12, 6000, base=2.0)
int8 = (x * 127 / E4M3.largest).round().clamp(-127, 127) * E4M3.largest / 127  # the same end
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
lines = (("int8", int8, "0.6", ":"), ("e5m2", rounded(E5M2, x), ORANGE, "--"), ("e4m3", rounded(E4M3, x), BLUE, "-"))
for name, back, colour, style in lines:
    axes.plot(x, ((back - x).abs() / x).clamp_min(1e-4), style, color=colour, label=name, linewidth=0.8)
axes.set(xscale="log", yscale="log", ylim=(1e-3, 2), xlabel="number, scale 1", ylabel="error, as a share of it")
axes.set_xscale("log", base=2)
axes.legend()
plt.show()
table(said, {**dict.fromkeys(said, "{:.4g}"), "largest error": "{:.2%}", "largest error, predicted": "{:.2%}"})

# %% [markdown]
# An integer's error is absolute: small numbers vanish. A float's is relative, and the same over its whole range. That
# will decide how wrong a scale may be.
#
# ### Beyond the end
#
# **Predict** what 500 becomes in e4m3, and 100,000 in e5m2: in torch, and in Triton's interpreter. Then: a key with one
# infinite number is in the cache. What is the attention of the tokens that see it?

# %%
CAST = """
import sys, torch, triton, triton.language as tl

@triton.jit
def cast(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))

x = torch.tensor([float(word) for word in sys.argv[1:]])
y = torch.zeros(len(x), dtype=torch.float8_e4m3fn)
cast[(1,)](x, y, N=len(x))
print(*y.float().tolist())
"""
TOO_LARGE = [440.0, 448.0, 480.0, 500.0, 1e3, 1e5, 1e6, math.inf]
x = torch.tensor(TOO_LARGE)
casts = {"e4m3, torch": x.to(E4M3.dtype).float(), "e5m2, torch": x.to(E5M2.dtype).float()}
if TRITON:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "cast.py"  # Triton reads a kernel's source from its file
        script.write_text(CAST)
        command = [sys.executable, str(script), *map(str, TOO_LARGE)]
        interpreting = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=interpreting, capture_output=True, text=True, check=True)
    casts["e4m3, Triton's interpreter"] = torch.tensor([float(word) for word in done.stdout.split()])
casts |= {f"{name}, as we store it": rounded(kind, x) for name, kind in (("e4m3", E4M3), ("e5m2", E5M2))}
assert torch.equal(casts["e4m3, as we store it"], rounded(E4M3, x.clamp(max=448.0)))
assert casts["e5m2, torch"][-2:].isinf().all() and rounded(E5M2, x).isfinite().all()

generator = torch.Generator().manual_seed(0)
q, k, v = torch.randn(3, 64, 64, generator=generator)
k[3, 5] = 1e6  # one number of one key
after = {}
for name, stored in (("cast", k.to(E5M2.dtype).float()), ("clamped", rounded(E5M2, k))):
    weights = torch.softmax((q @ stored.T / 8).masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf), -1)
    after[name] = int((weights @ v).isnan().any(1).sum())
assert after == {"cast": int((q[3:, 5] > 0).sum()), "clamped": 0}
print(f"of 61 tokens that see the infinite key {after['cast']} attend to NaN; clamped, none does")
columns = {name: [f"{number:g}" for number in found.tolist()] for name, found in casts.items()}
pd.DataFrame(columns, index=[f"{number:g}" for number in TOO_LARGE])

# %% [markdown]
# A cast beyond the end is nobody's promise: the end, infinity, NaN, or a small number, by library and version. So
# everything is clamped first. Where the query's number is positive the score is infinite, and a softmax of infinity is
# NaN, from that token on, to the end of the sequence. (Where it is negative the key is never seen again.)
#
# ## 2. Which scale?
#
# What is stored is x / scale. One scale for all keys of a layer must be found beforehand, from other text. Here are
# keys and values of titan-tiny, 1,000 tokens of text that it never saw, and the scales that `titan calibrate-kv` found
# for it.
#
# **Predict.** With numbers spread evenly over a power of two (in their logarithm) an error is even within half a step:
# its root mean square over that of the numbers is 2^-(m+1) / sqrt(3) · sqrt(2 ln 2 / 3). What is that for both formats?
# Then: by what factor may the scale be too large before the error doubles, in e4m3 and in int8? And too small?

# %%
TOKENS, WINDOW = 1000, 1023
BEGIN = 0  # the token that a document begins with, as in training
held_out = [d.text for d in read_held_out()]


def windows(llm: LLM, count: int) -> list[list[int]]:
    """Token ids of so many windows of held-out text."""
    ids = [i for text in held_out[:12] for i in (BEGIN, *llm.engine.tokenizer.encode(text))]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def tiny(kind: str) -> LLM:
    """titan-tiny in float32 with this cache."""
    return LLM(TINY, device="cpu", dtype="float32", kv_cache_dtype=kind, num_blocks=128, max_num_seqs=2)


exact = tiny("auto")
exact.generate(windows(exact, 1)[0][:TOKENS], SamplingParams(temperature=0, max_tokens=1), progress=False)
calibrated = tiny("fp8_e4m3").engine.model
scales = [block.scales for block in calibrated.modules() if isinstance(block, QuantisedAttention)]
sides = {}  # (layer, side) -> its numbers [tokens, Hkv, D], its scale
for layer, both in enumerate(scales):
    for side, numbers, scale in zip("kv", exact.engine.kv.layer(layer), both, strict=True):
        numbers = numbers.flatten(0, 1)
        sides[layer, side] = numbers[numbers.abs().amax((1, 2)) > 0], scale.clone()
assert all(len(numbers) == TOKENS for numbers, _ in sides.values())


def off(x: torch.Tensor, back: torch.Tensor) -> float:
    """Root mean square of the error over that of the numbers."""
    return ((back - x).square().mean() / x.square().mean()).sqrt().item()


def integer(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What int8 returns, with the end where e4m3 has it."""
    step = scale * E4M3.largest / 127
    return (x / step).round().clamp(-127, 127) * step


def in_format(kind):
    """The format with its own end at the same number."""
    return lambda x, scale: rounded(kind, x, scale * E4M3.largest / kind.largest)


WAYS = {"e4m3": in_format(E4M3), "e5m2": in_format(E5M2), "int8": integer}
FACTORS = 2.0 ** torch.arange(-6, 15)
curves = {way: [] for way in WAYS}
for factor in FACTORS:
    for way, back in WAYS.items():
        errors = [off(x, back(x, scale * factor)) for x, scale in sides.values()]
        curves[way].append(float(np.sqrt(np.mean(np.square(errors)))))
curves = pd.DataFrame(curves, index=FACTORS.numpy())
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
for way, colour, style in zip(WAYS, (BLUE, ORANGE, "0.5"), ("o-", "s--", "^:"), strict=True):
    axes.plot(curves.index, curves[way], style, color=colour, label=way, markersize=4)
axes.axvline(1, color="0.7")
axes.set(ylim=(3e-3, 2), xlabel="scale / calibrated scale", ylabel="error of keys and values", yscale="log")
axes.set_xscale("log", base=2)
axes.legend()
plt.show()


def room(way: str) -> float:
    """The largest factor at which the error is less than twice that of the calibrated scale."""
    return float(curves.index[(curves[way] < 2 * curves.loc[1.0, way]) & (curves.index >= 1)].max())


expected = {
    way: 2.0 ** -(m + 1) / math.sqrt(3) * math.sqrt(2 * math.log(2) / 3) for way, m in (("e4m3", 3), ("e5m2", 2))
}
for way, predicted in expected.items():
    print(f"{way}: predicted {predicted:.2%}, found {curves.loc[1.0, way]:.2%}")
    assert math.isclose(curves.loc[1.0, way], predicted, rel_tol=0.15)
print("too large by this much and the error is not yet doubled:", *(f"{way} {room(way):.0f} x" for way in WAYS))
assert room("e4m3") >= 32 and room("int8") <= 2
assert curves.loc[1 / 16, "e4m3"] > 5 * curves.loc[1.0, "e4m3"]
own = [
    off(x, rounded(PER_TOKEN, x.flatten(0, 1), PER_TOKEN.scales_of(x).flatten()[:, None]).view_as(x))
    for x, _ in sides.values()
]
print(f"a scale for each key and value: {float(np.sqrt(np.mean(np.square(own)))):.2%}")

# %% [markdown]
# With the right scale int8 is the best of the three: all its bits are digits. But it is right for one size of numbers
# only. With floats a scale must not be too small, because then it clips, and above that nearly everything will do. A
# scale a token gains hardly anything over a good one for all. What it buys is that it can't be bad: no calibration, no
# text that is unlike the one it was found with.
#
# ## 3. What does it cost to write?
#
# Turn the key, find its largest number, divide, clamp, cast, write; then the value. The framework does it step by step,
# the solution's kernel in one launch. **Predict** for heads of 64, 8 for queries and 2 for keys, in float16 with a
# scale a token: by how much do the step-by-step bytes exceed the fewest? Each step reads what the one before wrote.

# %%
if TRITON:
    with ThreadPoolExecutor(2) as pool:
        written = dict(zip(WHO, pool.map(lambda who: gate("write_gates", "write", who), WHO), strict=True))
    for who, found in written.items():
        print(f"{who}: {found['operations']} operations of torch, {found['bytes']:.2f} x the fewest bytes")
        assert found["error"] <= 1
    assert written["solution"]["operations"] == 0 and written["solution"]["bytes"] < 1.1 < written["framework"]["bytes"]
else:
    print("bytes of the write: NOT MEASURED HERE: Triton is not installed (it is Linux only)")

# %% [markdown]
# ## 4. What does a model lose?
#
# titan-tiny reads 2,046 tokens of held-out text with each format. Every query attends to what the cache holds. Two more
# have e4m3 with scales that are 32 times too large, and too small.
#
# The mean loss says little on so few tokens: errors go both ways. But the same tokens are predicted with both caches,
# so take differences, token by token. Their mean is what the format costs, its standard error says whether that is
# more than chance, and the mean of their sizes says how much noise there is.
#
# **Predict** the order of the noise, from the errors above, and the two that differ by a factor of two. And which of
# the formats cost more than chance?


# %%
def log_probabilities(llm: LLM) -> np.ndarray:
    """Of each held-out token."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for output in llm.generate(windows(llm, 2), params, progress=False):
        told = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        found += [candidates[token].logprob for token, candidates in told if candidates is not None]
    return np.array(found)


def scaled(factor: float) -> LLM:
    """titan-tiny with e4m3, its scales off by a factor."""
    llm = tiny("fp8_e4m3")
    for block in llm.engine.model.modules():
        if isinstance(block, QuantisedAttention):
            for side, scale in zip("kv", block.scales, strict=True):
                block.set_scale(side, float(scale) * factor)
    return llm


caches = {name: tiny(name) for name in (E4M3.name, E5M2.name, PER_TOKEN.name)}
caches |= {"fp8_e4m3, scales x 32": scaled(32), "fp8_e4m3, scales / 32": scaled(1 / 32)}
base, rows = log_probabilities(exact), {}
for name, llm in caches.items():
    lost = base - log_probabilities(llm)
    rows[name] = {
        "nats a token": lost.mean() - base.mean(),
        "more": lost.mean(),
        "standard error": lost.std() / math.sqrt(len(lost)),
        "perplexity": math.expm1(lost.mean()),
        "noise": np.abs(lost).mean(),
    }
losses = pd.DataFrame(rows).T
noise = losses["noise"]
print(f"exact: {-base.mean():.4f} nats a token over {len(base):,} tokens")
print(f"noise of e5m2 over that of e4m3: {noise['fp8_e5m2'] / noise['fp8_e4m3']:.2f}")
assert 1.5 < noise["fp8_e5m2"] / noise["fp8_e4m3"] < 3
assert 0.5 < noise["fp8_per_token_head"] / noise["fp8_e4m3"] < 1.3
assert noise["fp8_e4m3, scales x 32"] < 1.5 * noise["fp8_e4m3"] < noise["fp8_e4m3, scales / 32"]
assert losses.loc["fp8_e4m3, scales / 32", "perplexity"] > 0.05
formats = {"more": "{:+.4f}", "perplexity": "{:+.2%}"}
table(losses, {**dict.fromkeys(losses, "{:.4f}"), **formats})

# %% [markdown]
# Eight bits are noise that averages out; a clipped key is a mistake that doesn't. The report has the same over 24,000
# tokens.
#
# ### And what is gained?
#
# **Predict** the bytes of a token: for titan-tiny (8 layers, 2 key heads of 64) and for one layer of an 8B model (8 of
# 128). Scales are float32, one for each key and each value.


# %%
def bytes_of(kv_heads: int, dim: int, kind: str) -> int:
    """A token's keys and values in one layer; `auto` has 16 bits."""
    if kind == "auto":
        return 2 * kv_heads * dim * 2
    return 2 * kv_heads * (dim + (4 if FORMATS[kind].per_token else 0))


rows = {}
for kind in ("auto", E4M3.name, E5M2.name, PER_TOKEN.name):
    llm = LLM(TINY, device="cpu", dtype="bfloat16", kv_cache_dtype=kind, num_blocks=16, max_num_seqs=1)
    predicted = 8 * bytes_of(2, 64, kind)
    assert llm.engine.model.kv_spec.bytes_per_token == predicted
    layer = bytes_of(8, 128, kind)
    rows[kind] = {"titan-tiny": predicted, "8B, one layer": layer, "of 16 bits": layer / bytes_of(8, 128, "auto")}
print("every prediction is exact: 4,096, 2,048, 2,048 and 2,176 bytes")
table(pd.DataFrame(rows).T, {"titan-tiny": "{:,.0f}", "8B, one layer": "{:,.0f}", "of 16 bits": "{:.3f}"})

# %% [markdown]
# ## 5. Is it faster for latents too?
#
# DeepSeek-V3 keeps a latent of 512 numbers and a rotary key of 64, for 128 heads. Packed, the latent is e4m3 with a
# scale for each 128 numbers, and the rotary key stays in bfloat16.
#
# **Predict.** Bytes of an entry, before and after. A head does 2 (L + R) + 2 L FLOPs with it, whatever its bytes. An
# H200 reaches about 790 TFLOP/s and 4.3 TB/s: from how many heads on does a decode compute longer than it reads, before
# and after? So what does FP8 gain with all 128 heads on one GPU, and with 16 (eight GPUs)?

# %%
H, L, R = 128, 512, 64
H200 = Roof(790e12, 4.3e12, "bfloat16")
packed = PackedLatents(L, R)
entry = {"bf16": 2 * (L + R), "FP8": packed.entry_bytes}
assert packed.entry_bytes == L + 4 * L // 128 + 2 * R
latents = torch.randn(256, L, generator=generator) * torch.tensor([0.01, 1.0, 1.0, 100.0]).repeat_interleave(128)
rotary = torch.randn(256, R, generator=generator).bfloat16().float()
stored = packed.pack(latents, rotary)
assert stored.shape[-1] == packed.entry_bytes
back = PackedLatents(L, R, torch.float32).unpack(packed.pack(latents, rotary)).squeeze(-2)
assert torch.equal(back[:, L:], rotary)
groups = [off(x, y) for x, y in zip(latents.split(128, 1), back[:, :L].split(128, 1), strict=True)]
print(f"an entry: {entry['bf16']:,} bytes, packed {entry['FP8']:,}: {entry['bf16'] / entry['FP8']:.2f} x fewer")
print("error of groups of 0.01, 1, 1 and 100:", *(f"{error:.2%}" for error in groups), "- rotary keys: none")
assert max(groups) < 0.03

ridge = {name: H200.ridge * size / (2 * (2 * L + R)) for name, size in entry.items()}
print("ridge:", *(f"{name} {heads:.1f} heads" for name, heads in ridge.items()))
assert [round(heads) for heads in ridge.values()] == [97, 55]


def step_seconds(heads: int, size: int) -> float:
    """PREDICTION: 64 sequences of 8,192 tokens, one layer; reads and arithmetic hide each other."""
    work = attention_costs.mla_absorbed(64, 1, heads, L, R, 2, prefix=8191, kv_bytes=size / (L + R))
    return H200.seconds(work)


heads = np.arange(1, H + 1)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for (name, size), colour, style in zip(entry.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
    axes.plot(heads, [step_seconds(n, size) * 1e6 for n in heads], style, color=colour, label=f"{name} cache")
    axes.axvline(ridge[name], color=colour, linestyle=":", linewidth=1)
axes.set(xlabel="heads on the GPU", ylabel="µs", title="PREDICTION: an H200, 64 x 8,192 latents", ylim=(0, None))
axes.legend()
plt.show()
gain = {n: step_seconds(n, entry["bf16"]) / step_seconds(n, entry["FP8"]) for n in (16, 128)}
print("FP8 is faster by:", *(f"{value:.2f} x with {n} heads" for n, value in gain.items()))
assert gain[16] > 1.6 and gain[128] < 1.01

# %% [markdown]
# A group of small latents beside one of large ones loses nothing: each has its scale. And FP8 moves the ridge without
# moving arithmetic: with all heads on one GPU it saves memory, not time. (Converting is work too. It is not counted
# here, and DeepSeek counts more clocks for it than for the products.)
#
# A kernel must first deserve that ridge: an entry has to be read once, for all heads, and as keys *and* values. What do
# the two versions ask for, of 16 heads?

# %%
if TRITON:
    with ThreadPoolExecutor(2) as pool:
        loaded = dict(zip(WHO, pool.map(lambda who: gate("kernel_gates", "latents", who), WHO), strict=True))
    for who, found in loaded.items():
        print(f"{who}: {found['a token']:,.0f} bytes a cached token, {found['decode']:.1f} x an entry")
        assert found["error"] <= 1
    assert loaded["solution"]["a token"] == entry["bf16"]
    assert loaded["framework"]["a token"] == 16 * 2 * (2 * L + R)  # each head: L + R as a key, L as a value
else:
    print("bytes of the latent kernels: NOT MEASURED HERE: Triton is not installed (it is Linux only)")

# %% [markdown]
# ### On a GPU
#
# The engine's kernels with each format, beside 16 bits.

# %%
if torch.cuda.is_available():
    from phase3_paged_attention.measures.attention_inputs import decode
    from phase3_paged_attention.measures.attention_timing import OURS, OURS_ALONE, Bench, timed

    rows = {}
    for kind in ("auto", E4M3.name, PER_TOKEN.name, E5M2.name):
        case = decode(64, 8192, **({} if kind == "auto" else {"kv_format": kind}))
        micros = timed(case, Bench.within(60, "cuda", 5, False), must=OURS_ALONE).timings[OURS].median * 1e6
        rows[kind] = {
            "µs": micros,
            "TB/s": case.bytes / micros / 1e6,
            "bytes of 16 bits": case.bytes / decode(64, 8192).bytes,
        }
    timed_rows = pd.DataFrame(rows).T
    timed_rows["time of 16 bits"] = timed_rows["µs"] / timed_rows.loc["auto", "µs"]
    display(table(timed_rows, dict.fromkeys(timed_rows, "{:.2f}")))
else:
    print("times by format: NOT MEASURED HERE: they need an NVIDIA GPU; there,", end=" ")
    print("`python -m phase3_paged_attention.benchmark paged_kinds latent_decode` takes them too")

# %% [markdown]
# ## Your turn
#
# 1. `make start-phase3` copies the framework into `workspace/phase3_paged_attention`.
# 2. Write keys in one launch (task 3.4), and read latents once (task 3.5); `make hint-phase3 TASK=3.4` helps.
# 3. Set `MINE` below to `"mine"`, restart the kernel and run this notebook again.
# 4. Before you run it: which of the numbers will change, and to what?

# %%
MINE = "framework"  # change to "mine"

if TRITON:
    found = gate("write_gates", "write", MINE)
    print(f"write: {found['operations']} operations, {found['bytes']:.2f} x the fewest bytes,", end=" ")
    print(f"error {found['error']:.2f} of what is allowed")
    found = gate("kernel_gates", "latents", MINE)
    print(f"latents: {found['decode']:.1f} x an entry, error {found['error']:.2f} of what is allowed ({found['step']})")
