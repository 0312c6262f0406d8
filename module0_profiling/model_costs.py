"""What a whole step of a model has to do: its operations in order, its weights, and its cache.

The operations are those of a good engine: query, key and value share one product, as do gate and up; the residual
addition is part of the norm; logits are computed for the last token of each sequence only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from module0_profiling import attention_costs, costs
from module0_profiling.costs import Comm
from module0_profiling.model_shape import MLA, ModelError, ModelShape
from module0_profiling.number_formats import DTYPE_BYTES, WEIGHT_FORMATS, WeightFormat
from module0_profiling.roofline import Roof, Work


@dataclass(frozen=True)
class Formats:
    """What numbers are stored in: activations, weights of linear layers, cached keys and values (None: the same).

    Quantised are the linear layers. Embedding, head, router, norms, and MLA's kv_b, which is absorbed, stay in `dtype`.
    """

    dtype: str = "bfloat16"
    weights: str | None = None
    kv: str | None = None

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--dtype", self.dtype, DTYPE_BYTES),
            ("--weights", self.weights or self.dtype, WEIGHT_FORMATS),
            ("--kv-dtype", self.kv or self.dtype, DTYPE_BYTES),
        ):
            if value not in known:
                raise ModelError(f"{option} {value} is unknown: use {', '.join(known)}")

    @property
    def bytes(self) -> float:
        """Of one activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes(self) -> float:
        """Of one cached number."""
        return DTYPE_BYTES[self.kv or self.dtype]

    @property
    def linear(self) -> WeightFormat:
        """Of the weights of linear layers."""
        return WEIGHT_FORMATS[self.weights or self.dtype]

    @property
    def rate(self) -> str:
        """The dtype at whose matmul rate linear layers run."""
        return self.linear.rate or self.dtype


@dataclass(frozen=True)
class Operation:
    """One operation of a step.

    Attributes:
        name: such as "qkv"; unique in a step.
        kind: "linear", "attention", "norm", "rope", "kv", "elementwise" or "link".
        work: of one time.
        times: how often it runs: layers.
        rows: of a linear layer's input, or queries of a sequence; decides how fast the operation can be.
        positions: that an attention reads of each sequence's cache.
        rate: the dtype whose matmul rate counts.
        comm: of a "link": what each device sends.
    """

    name: str
    kind: str
    work: Work
    times: int = 1
    rows: float = 0
    rate: str = ""
    comm: Comm | None = None
    positions: int = 0

    @property
    def total(self) -> Work:
        """The work of all layers."""
        return self.work * self.times


def total(operations: Iterable[Operation]) -> Work:
    """All of a step's work as one."""
    return sum((operation.total for operation in operations), Work(0, 0))


def step_seconds(operations: Iterable[Operation], roof: Roof) -> float:
    """The floor of a step in seconds under one roof: operations run one after the other, so their floors add up."""
    return sum(roof.seconds(operation.total) for operation in operations)


# A step.


def decode_step(shape: ModelShape, batch: int, context: int, formats: Formats = Formats()) -> list[Operation]:
    """One token for each of `batch` sequences, whose caches then hold `context` positions."""
    return step(shape, batch, tokens=1, prefix=context - 1, formats=formats)


def prefill_step(shape: ModelShape, batch: int, tokens: int, formats: Formats = Formats()) -> list[Operation]:
    """Reading `batch` prompts of `tokens` tokens; logits for the last token of each."""
    return step(shape, batch, tokens=tokens, prefix=0, formats=formats)


