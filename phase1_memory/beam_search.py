"""Beam search for one prompt: which sequences go on, which are finished, and when no live one can win any more.

The model is asked for the next token of up to `beam_width` live sequences at once; of all live x V continuations the
likeliest `beam_width` live on. So a step forks some sequences, drops others, and orders the rest anew. Nothing of that
is about memory: `Beams` sees log-probabilities and answers with `Branch`es, and whoever holds the keys and values forks
and frees block tables as they say. A parent that goes on twice shares its blocks until one of the two writes.

    beams = Beams(BeamSearchParams(beam_width=4, max_tokens=64), eos_token_ids=[2])
    branches = beams.advance(logprobs)          # of the prompt's last token: [1, V]
    while not beams.done:
        ...                                     # row i of the next forward pass continues row branches[i].parent
        branches = beams.advance(logprobs)      # [len(branches), V]
    beams.best()

It finds what `generate(num_beams=...)` of transformers 5 finds (`GenerationMixin._beam_search`), in its order and with
its scores. Three rules make the result, and other libraries differ in each of them:

* A sequence is finished only if its end token is among the `beam_width` best continuations of the step. One that ends
  further down the list is dropped, and the list is read on until `beam_width` are found that go on.
* Finished sequences compete by `cumulative_logprob / length ** length_penalty`, where length counts generated tokens
  (the end token too, the prompt not). Live ones compete by `cumulative_logprob` alone: they are equally long.
* `early_stopping` says when to give up the live ones (Kasai et al., "A Call for Clarity in Beam Search",
  arXiv:2204.05424, compare the rules and what they cost): see `BeamSearchParams`.

Equal scores, which bfloat16 models have many of, go to the earlier beam and then to the smaller token id.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from phase0_prototype.errors import SamplingError
from phase0_prototype.sampling_params import ParameterError


@dataclass(frozen=True)
class BeamSearchParams:
    """What a user may ask of a beam search, in vLLM's and transformers' names. Raises `ParameterError`, a `UserError`.

    Attributes:
        beam_width: sequences kept, live ones and finished ones each. 1 is greedy decoding.
        max_tokens: tokens to generate at most. Whoever knows the model's context lowers it to what fits.
        length_penalty: exponent of the length that a sum of log-probabilities is divided by. 0 compares sums, 1 means;
            sums are negative, so more of it favours long sequences.
        early_stopping: when to stop once `beam_width` sequences are finished. True: at once. False: when the best live
            one, were it to end now, would score no better than the worst finished one. "never": when it could not get
            better at any length up to `max_tokens`, so that nothing is given up that might win.
        ignore_eos: go on after the model's own end token.
        stop_token_ids: a sequence ends at any of these tokens too. Kept as a tuple.
        n: how many sequences to return; None is all `beam_width`.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    n: int | None = None

    def __post_init__(self) -> None:
        _require(_is_integer(self.beam_width, 1), "beam_width", self.beam_width, "an integer from 1")
        _require(_is_integer(self.max_tokens, 1), "max_tokens", self.max_tokens, "an integer from 1")
        penalty = self.length_penalty
        number = isinstance(penalty, Real) and not isinstance(penalty, bool) and -10 <= penalty <= 10  # not NaN
        _require(number, "length_penalty", penalty, "a number from -10 to 10")
        stopping = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _require(stopping, "early_stopping", self.early_stopping, 'True, False or "never"')
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        ids = self.stop_token_ids
        listed = isinstance(ids, (list, tuple, set, frozenset)) and all(_is_integer(one, 0) for one in ids)
        _require(listed, "stop_token_ids", ids, "a list of token ids (integers from 0)")
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(ids)))
        fits = self.n is None or (_is_integer(self.n, 1) and self.n <= self.beam_width)
        _require(fits, "n", self.n, f"an integer from 1 to beam_width={self.beam_width}, or a wider beam")


