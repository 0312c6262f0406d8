"""An executor without a model: steps take as long as they are told to, and tokens are those of a given text.

It stands in for the device, so that what is left can be measured: scheduling, messages between processes, text, HTTP.
Like a device it runs one step after the other, and on its own: `launch` returns at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from phase0_prototype.step import Step, StepTokens


@dataclass(frozen=True)
class NullLaunched:
    """A step that is over at `due` (seconds of `time.perf_counter`)."""

    step: Step
    due: float


class NullExecutor:
    """Token i of an answer is `text[(seed + i) % len(text)]`: different answers, the same in any batch.

    Args:
        step_seconds: of any step.
        token_seconds: more, for each token that it computes.
        text: token ids.
    """

    def __init__(self, step_seconds: float, token_seconds: float = 0.0, text: Sequence[int] = (0,)) -> None:
        self.step_seconds, self.token_seconds, self.text = step_seconds, token_seconds, tuple(text)
        self._free = 0.0  # when the last step that was launched is over

    def launch(self, step: Step, before: NullLaunched | None = None) -> NullLaunched:
        """Begin a step, after those that were launched before."""
        self._free = max(time.perf_counter(), self._free) + self.step_seconds + step.num_tokens * self.token_seconds
        return NullLaunched(step, self._free)

    def collect(self, launched: NullLaunched) -> StepTokens:
        """Wait until it is over."""
        if (left := launched.due - time.perf_counter()) > 0:
            time.sleep(left)
        step, text = launched.step, self.text
        requests = step.sampling
        tokens = [text[(r.seed + len(r.output_token_ids)) % len(text)] for r in requests]
        return StepTokens(step, requests, range(len(requests)), tokens)