def step(
    shape: ModelShape, batch: int, tokens: int, prefix: int, formats: Formats = Formats(), *, ranks: int = 1
) -> list[Operation]:
    """One forward pass: `tokens` new tokens for each of `batch` sequences after `prefix` cached ones.

    Args:
        shape: what one device holds (`model_shape.shard` for tensor parallelism).
        batch, tokens, prefix: of the step.
        formats: of numbers.
        ranks: devices that share the model: two all-reduces a layer and a gather of the logits are added.
    """
    rows, size = batch * tokens, formats.bytes
    attend = _mla_attention if shape.mla else _attention
    found = [
        Operation("embedding", "elementwise", costs.embedding(rows, shape.hidden, size)),
        Operation("first norm", "norm", costs.norm(rows, shape.hidden, size)),
        Operation("norms", "norm", costs.norm(rows, shape.hidden, size, residual=True), 2 * shape.layers),
        *attend(shape, batch, tokens, prefix, formats),
        *_mlp(shape, rows, formats),
    ]
    if shape.output_norms:
        work = costs.norm(rows, shape.hidden, size)
        found.append(Operation("output norms", "norm", work, 2 * shape.layers))
    head = costs.linear(batch, shape.hidden, shape.vocab, size)
    found.append(Operation("lm_head", "linear", head, rows=batch, rate=formats.dtype))
    if ranks > 1:
        reduce = costs.all_reduce(rows * shape.hidden, ranks, size)
        gather = Comm(batch * shape.vocab * (ranks - 1) * size)
        found.append(Operation("all-reduce", "link", Work(0, 0), 2 * shape.layers, comm=reduce))
        found.append(Operation("gather logits", "link", Work(0, 0), comm=gather))
    return found


def last_rows_only(whole: list[Operation], last: list[Operation], shape: ModelShape) -> list[Operation]:
    """A step whose last layer computes only the sequences' last tokens, beyond keys and values: nothing else is used.

    Args:
        whole: the step.
        last: a step of one token for each sequence, after all the others.
        shape: of both.
    """
    feed_forward = ("router", "experts", "shared ") if shape.moe_layers else ("gate_up", "silu_mul", "down")
    single = {operation.name: operation for operation in last}
    found: list[Operation] = []
    for operation in whole:
        used = operation.name == "o_proj" or operation.kind == "attention" or operation.name.startswith(feed_forward)
        if used and operation.name in single:
            found.append(replace(operation, times=operation.times - 1))
            found.append(replace(single[operation.name], name=f"{operation.name}, last layer", times=1))
        else:
            found.append(operation)
    return [operation for operation in found if operation.times]


def _attention(shape: ModelShape, batch: int, tokens: int, prefix: int, formats: Formats) -> list[Operation]:
    rows, size, layers = batch * tokens, formats.bytes, shape.layers
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = [_linear("qkv", rows, shape.hidden, q + 2 * kv, layers, formats)]
    if shape.qk_norm:
        work = costs.norm(rows * (shape.heads + shape.kv_heads), shape.head_dim, size)
        found.append(Operation("qk norm", "norm", work, layers))
    rotate = costs.rope(rows, shape.heads, shape.kv_heads, shape.head_dim, size)
    write = costs.kv_write(rows, shape.kv_heads, shape.head_dim, size, formats.kv_bytes)
    found += [Operation("rope", "rope", rotate, layers), Operation("kv write", "kv", write, layers)]
    for window, count in shape.window_counts().items():
        work = attention_costs.attention_prefill(
            batch,
            tokens,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            size,
            prefix=prefix,
            window=window,
            kv_bytes=formats.kv_bytes,
        )
        name = "attention" if window is None else f"attention, window {window}"
        seen = attention_costs.cached_positions(tokens, prefix, window)
        found.append(Operation(name, "attention", work, count, tokens, formats.dtype, positions=seen))
    return [*found, _linear("o_proj", rows, q, shape.hidden, layers, formats)]


