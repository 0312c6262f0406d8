"""Settings of the engine with kernels for attention: those of phase 1 and who attends to what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from phase0_prototype.errors import UserError
from phase1_memory.engine_config import PagedConfig
from phase3_paged_attention.kv_format import FORMATS
from phase3_paged_attention.latent_format import PACKED

BACKENDS = ("auto", "triton", "flashinfer", "torch", "mine")


@dataclass(frozen=True)
class AttentionConfig(PagedConfig):
    """See `PagedConfig`.

    Attributes:
        attention_backend: auto (the first that can) | triton | flashinfer | torch | mine (the learner's kernels).
        kv_cache_dtype: auto (that of the model) | a name of `kv_format.FORMATS` | fp8_ds_mla (latents).
    """

    backends: ClassVar[tuple[str, ...]] = BACKENDS

    attention_backend: str = "auto"
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("attention_backend", self.backends), ("kv_cache_dtype", ("auto", *FORMATS, PACKED))):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name}={value!r} is not allowed: give {', '.join(known[:-1])} or {known[-1]}")
