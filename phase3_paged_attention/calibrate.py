"""`titan calibrate-kv`: the scales of an FP8 cache, found by looking at what a cache holds.

An engine with an unquantised cache reads text. What it leaves in the cache is what is to be quantised, turned keys and
values, so the largest number of each layer is found there and no module has to be watched. The text is the training
part of the corpus (Python's standard library): every machine has it, and held-out text stays unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from phase0_prototype import corpus
from phase0_prototype.errors import UserError
from phase0_prototype.hub import resolve_model
from phase0_prototype.sampling_params import SamplingParams
from phase2_rope.deepseek import DeepseekConfig
from phase3_paged_attention.kv_format import FORMATS, LEAST_SCALE
from phase3_paged_attention.kv_scales import FILE, KVScales, write_scales
from phase3_paged_attention.llm import LLM

WINDOW = 512  # tokens that are read in one piece
BLOCK = 16


def calibrate(model: str, kv_cache_dtype: str = "fp8_e4m3", tokens: int = 8192, out: str | Path = "") -> str:
    """Find scales and write their file.

    Args:
        model: directory, shipped name or hub id.
        kv_cache_dtype: a format with one scale for each tensor.
        tokens: of text to look at.
        out: the file; by default `kv_cache_scales.json` beside the checkpoint, where engines look for it.

    Returns:
        One line that says what was found.

    Raises:
        UserError: the format needs no scales, the model keeps latents or has no tokenizer, the file can't be written.
    """
    if kv_cache_dtype not in FORMATS or FORMATS[kv_cache_dtype].per_token:
        raise UserError(f"kv_cache_dtype={kv_cache_dtype!r} has no scales to calibrate: give fp8_e4m3 or fp8_e5m2")
    if tokens < 1:
        raise UserError(f"tokens={tokens} is not allowed: give a positive integer")
    file = Path(out) if out else resolve_model(model) / FILE
    llm = LLM(model, block_size=BLOCK, num_blocks=WINDOW // BLOCK, max_num_seqs=1)
    scales = scales_for(llm, kv_cache_dtype, texts(), tokens)
    try:
        write_scales(file, scales)
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}): give another file with --out") from None
    largest = FORMATS[kv_cache_dtype].largest
    top = (f"{name} {largest * min(s):.3g} to {largest * max(s):.3g}" for name, s in _sides(scales))
    return f"wrote {file}: {len(scales.k_scale)} layers, {scales.tokens:,} tokens; largest {', '.join(top)}"


def scales_for(llm: LLM, kv_cache_dtype: str, documents: Iterable[str], tokens: int) -> KVScales:
    """Scales that keep all keys and values of these tokens within the format.

    Args:
        llm: with an unquantised cache.
        kv_cache_dtype: the format.
        documents: texts; a window of each is read, from its beginning.
        tokens: stop after so many.

    Raises:
        UserError: the model keeps latents, or has no tokenizer.
    """
    engine = llm.engine
    if isinstance(engine.config, DeepseekConfig):
        raise UserError("latents are scaled by themselves, token by token: there is nothing to calibrate")
    if engine.tokenizer is None:
        raise UserError("this checkpoint has no tokenizer.json: there is no text to calibrate with")
    largest = [[0.0, 0.0] for _ in range(engine.config.num_layers)]
    seen, start = 0, [] if engine.config.bos_token_id is None else [engine.config.bos_token_id]
    for document in documents:
        ids = [*start, *engine.tokenizer.encode(document)][: min(engine.max_model_len - 1, tokens - seen)]
        llm.generate(ids, SamplingParams(temperature=0, max_tokens=1), progress=False)
        for layer, found in enumerate(largest):
            found[:] = map(max, found, map(_largest, engine.kv.layer(layer)))  # blocks that were written before too
        seen += len(ids)
        if seen >= tokens:
            break
    top = FORMATS[kv_cache_dtype].largest
    k, v = (tuple(max(side / top, LEAST_SCALE) for side in sides) for sides in zip(*largest, strict=True))
    return KVScales(FORMATS[kv_cache_dtype].name, seen, k, v)


def texts() -> Iterator[str]:
    """The training part of the corpus, files in an order that mixes its packages, the same on every machine."""
    found = sorted(corpus.documents(held_out=False), key=lambda document: document.path[::-1])
    return (document.text for document in found)


def _largest(side: Tensor) -> float:
    return float(side.float().abs().max())


def _sides(scales: KVScales) -> tuple[tuple[str, tuple[float, ...]], ...]:
    return ("key", scales.k_scale), ("value", scales.v_scale)
