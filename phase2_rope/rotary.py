"""Cosines and sines for the tokens of a step: one float32 table for all layers, whatever the rope type.

The table is `cos_sin` [rows, R] as vLLM and FlashInfer have it: R/2 cosines, then R/2 sines, the attention factor in
both. Angles are products in float32: in bfloat16 position 257 does not exist, and its neighbours would be the same.

Two types depend on how long the text is. `transformers` asks for the longest position of a forward pass, which in a
batch is some other request's. Here a request's numbers are its own: a token at position p of a prompt of n tokens is
turned for the length max(n, p + 1), however it is batched, cut into chunks, or computed again. For one request that is
what `generate` does: the prompt in one pass, then token by token, keys of the cache staying as they are. Where
`transformers` differs from itself we do not follow: its dynamic type keeps the frequencies of an earlier, longer text
until one below `context` comes, and its Phi-3 computes a text again when it passes the original context.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phase0_prototype.batch import Batch
from phase0_prototype.config import RopeConfig
from phase0_prototype.errors import ConfigError
from phase2_rope.scaling import SCALINGS, dynamic_inv_freq


class Rotary(nn.Module):
    """The table that all layers share. `places` says which rows a batch needs, `forward` fetches them.

    Args:
        rope: type and parameters.
        head_dim: D of the heads that turn; `cos_sin` covers the first R of them.
        max_positions: rows, the longest sequence.
        dtype: of the model: what the CPU's cosines and sines are rounded to.
        device: where the table lies.
        context: max_position_embeddings of the config. The type dynamic needs it, yarn and longrope do where their
            file has no `factor`.
        gathered: also on a GPU `forward` fetches the rows itself, for attention that knows no kernel.

    Attributes:
        cos_sin: [rows, R] float32. Row p is position p. longrope: positions within its original context by the short
            list, then all by the long one. dynamic: not read where texts may pass `context`.

    Raises:
        ConfigError: the type is unknown, or its parameters make no sense.
    """

    cos_sin: Tensor

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        context: int | None = None,
        gathered: bool = False,
    ) -> None:
        super().__init__()
        if rope.rope_type not in SCALINGS:
            raise ConfigError(f"rope type {rope.rope_type!r} is not supported: there are {', '.join(SCALINGS)}")
        scaling, positions = SCALINGS[rope.rope_type], torch.arange(max_positions)
        short = scaling(rope, head_dim, context, 0)
        self.dtype, self.attention_factor, self.gathered = dtype, short.attention_factor, gathered
        self.turning_point = max_positions  # longer texts are turned otherwise; no text is longer than this
        self.inv_freqs: Tensor | None = None  # dynamic: [lengths, R/2] float32, of `context` and all lengths beyond
        cos_sin = self._cos_sin(positions, short.inv_freq)
        if rope.rope_type == "longrope":
            self.turning_point = min(int(rope.parameters["original_max_position_embeddings"]), max_positions)
        elif rope.rope_type == "dynamic" and context is not None:
            self.turning_point = min(context, max_positions)
        self.by_length = self.turning_point < max_positions
        if self.by_length and rope.rope_type == "longrope":
            long = scaling(rope, head_dim, context, self.turning_point + 1)
            cos_sin = torch.cat((cos_sin[: self.turning_point], self._cos_sin(positions, long.inv_freq)))
        elif self.by_length:
            lengths = torch.arange(self.turning_point, max_positions + 1)
            self.inv_freqs = dynamic_inv_freq(rope, head_dim, context, lengths).to(device)
        self.cos_sin = cos_sin.to(device)

    def places(self, batch: Batch) -> Tensor:
        """What `forward` is to be given for a batch; runs outside of what is compiled or captured.

        Returns:
            [T] int64, rows of `cos_sin`; for dynamic [2, T] int64: positions, and rows of `inv_freqs`.
        """
        if not self.by_length:
            return batch.positions
        prompts = torch.tensor(batch.prompt_lens).repeat_interleave(torch.tensor(batch.query_lens))
        lengths = torch.maximum(prompts.to(batch.positions.device, non_blocking=True), batch.positions + 1)  # [T]
        beyond = (lengths - self.turning_point).clamp_min(0)
        if self.inv_freqs is None:
            return torch.where(beyond > 0, batch.positions + self.turning_point, batch.positions)
        return torch.stack((batch.positions, beyond))

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """What `rope.rotate` and `rope.rotate_and_write` take.

        Returns:
            On a CPU, or `gathered`, cos and sin of each token, [T, 1, R/2] in the model's dtype. On a GPU the table
            [rows, R] float32 and each token's row [T] int64, for the kernel to fetch.
        """
        table, rows = self.cos_sin, places
        if self.inv_freqs is not None:  # a table of this step, [T, R]
            table = self._cos_sin(places[0], self.inv_freqs[places[1]])
            rows = torch.arange(places.shape[1], device=places.device)
        if table.is_cuda and not self.gathered:
            return table, rows
        cos, sin = table[rows].to(self.dtype).unsqueeze(1).chunk(2, dim=-1)
        return cos, sin

    def _cos_sin(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """[N] int64 and [R/2] or [N, R/2] float32 -> [N, R] float32."""
        angles = positions.float()[:, None] * inv_freq
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_factor


def reads_table(rotary: tuple[Tensor, Tensor]) -> bool:
    """Whether `Rotary` gave a table and rows, which a kernel reads itself, instead of cosines and sines."""
    return rotary[1].dtype == torch.int64
