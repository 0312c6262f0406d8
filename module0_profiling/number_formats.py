"""How many bytes a number takes in each format: activations, weights with their scales, cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0}


@dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix [d_in, d_out] is stored.

    Attributes:
        name: what `--weights` takes.
        bits: of one weight.
        group: inputs that share one scale of an output channel; 0: one scale for each output channel.
        block: rows and columns of a block that share one scale (DeepSeek: 128); then `group` is not used.
        scale_bytes: of one scale and its zero point, 0 for formats without.
        rate: the dtype whose matmul rate it is computed at; "" means that of the activations: weights are widened.
    """

    name: str
    bits: float
    group: int = 0
    block: int = 0
    scale_bytes: float = 0.0
    rate: str = ""

    def bytes(self, d_in: int, d_out: int) -> float:
        """Bytes of a matrix with its scales; the last group or block may be a partial one."""
        if self.block:
            scales = -(-d_in // self.block) * -(-d_out // self.block)
        else:
            scales = d_out * (-(-d_in // self.group) if self.group else 1)
        return d_in * d_out * self.bits / 8 + scales * self.scale_bytes


WEIGHT_FORMATS = {
    "float32": WeightFormat("float32", 32),
    "float16": WeightFormat("float16", 16),
    "bfloat16": WeightFormat("bfloat16", 16),
    "int8": WeightFormat("int8", 8, scale_bytes=4, rate="int8"),  # one float32 scale an output channel
    "int4": WeightFormat("int4", 4, group=128, scale_bytes=2.5),  # a 16-bit scale and a 4-bit zero for 128 inputs
    "fp8": WeightFormat("fp8", 8, scale_bytes=4, rate="fp8"),
    "fp8-block": WeightFormat("fp8-block", 8, block=128, scale_bytes=4, rate="fp8"),  # 128 x 128, as DeepSeek-V3
}
"""The formats by name. int4 is weight-only: it is read as four bits and multiplied in the activations' dtype."""
