"""One request of a load test against an OpenAI-compatible server: send, read the stream, send again when refused."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from phase0_prototype.errors import UserError
from phase4_scheduler.bench.chunks import StreamReader, message_of
from phase4_scheduler.bench.http_client import Pool
from phase4_scheduler.bench.http_parser import HttpError
from phase4_scheduler.bench.samples import INTERRUPTED, Sample
from phase4_scheduler.bench.workloads import WorkItem

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED = (429, 503)  # too many requests, not now: the two that may come with Retry-After
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a refused request is sent again, when the server doesn't say


@dataclass(frozen=True)
class Target:
    """The server under test.

    Attributes:
        base_url: http://host:port; a /v1 at its end changes nothing.
        model: its name there; "": the first that /v1/models lists.
        endpoint: /v1/completions or /v1/chat/completions.
        api_key: sent as a bearer token; "": none.
        extra: further fields of each request. `ignore_eos` (vLLM's, SGLang's, ours) makes answers as long as asked.
        timeout: seconds that a request may take.
        retries: how often a request is sent again after a 429 or 503.
    """

    base_url: str
    model: str = ""
    endpoint: str = COMPLETIONS
    api_key: str = field(default="", repr=False)
    extra: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "ignore_eos": True})
    timeout: float = 600.0
    retries: int = 0

    def __post_init__(self) -> None:
        if self.endpoint not in (COMPLETIONS, CHAT):
            raise UserError(f"--endpoint {self.endpoint!r}: choose {COMPLETIONS} or {CHAT}")
        if not self.timeout > 0 or self.retries < 0:
            raise UserError(f"--timeout {self.timeout:g}, --retry {self.retries}: give seconds above 0, and 0 or more")

    @property
    def headers(self) -> dict[str, str]:
        """Those that every request has."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, item: WorkItem) -> bytes:
        """The JSON of one request.

        Raises:
            UserError: token ids, for a chat.
        """
        asked: dict[str, Any] = {"model": self.model}
        if self.endpoint == COMPLETIONS:
            asked["prompt"] = item.prompt
        elif isinstance(item.prompt, str):
            asked["messages"] = [{"role": "user", "content": item.prompt}]
        else:
            raise UserError(f"{CHAT} takes text, the workload has token ids: make its prompts text (--text)")
        asked |= {"max_tokens": item.output_tokens, "stream": True, "stream_options": {"include_usage": True}}
        return msgspec.json.encode(asked | self.extra)


async def find_model(pool: Pool, target: Target) -> str:
    """The name of the first model that the server lists.

    Raises:
        UserError: there is no server, it wants a key, or it lists nothing.
    """
    where = f"--base-url {target.base_url}"
    try:
        async with asyncio.timeout(min(30.0, target.timeout)):
            status, body = await pool.fetch("/v1/models", target.headers)
    except (OSError, HttpError) as error:
        raise UserError(f"{where}: {reason_of(error)}; start a server (titan serve MODEL) or correct it") from None
    if status in (401, 403):
        raise UserError(f"{where} answers {status} ({message_of(body)}): give its key with --api-key or TITAN_API_KEY")
    try:
        listed = msgspec.json.decode(body)["data"]
        return str(listed[0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise UserError(f"{where}/v1/models answers {status} without a model: name one with --model") from None


async def server_version(pool: Pool, target: Target) -> str:
    """What the server says at /version, as ours and vLLM do; "" if it says nothing."""
    try:
        async with asyncio.timeout(min(5.0, target.timeout)):
            status, body = await pool.fetch("/version", target.headers)
        return str(msgspec.json.decode(body)["version"]) if status == 200 else ""
    except (OSError, HttpError, msgspec.DecodeError, LookupError, TypeError):
        return ""


def reason_of(error: BaseException) -> str:
    """Why a request failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


async def ask(pool: Pool, target: Target, item: WorkItem, sample: Sample, clock: Callable[[], float]) -> None:
    """Send a request and fill its sample. Whatever goes wrong on the way is in the sample, not raised."""
    try:
        async with asyncio.timeout(target.timeout):
            await _ask(pool, target, target.body(item), sample, clock)
    except (OSError, HttpError) as error:  # TimeoutError is an OSError
        timed_out = isinstance(error, TimeoutError) and clock() - sample.sent >= target.timeout
        sample.error = f"no end after {target.timeout:g} s" if timed_out else reason_of(error)
    except asyncio.CancelledError:
        sample.error = INTERRUPTED
        raise
    finally:
        sample.ended = clock()


async def _ask(pool: Pool, target: Target, body: bytes, sample: Sample, clock: Callable[[], float]) -> None:
    while True:
        reader = StreamReader(clock)
        sample.times = reader.times  # what has come stays, whatever happens
        refused: list[bytes] = []

        def take(status: int, piece: bytes, reader: StreamReader = reader, refused: list[bytes] = refused) -> None:
            if status == 200:
                reader.feed(piece)
            else:
                refused.append(piece)

        try:
            head = await pool.request("POST", target.endpoint, target.headers, body, take)
        finally:
            sample.prompt_tokens = reader.prompt_tokens or 0
            sample.output_tokens = reader.output_tokens or reader.token_ids or len(reader.times)
            sample.finish_reason = reader.finish_reason
        sample.status = head.status
        if head.status == 200:
            sample.error = reader.error or (None if reader.done else "the stream ended without [DONE]")
            return
        if head.status not in REFUSED or len(sample.refusals) >= target.retries:
            sample.error = f"{head.status}: {message_of(b''.join(refused))}"
            return
        sample.refusals.append(head.status)
        await asyncio.sleep(seconds_to_wait(head.headers.get("retry-after"), len(sample.refusals)))


def seconds_to_wait(retry_after: str | None, attempt: int) -> float:
    """Until the next attempt: what the server says, in seconds or as a date, else twice as long each time."""
    if retry_after is not None:
        try:
            return max(0.0, float(retry_after))
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            pass
    return float(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))
