"""What the RoPE kernels are compared with. A peer that is not here says why, and is not measured.

Each works on `kernels.counts.Inputs` on a GPU. Where a peer wants another layout or type of its tables, that is
prepared outside of what is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from module0_profiling import rooms
from phase2_rope.kernels.counts import PAGE, Inputs

VLLM_SOURCE = rooms.ROOT / "build" / "peers" / "vllm" / "pos_encoding_kernels.cu"
VLLM_MISSING = f"vllm is not installed, and {VLLM_SOURCE.relative_to(rooms.ROOT)} with its headers is not there"
NO_GPU = "needs an NVIDIA GPU"
_SIGNATURE = re.compile(r"^void rotary_embedding\((?P<arguments>[^{;]*)\)\s*\{", re.MULTILINE)


@dataclass(frozen=True)
class Peer:
    """A kernel of another project.

    Attributes:
        name: in figures.
        why_not: an empty text, or the reason why it cannot run here.
        prepare: inputs -> a callable that turns q and k once, and writes them where `writes`.
        writes: it also writes k and v into the paged cache.
        in_place: q and k are turned where they lie.
    """

    name: str
    why_not: Callable[[], str]
    prepare: Callable[[Inputs], Callable[[], object]]
    writes: bool = False
    in_place: bool = True


def _flat(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """q [T, Hq * D] and k [T, Hkv * D]: views, since the heads of a token are neighbours."""
    q, k, _ = inputs.qkv
    return q.flatten(1), k.flatten(1)


# vLLM: its CUDA kernel, as installed or built from its file; it takes cos and sin in the type of q.


def vllm_why_not() -> str:
    """Why vLLM's kernel cannot run."""
    if not torch.cuda.is_available():
        return NO_GPU
    if VLLM_SOURCE.is_file():
        try:
            _vllm_built()
        except Exception as error:  # a compiler, a header or a declaration that is not as expected
            return f"{VLLM_SOURCE.name} does not build: {_first_line(error)}"
        return ""
    if importlib.util.find_spec("vllm") is None:
        return VLLM_MISSING
    try:
        importlib.import_module("vllm._custom_ops")
    except Exception as error:  # it was built for another torch or CUDA
        return f"vllm does not load: {_first_line(error)}"
    return ""


def vllm(inputs: Inputs) -> Callable[[], object]:
    """`rotary_embedding` in place, 2-byte accesses, a block a token."""
    operation = _vllm_built() if VLLM_SOURCE.is_file() else importlib.import_module("vllm._custom_ops").rotary_embedding
    q, k = _flat(inputs)
    table, neox = inputs.cos_sin.to(q.dtype), not inputs.case.interleaved
    return lambda: operation(inputs.positions, q, k, inputs.case.dim, table, neox)


def binding(source: str) -> str:
    """C++ that offers `rotary_embedding` of vLLM's file to Python with six arguments; newer versions have two more.

    Raises ValueError when the file declares no such function.
    """
    match = _SIGNATURE.search(re.sub(r"//[^\n]*", "", source))
    if match is None:
        raise ValueError("no function rotary_embedding")
    arguments = " ".join(match["arguments"].split())
    more = ", 0, false" if "rope_dim_offset" in arguments else ""
    key = "k" if "optional" in arguments else "k.value()"
    return f"""#include <torch/extension.h>
#include <optional>
void rotary_embedding({arguments});
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{
    m.def("rotary_embedding", [](torch::Tensor positions, torch::Tensor q, std::optional<torch::Tensor> k,
                                 int64_t head_size, torch::Tensor cos_sin, bool neox) {{
        rotary_embedding(positions, q, {key}, head_size, cos_sin, neox{more});
    }});
}}
"""


@lru_cache(maxsize=1)
def _vllm_built() -> Callable[..., None]:
    from torch.utils.cpp_extension import load

    folder = VLLM_SOURCE.parent / "built"
    folder.mkdir(exist_ok=True)
    wrapper = folder / "binding.cpp"
    text = binding(VLLM_SOURCE.read_text())
    if not wrapper.is_file() or wrapper.read_text() != text:  # a new time stamp would build everything again
        wrapper.write_text(text)
    module: Any = load(
        "titan_vllm_rope",
        [str(VLLM_SOURCE), str(wrapper)],
        extra_include_paths=[str(VLLM_SOURCE.parent), str(VLLM_SOURCE.parent.parent)],
        build_directory=str(folder),
    )
    operation: Callable[..., None] = module.rotary_embedding
    return operation