def _mla_attention(shape: ModelShape, batch: int, tokens: int, prefix: int, formats: Formats) -> list[Operation]:
    """Absorbed or expanded, whichever has fewer FLOPs: DeepSeek-V3 absorbs up to 170 new tokens on a long prefix."""
    mla = shape.mla
    assert mla is not None
    rows, size, layers, heads = batch * tokens, formats.bytes, shape.layers, shape.heads
    q_out = heads * (mla.nope + mla.rope)
    if mla.q_lora:
        found = [
            _linear("q_a", rows, shape.hidden, mla.q_lora, layers, formats),
            Operation("q norm", "norm", costs.norm(rows, mla.q_lora, size), layers),
            _linear("q_b", rows, mla.q_lora, q_out, layers, formats),
        ]
    else:
        found = [_linear("q", rows, shape.hidden, q_out, layers, formats)]
    written = Work(0, rows * (mla.latent + mla.rope) * (size + formats.kv_bytes))
    found += [
        _linear("kv_a", rows, shape.hidden, mla.latent + mla.rope, layers, formats),
        Operation("kv norm", "norm", costs.norm(rows, mla.latent, size), layers),
        Operation("rope", "rope", costs.rope(rows, heads, 1, mla.rope, size), layers),
        Operation("kv write", "kv", written, layers),
    ]
    ways = (
        _absorbed(shape, mla, batch, tokens, prefix, formats),
        _expanded(shape, mla, batch, tokens, prefix, formats),
    )
    found += min(ways, key=lambda way: total(way).flops)
    return [*found, _linear("o_proj", rows, heads * mla.value, shape.hidden, layers, formats)]


def _absorbed(
    shape: ModelShape, mla: MLA, batch: int, tokens: int, prefix: int, formats: Formats
) -> list[Operation]:  # fmt: skip
    rows, layers = batch * tokens, shape.layers
    into = costs.batched_linear(rows, shape.heads, mla.nope, mla.latent, formats.bytes)
    out = costs.batched_linear(rows, shape.heads, mla.latent, mla.value, formats.bytes)
    work = attention_costs.mla_absorbed(
        batch, tokens, shape.heads, mla.latent, mla.rope, formats.bytes, prefix=prefix, kv_bytes=formats.kv_bytes
    )
    return [
        Operation("absorb W_UK", "linear", into, layers, rows, formats.dtype),
        Operation("attention, absorbed", "attention", work, layers, tokens, formats.dtype, positions=prefix + tokens),
        Operation("absorb W_UV", "linear", out, layers, rows, formats.dtype),
    ]


def _expanded(
    shape: ModelShape, mla: MLA, batch: int, tokens: int, prefix: int, formats: Formats
) -> list[Operation]:  # fmt: skip
    seen = prefix + tokens
    positions = batch * seen
    expand = costs.linear(positions, mla.latent, shape.heads * (mla.nope + mla.value), formats.bytes)
    work = attention_costs.mla_expanded(
        batch, tokens, shape.heads, mla.nope, mla.rope, mla.value, formats.bytes, prefix=prefix
    )
    return [
        Operation("kv_b", "linear", expand, shape.layers, positions, formats.dtype),
        Operation("attention, expanded", "attention", work, shape.layers, tokens, formats.dtype, positions=seen),
    ]


def _mlp(shape: ModelShape, rows: int, formats: Formats) -> list[Operation]:
    found: list[Operation] = []
    moe, dense = shape.moe, shape.layers - shape.moe_layers
    if dense:
        found += _gated("", rows, shape.hidden, shape.intermediate, dense, formats)
    if moe is None:
        return found
    routed = costs.router(rows, shape.hidden, moe.experts, formats.bytes)
    work = costs.experts(
        rows, shape.hidden, moe.intermediate, moe.experts, moe.top_k, formats.bytes, formats.linear
    )  # fmt: skip
    each = rows * moe.top_k / costs.distinct_experts(rows, moe.experts, moe.top_k)
    found.append(Operation("router", "linear", routed, shape.moe_layers, rows, formats.dtype))
    found.append(Operation("experts", "linear", work, shape.moe_layers, each, formats.rate))
    if moe.shared:
        found += _gated("shared ", rows, shape.hidden, moe.shared, shape.moe_layers, formats)
    return found


def _gated(name: str, rows: int, hidden: int, width: int, layers: int, formats: Formats) -> list[Operation]:
    return [
        _linear(f"{name}gate_up", rows, hidden, 2 * width, layers, formats),
        Operation(f"{name}silu_mul", "elementwise", costs.silu_mul(rows, width, formats.bytes), layers),
        _linear(f"{name}down", rows, width, hidden, layers, formats),
    ]