class Branch(NamedTuple):
    """A live sequence of the next step: live sequence `parent` of this step followed by `token_id`.

    `score` is the sum of its log-probabilities.
    """

    parent: int
    token_id: int
    score: float


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence.

    Attributes:
        token_ids: the generated tokens, the one that ended it too.
        cumulative_logprob: sum of their log-probabilities.
        score: what sequences are ranked by: `cumulative_logprob / len(token_ids) ** length_penalty`.
        finish_reason: "stop" (end token or stop token) or "length".
        stop_reason: the stop token id; None if the model's own end token or the length ended it.
    """

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    score: float
    finish_reason: str
    stop_reason: int | None


class Beams:
    """The search for one prompt. It knows no other prompt, no model and no memory: see the module.

    Args:
        params: how to search.
        eos_token_ids: the model's end tokens; without effect when `params.ignore_eos`.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: Iterable[int] = ()) -> None:
        self.params = params
        self._ends = frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids)
        self._live: list[tuple[int, ...]] = [()]
        self._scores = [0.0]  # of the live ones: sums of log-probabilities
        self._finished: list[Hypothesis] = []  # best first, at most beam_width
        self._done = False

    @property
    def live(self) -> list[tuple[int, ...]]:
        """Generated tokens of each live sequence, in the order of the rows that `advance` takes next; none when done.

        A search begins with one live sequence without tokens: the prompt.
        """
        return list(self._live)

    @property
    def done(self) -> bool:
        """Whether the search is over: `best` is final and nothing is live."""
        return self._done

    def best(self, n: int | None = None) -> list[Hypothesis]:
        """The n best finished sequences, best first (n: `params.n`, else `beam_width`).

        Fewer than n only while the search goes on, or when the vocabulary has no n sequences to offer.
        """
        return self._finished[: n or self.params.n or self.params.beam_width]

    @torch.inference_mode()
    def advance(self, logprobs: Tensor) -> list[Branch]:
        """Extend the live sequences by one token.

        Args:
            logprobs: [live, V] float32, log-probabilities of each live sequence's next token; -inf bans one.

        Returns:
            Who is live now, likeliest first: row i of the next call belongs to entry i. Empty when the search is done.

        Raises:
            ValueError: the search is done, or `logprobs` has another shape or dtype.
            SamplingError: `logprobs` holds NaN.
        """
        if self._done or logprobs.dtype != torch.float32 or logprobs.ndim != 2 or len(logprobs) != len(self._live):
            given = f"logprobs {[*logprobs.shape]} {logprobs.dtype}"
            raise ValueError(f"{given}: this search is {'done' if self._done else f'at {len(self._live)} live rows'}")
        width, length = self.params.beam_width, len(self._live[0]) + 1
        # each live sequence can end in len(ends) ways, so that many candidates more leave `width` that go on
        candidates = _best(logprobs, self._scores, width + len(self._live) * len(self._ends))
        branches: list[Branch] = []
        for rank, branch in enumerate(candidates):
            if branch.token_id not in self._ends and length < self.params.max_tokens:
                branches.append(branch)
            elif rank < width:
                self._finished.append(self._hypothesis(branch))
        self._finished = sorted(self._finished, key=lambda hypothesis: -hypothesis.score)[:width]
        self._done = not branches or not self._can_improve(branches[0].score, length)
        branches = [] if self._done else branches[:width]
        self._live = [(*self._live[branch.parent], branch.token_id) for branch in branches]
        self._scores = [branch.score for branch in branches]
        return branches

    def _hypothesis(self, branch: Branch) -> Hypothesis:
        token_ids = (*self._live[branch.parent], branch.token_id)
        return Hypothesis(
            token_ids=token_ids,
            cumulative_logprob=branch.score,
            score=self._normalised(branch.score, len(token_ids)),
            finish_reason="stop" if branch.token_id in self._ends else "length",
            stop_reason=branch.token_id if branch.token_id in self.params.stop_token_ids else None,
        )

    def _can_improve(self, best_live: float, length: int) -> bool:
        """Whether a live sequence is expected to displace one of the finished ones."""
        params = self.params
        if len(self._finished) < params.beam_width:
            return True
        if params.early_stopping is True or params.beam_width == 1:  # one beam is greedy: it ends where it ends
            return False
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_tokens  # the sum only falls, so at best it stays and is divided by the most
        return self._normalised(best_live, length) > self._finished[-1].score

    def _normalised(self, score: float, length: int) -> float:
        return float(score / length**self.params.length_penalty)


def _best(logprobs: Tensor, scores: Sequence[float], count: int) -> list[Branch]:
    """The `count` likeliest continuations, likeliest first: fewer if there are no more that are possible.

    `topk` alone takes any of several equal ones. Here it finds only the last score that is good enough; what reaches it
    is a handful, and a stable sort of these keeps equal ones in the order of beam and token id.
    """
    totals = (logprobs + logprobs.new_tensor(scores)[:, None]).flatten()  # [live * V]
    least = totals.topk(min(count, totals.numel())).values[-1].clamp(min=torch.finfo(totals.dtype).min)  # never -inf
    near = (~(totals < least)).nonzero()[:, 0]  # ascending; not `>=`, which would pass over NaN
    values, order = totals[near].sort(descending=True, stable=True)
    parents, token_ids = near[order[:count]] // logprobs.shape[1], near[order[:count]] % logprobs.shape[1]
    found = zip(parents.tolist(), token_ids.tolist(), values[:count].tolist(), strict=True)
    branches = [Branch(parent, token_id, score) for parent, token_id, score in found]
    if branches and math.isnan(branches[0].score):  # sorts before all numbers
        raise SamplingError(f"log-probabilities of beam {branches[0].parent} hold NaN: check the weights and dtype")
    return branches


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        message = f"{name}={value!r:.60} ({type(value).__name__}) is not allowed: give {allowed}"
        raise ParameterError(name, message)


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low
