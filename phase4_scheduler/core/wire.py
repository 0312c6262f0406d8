"""What crosses between the API's process and the engine's: plain structs as MessagePack. No pickle, ever.

Three channels, each a ZeroMQ socket pair in a private directory (channels.py):

    requests   client -> engine   `Add`, `Abort`
    outputs    engine -> client   `Outputs`, one for each step that has something to say
    control    both ways          `Hello`, `Pulse`, `Fault` from the engine; `Stop` from the client

Structs are encoded as arrays with a tag, so a field is added at the end and never taken away (vLLM's
`vllm/v1/engine/__init__.py` does the same).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class _Message(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True, gc=False):
    """One message."""


class Add(_Message, frozen=True, tag="add"):
    """A prompt to be continued.

    Attributes:
        request_id: chosen by the client, without a dot, never used twice.
        prompt_token_ids: checked by the client: not empty, ids of the vocabulary, shorter than max_model_len.
        params: fields of `SamplingParams` that differ from their defaults.
        seed: resolved, for `params` without one.
        priority: smaller is more urgent.
        timeout: seconds from now until nobody wants the answer; None: never.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any] = {}
    seed: int = 0
    priority: int = 0
    timeout: float | None = None


class Abort(_Message, frozen=True, tag="abort"):
    """These requests are of no interest any more: the client has told their readers so, and hears no more of them.

    An id is that of a prompt, or "id.index" for one of its n > 1 sequences. What is unknown or has ended is ignored.
    """

    request_ids: list[str]
    reason: str = "abort"


class Ranked(_Message, frozen=True):
    """Log-probabilities at one position: the token that stands there, then the most likely ones, best first."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Delta(_Message, frozen=True):
    """What a step adds to one sequence.

    Attributes:
        request_id: of the prompt.
        index: 0 .. n-1 among its sequences; -1: all of them (a request that could not be queued).
        token_ids: new tokens; none when it ended otherwise.
        logprobs: one for each new token, if asked for.
        prompt_logprobs: (place in the prompt of the first, values), if asked for, as chunks of the prompt are computed.
        finish_reason: set in the last delta of a sequence: "stop", "length", "abort" or "error".
        stop_reason: the stop token id, or why it was aborted ("deadline", "out of KV blocks" ...), or what is wrong.
        queued: in the first delta of a request: seconds from its arrival to its first step.
        preemptions: in the last delta: how often it lost its memory.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[Ranked] | None = None
    prompt_logprobs: tuple[int, list[Ranked]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    queued: float | None = None
    preemptions: int = 0


class Stats(_Message, frozen=True):
    """The engine at one moment. Counters run from its start.

    Attributes:
        running, waiting, swapped: sequences.
        waiting_tokens: tokens of prompts that are not computed yet, those of running sequences too.
        kv_blocks, kv_blocks_free: of the cache.
        steps, busy_seconds: forward passes, and the time in which one was running.
        elapsed_seconds: since the engine was ready.
        prompt_tokens, generated_tokens: computed, chosen.
        preemptions, recomputed_tokens: see the scheduler.
        batch_seqs, batch_tokens: sums over all steps, so that / steps is the occupancy.
        largest_step_seconds: since the last `Stats`.
    """

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    waiting_tokens: int = 0
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    elapsed_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    batch_seqs: int = 0
    batch_tokens: int = 0
    largest_step_seconds: float = 0.0


class Outputs(_Message, frozen=True, tag="outputs"):
    """The deltas of a step. `stats` come ten times a second while steps run, else twice."""

    deltas: list[Delta]
    stats: Stats | None = None


class Info(_Message, frozen=True):
    """What the client must know of a model that is ready."""

    model: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    dtype: str
    device: str
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    described: str = ""  # which parts of the course run, as commands print it
    sampling_defaults: dict[str, float] = {}  # what the checkpoint's generation_config.json says of sampling


class Hello(_Message, frozen=True, tag="hello"):
    """The engine is ready. Seconds since its process started."""

    info: Info
    pid: int
    seconds: float


class Pulse(_Message, frozen=True, tag="pulse"):
    """The step loop turned. Sent by the loop itself, not by a side thread: twice a second, and after a longer step."""

    steps: int


class Fault(_Message, frozen=True, tag="fault"):
    """The engine ends. `is_user_error`: the message is one line for the user, and starting again won't help."""

    message: str
    is_user_error: bool = False


class Stop(_Message, frozen=True, tag="stop"):
    """End now: running requests are aborted."""


ToEngine: TypeAlias = Add | Abort
FromEngine: TypeAlias = Hello | Pulse | Fault
EMPTY = Stats()

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(ToEngine).decode
decode_outputs = msgspec.msgpack.Decoder(Outputs).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_to_engine = msgspec.msgpack.Decoder(Stop).decode