def _linear(name: str, rows: int, d_in: int, d_out: int, layers: int, formats: Formats) -> Operation:
    work = costs.linear(rows, d_in, d_out, formats.bytes, formats.linear)
    return Operation(name, "linear", work, layers, rows, formats.rate)


# What has to be stored.


@dataclass(frozen=True)
class Matrix:
    """Weights of one shape: `count` of them in the model, `active` of them read for one token."""

    d_in: int
    d_out: int
    count: int
    active: int
    quantised: bool = True


def matrices(shape: ModelShape) -> list[Matrix]:
    """Every matrix of the model; vectors (norms, biases) are counted by `vectors`."""
    layers, hidden = shape.layers, shape.hidden
    found = [Matrix(hidden, shape.vocab, 1 if shape.tied else 2, 1 if shape.tied else 2, quantised=False)]

    def add(d_in: int, d_out: int, times: int = layers, active: int | None = None, *, quantised: bool = True) -> None:
        found.append(Matrix(d_in, d_out, times, times if active is None else active, quantised))

    if mla := shape.mla:
        q_out = shape.heads * (mla.nope + mla.rope)
        if mla.q_lora:
            add(hidden, mla.q_lora)
        add(mla.q_lora or hidden, q_out)
        add(hidden, mla.latent + mla.rope)
        add(mla.latent, shape.heads * (mla.nope + mla.value), quantised=False)
        add(shape.heads * mla.value, hidden)
    else:
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        add(hidden, q + 2 * kv)
        add(q, hidden)
    dense = layers - shape.moe_layers
    add(hidden, 2 * shape.intermediate, dense)
    add(shape.intermediate, hidden, dense)
    if moe := shape.moe:
        sparse = shape.moe_layers
        add(hidden, moe.experts, sparse, quantised=False)
        add(hidden, 2 * moe.intermediate, sparse * moe.experts, sparse * moe.top_k)
        add(moe.intermediate, hidden, sparse * moe.experts, sparse * moe.top_k)
        if moe.shared:
            add(hidden, 2 * moe.shared, sparse)
            add(moe.shared, hidden, sparse)
    return found


def vectors(shape: ModelShape) -> int:
    """Numbers in norms and biases."""
    layer = (4 if shape.output_norms else 2) * shape.hidden
    if shape.mla:
        layer += shape.mla.q_lora + shape.mla.latent
    elif shape.qk_norm:
        layer += 2 * shape.head_dim
    layer += shape.qkv_bias * (shape.heads + 2 * shape.kv_heads) * shape.head_dim + shape.o_bias * shape.hidden
    router = shape.moe.experts * shape.moe_layers if shape.moe and shape.moe.router_bias else 0
    return layer * shape.layers + shape.hidden + router


def parameters(shape: ModelShape, *, active: bool = False) -> int:
    """Parameters in all, or those that take part in one token (its k experts; the whole embedding, as is usual)."""
    held = sum(m.d_in * m.d_out * (m.active if active else m.count) for m in matrices(shape))
    return held + vectors(shape)


def weight_bytes(shape: ModelShape, formats: Formats = Formats(), *, active: bool = False) -> float:
    """Bytes of all weights with their scales, or of those that take part in one token."""
    plain = WEIGHT_FORMATS[formats.dtype]
    held = sum(
        (formats.linear if m.quantised else plain).bytes(m.d_in, m.d_out) * (m.active if active else m.count)
        for m in matrices(shape)
    )
    return held + vectors(shape) * formats.bytes


def kv_bytes_per_token(shape: ModelShape, formats: Formats = Formats()) -> float:
    """Bytes that one more token adds to the cache, in layers whose window is not full."""
    numbers = shape.mla.latent + shape.mla.rope if shape.mla else 2 * shape.kv_heads * shape.head_dim
    return shape.layers * numbers * formats.kv_bytes


def kv_bytes(shape: ModelShape, context: int, formats: Formats = Formats()) -> float:
    """Bytes of the cache of one sequence of `context` positions; a sliding layer keeps its window only."""
    token = kv_bytes_per_token(shape, formats) / shape.layers
    return sum(count * token * min(context, window or context) for window, count in shape.window_counts().items())
