"""What the HTTP server may be told, with the limits that protect it. The engine's settings are not here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phase0_prototype.errors import UserError


@dataclass(frozen=True)
class ServerOptions:
    """Settings of the API's process.

    Attributes:
        served_names: names that a request's `model` may have; the first is the one that answers carry. (): the model's.
        api_keys: any of them opens every route; (): all routes are open.
        max_body_bytes: a longer body is 413, counted while it is read.
        max_header_bytes: request line and headers together; more is 431.
        body_timeout, header_timeout: seconds in which a client must have sent them; else 408.
        max_n: sequences of one prompt.
        max_logprobs: largest `logprobs`, `top_logprobs` and `prompt_logprobs`.
        max_stop: stop strings of one request.
        max_prompts: prompts in one completion request.
        max_num_queued_reqs: sequences that may wait beyond those that run; None: any number.
        max_num_queued_tokens: prompt tokens that may wait; None: any number.
        stream_timeout: seconds after which a streaming client that takes nothing is cut off.
        keep_alive: seconds of silence after which a stream gets a comment; 0: never.
        chat_template: a file that replaces the checkpoint's template; None: the checkpoint's.
        scheduling_policy: of the engine; a `priority` is refused where nobody would look at it.
        log_interval: seconds between two lines of statistics; 0: none.
        generation_config: auto (requests that don't say are sampled as the checkpoint's generation_config.json says) or
            vllm (by the API's own defaults).
        use: which implementation of the course's parts, as in "phase4=mine".
    """

    served_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 64 << 10
    body_timeout: float = 30.0
    header_timeout: float = 30.0
    max_n: int = 128
    max_logprobs: int = 20
    max_stop: int = 16
    max_prompts: int = 1024
    max_num_queued_reqs: int | None = 4096
    max_num_queued_tokens: int | None = None
    stream_timeout: float = 60.0
    keep_alive: float = 0.0
    chat_template: Path | None = None
    scheduling_policy: str = "fcfs"
    log_interval: float = 10.0
    generation_config: str = "auto"
    use: str = ""

    def __post_init__(self) -> None:
        if self.generation_config not in ("auto", "vllm"):
            raise UserError(f"--generation-config {self.generation_config!r} is not allowed: give auto or vllm")
