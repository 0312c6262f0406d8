"""The engine's side: takes requests from the client, turns the loop, and says what came of each step.

One thread does everything, so what it says of itself is true of the loop: while a step hangs there is no `Pulse`.
Between two steps it looks whether something has arrived, which costs microseconds; when there is nothing to compute it
sleeps until something does. Messages are small (a token of 64 requests is 1.5 kB) and ZeroMQ's own thread moves
them, so nothing here is worth a thread of its own; with a loop that runs one step ahead, the device computes meanwhile.

What a single request does wrong ends that request alone. What the loop does wrong ends the process, with a `Fault`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from phase0_prototype.request import Request
from phase0_prototype.sampling_params import SamplingParams
from phase0_prototype.seeds import derive_seed
from phase0_prototype.step import StepTokens
from phase4_scheduler.core import wire
from phase4_scheduler.core.channels import EngineChannels
from phase4_scheduler.core.deltas import ALL, of_prompt, parcels, prompt_id, ranked
from phase4_scheduler.core.tally import Tally

_LOG = logging.getLogger(__name__)
PULSE = 0.5  # seconds
_UNCHOSEN = "no token can be chosen: the logits hold NaN or +inf, or all tokens are banned"


class Turns(Protocol):
    """The loop, as this phase's engine has it."""

    scheduler: Any  # who takes requests
    counts: Any  # what it has done

    def has_unfinished(self) -> bool:
        """Whether a further `step` has work."""

    def step(self) -> StepTokens:
        """One forward pass."""

    def idle_for(self) -> float | None:
        """Seconds for which it makes sense to wait before the next step; None: there is nothing to do."""


