"""The fields that all generating requests share, and how they become `SamplingParams`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from phase0_prototype.sampling_params import ParameterError, SamplingParams
from phase4_scheduler.core.wire import Info
from phase4_scheduler.server.errors import bad
from phase4_scheduler.server.options import ServerOptions

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=604_800)]
Name = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's `stream_options`, with vLLM's addition.

    Attributes:
        include_usage: a last chunk without choices tells the usage.
        continuous_usage_stats: each chunk does.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers that OpenAI adds by default: we never do


class Generating(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat have in common: OpenAI's fields, then vLLM's.

    `timeout` is ours: seconds after which the answer is of no use, and the engine drops the request.
    """

    model: str | None = None
    n: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int64 | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Int64 | None = None
    truncate_prompt_tokens: Int64 | None = None
    add_special_tokens: bool | None = None
    priority: Int32 | None = None
    request_id: Name | None = None
    return_token_ids: bool | None = None
    timeout: Seconds | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        options = self.stream_options
        return bool(options and (options.include_usage or options.continuous_usage_stats))

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
)


def sampling_params(given: Any, options: ServerOptions, info: Info, **more: Any) -> SamplingParams:
    """The engine's parameters for a request.

    Args:
        given: a Struct with some of the fields of `Generating`.
        options: limits.
        info: of the model, with its defaults.
        more: `max_tokens`, `logprobs` and what else has another name in the request.

    Raises:
        ApiError: 400 that names the field.
    """
    defaults = info.sampling_defaults if options.generation_config == "auto" else {}
    asked = {name: value for name in _SAME if (value := getattr(given, name, None)) is not None}
    wanted = {**defaults, **asked, **more}
    if wanted.get("n", 1) > options.max_n:
        raise bad(f"n={wanted['n']} is more than this server allows: give at most {options.max_n}", "n")
    stop = wanted.get("stop", ())
    if not isinstance(stop, str) and len(stop) > options.max_stop:
        raise bad(f"stop holds {len(stop)} strings: give at most {options.max_stop}", "stop")
    for name in ("logprobs", "prompt_logprobs"):
        value = wanted.get(name)
        if value is not None and options.max_logprobs >= 0 and not 0 <= value <= options.max_logprobs:
            shown = "top_logprobs" if name == "logprobs" and hasattr(given, "top_logprobs") else name
            raise bad(f"{shown}={value} is not allowed: give 0 to {options.max_logprobs}", shown)
    unknown = next((i for i in wanted.get("stop_token_ids", ()) if i >= info.vocab_size), None)
    if unknown is not None:
        raise bad(f"stop_token_ids holds {unknown}: the vocabulary ends at {info.vocab_size - 1}", "stop_token_ids")
    if getattr(given, "priority", None) and options.scheduling_policy != "priority":
        raise bad(
            f"priority={given.priority} would be ignored: the server runs with --scheduling-policy "
            f"{options.scheduling_policy}, leave priority out",
            "priority",
        )
    if getattr(given, "stream", None) and wanted.get("prompt_logprobs") is not None:
        raise bad("prompt_logprobs are not part of a stream: leave out stream or prompt_logprobs", "prompt_logprobs")
    if getattr(given, "stream_options", None) is not None and not given.stream:
        raise bad("stream_options say nothing without stream: set stream to true", "stream_options")
    try:
        return SamplingParams.from_dict(wanted)
    except ParameterError as error:
        raise bad(str(error), error.field or None) from None