# FlashInfer: float32 tables, 16-byte vectors. Its fused append quantises to FP8, which moves fewer bytes; what can be
# compared in bfloat16 is its RoPE followed by its append.


def flashinfer_why_not() -> str:
    """Why FlashInfer cannot run."""
    if not torch.cuda.is_available():
        return NO_GPU
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed: pip install flashinfer-python"
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # it was built for another torch or CUDA
        return f"flashinfer does not load: {_first_line(error)}"
    return ""


def flashinfer(inputs: Inputs) -> Callable[[], object]:
    """`apply_rope_with_cos_sin_cache_inplace`."""
    library: Any = importlib.import_module("flashinfer")
    q, k = _flat(inputs)
    neox, dim = not inputs.case.interleaved, inputs.case.dim
    turn = library.apply_rope_with_cos_sin_cache_inplace
    return lambda: turn(inputs.positions, q, k, dim, inputs.cos_sin, is_neox=neox)


def flashinfer_and_append(inputs: Inputs) -> Callable[[], object]:
    """The same, then `append_paged_kv_cache`: every slot is a sequence of its own, whose last token is written."""
    library: Any = importlib.import_module("flashinfer")
    turn = flashinfer(inputs)
    _, k, v = inputs.qkv
    blocks, places = inputs.slots
    tokens = blocks.shape[0]
    page = inputs.keys.shape[1] if tokens else PAGE
    count = torch.arange(tokens + 1, dtype=torch.int32, device=k.device)
    at, last = places.int(), places.int() + 1
    pages, batch = blocks.int(), count[:-1]
    assert page >= int(last.max())

    def both() -> None:
        turn()
        library.append_paged_kv_cache(k, v, batch, at, (inputs.keys, inputs.values), pages, count, last, "NHD")

    return both


# Liger: Triton, one program a token. It takes cos and sin of each token, and q as [B, H, S, D] over [B, S, H, D].


def liger_why_not() -> str:
    """Why Liger cannot run."""
    if not torch.cuda.is_available():
        return NO_GPU
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: pip install liger-kernel"
    return ""


def liger(inputs: Inputs) -> Callable[[], object]:
    """`rope_forward` on copies of q and k without gaps: on slices it would copy them itself at every call."""
    rope_forward: Any = importlib.import_module("liger_kernel.ops.rope").rope_forward
    q, k = (x.contiguous()[None].transpose(1, 2) for x in inputs.qkv[:2])
    cos, sin = (part[None].to(q.dtype) for part in _full(inputs))
    return lambda: rope_forward(q, k, cos, sin)


# PyTorch, as transformers writes it.


def no_reason() -> str:
    """It always runs."""
    return ""


def eager(inputs: Inputs) -> Callable[[], object]:
    """`apply_rotary_pos_emb` of transformers, operation by operation; cos and sin of the tokens are given."""
    cos, sin = (part[:, None].to(inputs.activation.dtype) for part in _full(inputs))
    q, k, _ = inputs.qkv
    return lambda: apply_rotary_pos_emb(q, k, cos, sin)


def compiled_why_not() -> str:
    """Why `torch.compile` is not timed."""
    return "" if torch.cuda.is_available() else NO_GPU


def compiled(inputs: Inputs) -> Callable[[], object]:
    """The same by `torch.compile`, one fused kernel."""
    cos, sin = (part[:, None].to(inputs.activation.dtype) for part in _full(inputs))
    q, k, _ = inputs.qkv
    torch.compiler.reset()  # after eight shapes it would go on in eager mode, and say nothing
    function = torch.compile(apply_rotary_pos_emb, dynamic=False)
    return lambda: function(q, k, cos, sin)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [T, H, D] and cos, sin [T, 1, D] -> turned q and k (neox). Source: transformers' modeling_llama.py."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def _full(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """cos and sin of each token for all D dims (neox), [T, D] each."""
    cos, sin = inputs.cos_sin[inputs.positions].chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


PEERS = (
    Peer("vLLM", vllm_why_not, vllm),
    Peer("FlashInfer", flashinfer_why_not, flashinfer),
    Peer("FlashInfer, append", flashinfer_why_not, flashinfer_and_append, writes=True),
    Peer("Liger", liger_why_not, liger),
    Peer("torch eager", no_reason, eager, in_place=False),
    Peer("torch.compile", compiled_why_not, compiled, in_place=False),
)