class EngineCore:
    """Turns a loop for a client in another process.

    Args:
        loop: of an engine.
        info: what the client is told of the model.
        channels: to the client.
        pulse: most seconds between two signs of life while nothing runs.
        clock: the scheduler's, seconds.
    """

    def __init__(
        self,
        loop: Turns,
        info: wire.Info,
        channels: EngineChannels,
        *,
        pulse: float = PULSE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loop, self.info, self.channels, self.pulse, self.clock = loop, info, channels, pulse, clock
        self._tally = Tally(loop, info.num_blocks, clock())
        self._groups: dict[str, list[Request]] = {}  # by the prompt's id: its sequences that have not ended
        self._open: dict[str, Request] = {}  # by the sequence's id
        self._unseen: dict[str, Request] = {}  # sequences that were in no step yet
        self._queued: dict[str, float] = {}  # seconds that sequences without a token have waited for their first step
        self._next_pulse = 0.0
        self._tidied_at = 0  # steps

    def run(self) -> None:
        """Serve until the client says `Stop`. Raises what the loop raises."""
        while not self.channels.stopped():
            self.turn()

    def turn(self) -> None:
        """Take what has arrived, then one step, or a rest until there is something to do."""
        for message in self.channels.requests():
            if isinstance(message, wire.Add):
                self._add(message)
            else:
                self._abort(message)
        idle = self.loop.idle_for()
        if idle == 0.0:
            self._step()
        now = self.clock()
        if now >= self._next_pulse:
            self._next_pulse = now + self.pulse
            self.channels.send_control(wire.Pulse(self.loop.counts.steps))
            if idle is None:
                self._tidy()
        if idle != 0.0:
            if (stats := self._tally.due(now, idle=True)) is not None:
                self.channels.send_outputs(wire.Outputs([], stats))
            rest = self._next_pulse - now
            self.channels.wait(rest if idle is None else min(rest, idle))

    def _tidy(self) -> None:
        """Once after work: Python keeps thousands of freed objects for later, and their pages, until it collects all.

        That is cheap here: what was there when the engine was ready is frozen (main.py), and no request is left.
        """
        steps = self.loop.counts.steps
        if steps != self._tidied_at:
            self._tidied_at = steps
            gc.collect()

    # --- requests ---

    def _add(self, message: wire.Add) -> None:
        """Queue the sequences of a prompt; whatever is wrong with it is said of it alone."""
        if message.request_id in self._groups:
            _LOG.warning("dropped a request whose id %r is in use", message.request_id)
            return
        try:
            requests = self._requests(message)
            self._groups[message.request_id] = requests
            for request in requests:
                self._open[request.request_id] = request
                self._unseen[request.request_id] = request
                self.loop.scheduler.add(request)
        except Exception as error:  # of any kind: it must not reach the others
            if not getattr(error, "is_user_error", False):
                _LOG.exception("request %s could not be queued", message.request_id)
            self._abort(wire.Abort([message.request_id], "error"))
            refusal = wire.Delta(message.request_id, ALL, [], finish_reason="error", stop_reason=str(error))
            self.channels.send_outputs(wire.Outputs([refusal]))

    def _requests(self, message: wire.Add) -> list[Request]:
        params = SamplingParams.from_dict(message.params)
        prompt, info = message.prompt_token_ids, self.info
        room = info.max_model_len - len(prompt)
        if not prompt or room < 1 or not 0 <= min(prompt) <= max(prompt) < info.vocab_size:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: 1 to {info.max_model_len - 1} from 0..{info.vocab_size - 1} are "
                "allowed"
            )
        now = self.clock()
        seed = message.seed if params.seed is None else params.seed
        return [
            Request(
                message.request_id if params.n == 1 else f"{message.request_id}.{i}",
                prompt,
                params,
                derive_seed(seed, i) if i else seed,
                () if params.ignore_eos else tuple(info.eos_token_ids),
                min(params.max_tokens or room, room),
                index=i,
                group=message.request_id,
                priority=message.priority,
                arrival=now,
                deadline=None if message.timeout is None else now + message.timeout,
            )
            for i in range(params.n)
        ]

    def _abort(self, message: wire.Abort) -> None:
        """The client has said the last word on them already: nothing is sent."""
        for request_id in message.request_ids:
            one = self._open.get(request_id)
            for request in list(self._groups.get(request_id, [one] if one else [])):
                self.loop.scheduler.abort(request, message.reason)
                self._forget(request)

    def _forget(self, request: Request) -> int:
        """Drop a sequence that ended; returns how often it had lost its memory."""
        name, group = request.request_id, prompt_id(request)
        self._unseen.pop(name, None)
        self._queued.pop(name, None)
        if self._open.pop(name, None) is not None:
            self._groups[group].remove(request)
            if not self._groups[group]:
                del self._groups[group]
        return request.preemptions

    # --- steps ---

    def _step(self) -> None:
        before = self.clock()
        done = self.loop.step()
        deltas = self._deltas(done, before)
        stats = self._tally.due(before)
        if deltas or stats is not None:
            *full, last = parcels(deltas)
            for part in full:
                self.channels.send_outputs(wire.Outputs(part))
            self.channels.send_outputs(wire.Outputs(last, stats))

    def _deltas(self, done: StepTokens, began: float) -> list[wire.Delta]:
        """What a step adds to each sequence that is still wanted."""
        deltas: list[wire.Delta] = []
        if self._unseen:
            self._note_first_steps(done, began)
        for request, start, values in done.prompt_logprobs:
            if request.index == 0 and request.request_id in self._open:
                deltas += of_prompt(request, start, values)
        sequences, logprobs, token_ids = self._open, done.logprobs, done.token_ids
        for row, request in zip(done.rows, done.requests, strict=True):
            name, params, token = request.request_id, request.params, token_ids[row]
            if name not in sequences:  # aborted while the step ran
                continue
            asked = logprobs is not None and params.logprobs is not None
            reason = request.finish_reason
            deltas.append(
                wire.Delta(
                    request.group,
                    request.index,
                    [token],
                    [ranked(logprobs, row, params.logprobs)] if asked else None,  # type: ignore[arg-type]
                    None,
                    reason,
                    request.stop_reason,
                    self._queued.pop(name, None) if self._queued else None,
                    0 if reason is None else self._forget(request),
                )
            )
        for request in done.step.rejected:
            if request.request_id in sequences:
                deltas.append(
                    wire.Delta(
                        request.group,
                        request.index,
                        [],
                        finish_reason=request.finish_reason or "abort",
                        stop_reason=request.stop_reason or (_UNCHOSEN if request.finish_reason == "error" else None),
                        preemptions=self._forget(request),
                    )
                )
        return deltas

    def _note_first_steps(self, done: StepTokens, began: float) -> None:
        """How long those waited that this step is the first for; with steps that overlap, one step too long at most."""
        for request in done.step.requests:
            if self._unseen.pop(request.request_id, None) is not None:
                self._queued[request.request_id] = max(0.0, began - request.arrival)
