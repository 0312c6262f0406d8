"""The workloads that gates and benchmarks time: the same prompts through our engine and through `transformers`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from phase0_prototype.checkpoint import write_checkpoint
from phase0_prototype.llm import LLM
from phase0_prototype.sampling_params import SamplingParams

TINY = "titan-tiny"
SHAPE = "tinyllama-1.1b"
LENGTHS_OF_8 = (5, 17, 33, 64, 80, 96, 120, 128)  # prompts of the batch of eight


@dataclass(frozen=True)
class Run:
    """One timed generation.

    Attributes:
        prefill: seconds until every prompt has its first token.
        decode: seconds from there to the end.
        steps: tokens of each sequence after the first.
        token_ids: what was generated, one list a prompt.
    """

    prefill: float
    decode: float
    steps: int
    token_ids: list[list[int]]

    @property
    def per_step(self) -> float:
        """Seconds of one decode step."""
        return self.decode / self.steps


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Token ids drawn uniformly; special ids at the start of the vocabulary are left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(16, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def run_ours(llm: LLM, prompts: list[list[int]], new_tokens: int) -> Run:
    """Greedy generation of exactly `new_tokens` for each prompt, all in one batch."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    began = time.perf_counter()
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    done: dict[str, list[int]] = {}
    first: dict[str, float] = {}
    while engine.has_unfinished():
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter())
            if output.finished:
                done[output.request_id] = output.outputs[0].token_ids
    ended = time.perf_counter()
    prefilled = max(first.values())
    return Run(prefilled - began, ended - prefilled, new_tokens - 1, [done[i] for i in ids])


def run_alone(llm: LLM, prompts: list[list[int]], new_tokens: int) -> Run:
    """The same prompts, one after the other."""
    runs = [run_ours(llm, [prompt], new_tokens) for prompt in prompts]
    seconds = sum(r.prefill for r in runs), sum(r.decode for r in runs)
    return Run(*seconds, new_tokens - 1, [r.token_ids[0] for r in runs])


def in_turns(subjects: Mapping[str, Callable[[], Run]], rounds: int, console: Console) -> dict[str, list[Run]]:
    """Run every subject once to warm up, then `rounds` times in turns, in the opposite order every other round."""
    runs: dict[str, list[Run]] = {name: [] for name in subjects}
    for round_ in range(rounds + 1):
        for name in subjects if round_ % 2 else reversed(list(subjects)):
            with console.status(f"{name}, round {round_} of {rounds}" if round_ else f"{name}, warming up"):
                run = subjects[name]()
            if round_:
                runs[name].append(run)
    return runs


def bytes_per_step(llm: LLM, prompt_length: int, new_tokens: int) -> float:
    """Bytes that a decode step of one sequence must read on average: the weights, and the cache at half of the way."""
    model = llm.engine.model
    return float(model.weight_bytes + model.kv_spec.bytes_per_token * (prompt_length + new_tokens / 2))


def load_transformers(directory: Path, dtype: torch.dtype, device: str) -> Any:
    """The same checkpoint in `transformers`, with its default (sdpa) attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()


def run_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> Run:
    """The same through `generate`; all prompts must have one length. The first token's time is taken by a criterion."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    stamps: list[float] = []

    class Stamp(StoppingCriteria):  # type: ignore[misc]
        """Notes the time after each token and never stops."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor(prompts, device=model.device)
    began = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([Stamp()]),
    )
    return Run(stamps[0] - began, stamps[-1] - stamps[0], new_tokens - 1, out[:, ids.shape[1] :].tolist())


@contextmanager
def random_checkpoint(shape: str, kept: Path | None = None) -> Iterator[Path]:
    """A seeded random checkpoint of a published shape: the one in `kept`, or a temporary one."""
    if kept is not None and (kept / "config.json").is_file():
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix=f"titan-{shape}-") as directory:
        yield write_checkpoint(shape, Path(directory) / shape)
