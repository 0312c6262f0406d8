"""Who attends: every backend is asked why it can't, the first that has no reason is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from module0_profiling.course.errors import CourseError
from module0_profiling.course.parts import Use, resolve, workspace_of
from phase0_prototype.attention import AttentionSpec
from phase0_prototype.errors import UserError
from phase2_rope.deepseek import LatentSpec
from phase2_rope.engine import ROOM as ROPE
from phase3_paged_attention.attention import TritonAttention, why_not_triton
from phase3_paged_attention.flashinfer_attention import FlashInferAttention
from phase3_paged_attention.latent_format import PackedLatents
from phase3_paged_attention.packed_latents import PackedLatentTorch

ROOM = __name__.rpartition(".")[0]
Make = Callable[[AttentionSpec, torch.device], Any]


@dataclass(frozen=True)
class Candidate:
    """A backend that was asked.

    Attributes:
        name: as in `--attention-backend`.
        backend: None where it can't even be made.
        reasons: why it can't serve the model on this device; empty: it can.
    """

    name: str
    backend: Any
    reasons: tuple[str, ...]


def candidates(
    specs: Sequence[AttentionSpec],
    device: torch.device,
    use: Use,
    latent: LatentSpec | None = None,
    more: Mapping[str, Make] = MappingProxyType({}),
) -> list[Candidate]:
    """Every backend with its reasons, best first.

    Args:
        specs: the different kinds of layers of the model.
        device: that it runs on.
        use: whose kernels.
        latent: the shape of layers that attend to latents (MLA).
        more: what a later phase adds for keys and values, asked first.
    """
    makers = {**more, **_makers(use)} if latent is None else _latent_makers(use, latent)
    return [_ask(name, make, specs, device) for name, make in makers.items()]


def choose(asked: Sequence[Candidate], wanted: str = "auto") -> Candidate:
    """The backend that is wanted, or the first that can.

    Raises:
        UserError: it can't, with all its reasons.
    """
    for candidate in asked:
        if wanted == "auto" and fits(candidate):
            return candidate
        if wanted == candidate.name:
            if candidate.reasons:
                can = ", ".join(c.name for c in asked if not c.reasons)
                raise UserError(
                    f"attention_backend={wanted!r} can't be used: {'; '.join(candidate.reasons)}. Those that can: {can}"
                )
            return candidate
    reasons = "; ".join(f"{c.name}: {', '.join(c.reasons)}" for c in asked)
    raise UserError(f"no attention backend can run this model: {reasons}")


def fits(candidate: Candidate) -> bool:
    """Whether it may be chosen by itself. "mine" must be asked for: `--use phase3=mine` already makes triton the
    learner's."""
    return not candidate.reasons and candidate.name != "mine"


def explained(asked: Sequence[Candidate], chosen: Candidate | None) -> list[tuple[str, str]]:
    """(name, why it was or was not chosen) of each, in order."""
    said = []
    for candidate in asked:
        if candidate is chosen:
            said.append((candidate.name, "chosen: the first that can"))
        elif candidate.reasons:
            said.append((candidate.name, "; ".join(candidate.reasons)))
        else:
            said.append((candidate.name, f"could run, ask for it: --attention-backend {candidate.name}"))
    return said


def _ask(name: str, make: Make, specs: Sequence[AttentionSpec], device: torch.device) -> Candidate:
    try:
        backend = make(specs[0], device)
    except CannotServe as cannot:
        return Candidate(name, None, cannot.args)
    except (ImportError, CourseError) as error:
        return Candidate(name, None, (str(error).splitlines()[0],))
    reasons = dict.fromkeys(reason for spec in specs for reason in backend.why_not(spec, device))
    return Candidate(name, backend, tuple(reasons))


class CannotServe(Exception):
    """A backend that can't be made; the arguments are the reasons."""


def _mine(use: Use) -> Use:
    """The same with the learner's parts of this phase; CannotServe where there are none."""
    if not workspace_of(ROOM).is_dir():
        raise CannotServe("your kernels are not there yet: make start-phase3")
    return use.choose("phase3", "mine")


def _makers(use: Use) -> dict[str, Make]:
    """How each backend for keys and values is made, best first."""

    def triton(spec: AttentionSpec, device: torch.device, whose: Use = use) -> Any:
        if reasons := why_not_triton(spec, device):
            raise CannotServe(*reasons)
        paged, work = (resolve(ROOM, part, whose) for part in ("kernels.paged", "work"))
        return TritonAttention(spec, device, paged, work)

    return {
        "triton": triton,
        "flashinfer": FlashInferAttention,
        "mine": lambda spec, device: triton(spec, device, _mine(use)),
        "torch": lambda spec, device: resolve(ROOM, "torch_attention", use).PagedTorchAttention(),
    }


def _latent_makers(use: Use, latent: LatentSpec) -> dict[str, Make]:
    """How each backend for latents is made, best first."""

    def triton(spec: AttentionSpec, device: torch.device, whose: Use = use) -> Any:
        if reasons := why_not_triton(spec, device):
            raise CannotServe(*reasons)
        from phase3_paged_attention.latent_attention import TritonLatentAttention

        mla, work = (resolve(ROOM, part, whose) for part in ("kernels.mla", "work"))
        return TritonLatentAttention(spec, device, mla, work, latent)

    def flashinfer(spec: AttentionSpec, device: torch.device) -> Any:
        raise CannotServe("FlashInfer's kernel for latents is a peer of the benchmark only")

    def in_torch(spec: AttentionSpec, device: torch.device) -> Any:
        if spec.kv_cache_dtype == "auto":
            return resolve(ROPE, "mla", use).PagedLatentAttention()
        return PackedLatentTorch(PackedLatents(latent.latent, latent.rope, spec.dtype or torch.bfloat16))

    return {
        "triton": triton,
        "flashinfer": flashinfer,
        "mine": lambda spec, device: triton(spec, device, _mine(use)),
        "torch": in_torch,
    }
