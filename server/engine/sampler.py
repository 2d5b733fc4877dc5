"""Drawing the next token: constraint, logit_bias, penalties, temperature, top_k, top_p, min_p, then one uniform number on the cumulative distribution.

The definition, by which the GPU draws too (gpu/sampler.py), needs no vocabulary to be sorted:

- a token that the request's constraint forbids has a logit of minus infinity, from before bias and penalties on;
- a token weighs floor(2^44 exp((logit - best) / temperature)) by its logit after bias and penalties. Weights are whole numbers, so that a sum of
  them is the same in any order;
- top_k, top_p and min_p each ask for a least logit or weight, and what is equal to it stays. top_k: the k-th largest logit. top_p: the largest logit
  such that the tokens from it upwards hold top_p of what top_k left, less 2^-20, for float32 logits cannot tell more. min_p: that share of the best's
  weight;
- of the tokens that stay, in the vocabulary's order, the first is drawn whose cumulative weight is above uniform * total.

The same seed over the same logits gives the same tokens.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from server.engine.protocol import Drawn
from server.errors import EngineFailure
from server.types import SamplingParams, TokenLogprob, TokenMask

WEIGHT_OF_BEST = 2**44  # 2^18 tokens of that weight fit into an int64
LARGEST = float(np.finfo(np.float32).max)  # what a penalty near 0 may make of a logit
TOP_P_SLACK = 2.0**-20
_LEAST_TEMPERATURE = 1e-30  # float32 has still room beneath it; below, drawing is greedy
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_ADDENDS = np.where(_BITS, np.float32(0), np.float32(-np.inf))  # [256, 8]: what a byte of a mask adds to its tokens' logits; ten times as fast as a select
_FIRST_NUCLEUS = 256  # candidates looked at first; widened eightfold until top_p is covered


class SamplerState:
    """What one request carries from token to token: its random stream, its constraint, and the counts of tokens that penalties look at."""

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> None:
        self.params = params
        self.constraint = constraint
        self.generated: Counter[int] = Counter()
        self.seen = set(prompt_ids) if params.repetition_penalty != 1.0 else set()
        self._random = torch.Generator().manual_seed(params.seed if params.seed is not None else secrets.randbits(63))

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without chance."""
        return self.params.temperature < _LEAST_TEMPERATURE

    @property
    def adjusts(self) -> bool:
        """Whether bias, penalties or a constraint can change a logit."""
        p = self.params
        return self.constraint is not None or bool(p.logit_bias) or p.repetition_penalty != 1.0 or bool(p.presence_penalty or p.frequency_penalty)

    def uniform(self) -> float:
        """The stream's next number, in [0, 1); greedy requests take none."""
        return torch.rand((), generator=self._random, dtype=torch.float64).item() if not self.greedy else 0.0

    def count(self, token_id: int) -> None:
        """Remember a token that was drawn. Raises RequestError when the constraint cannot go on with it."""
        if self.constraint is not None:
            self.constraint.accept(token_id)
        self.generated[token_id] += 1
        if self.params.repetition_penalty != 1.0:
            self.seen.add(token_id)


class TokenSampler(SamplerState):
    """The CPU's sampler of one request."""

    def draw(self, logits: Tensor) -> Drawn:
        """logits [vocab] float32 (kept as they are) -> the next token.

        Raises EngineFailure when the logits are not finite, and RequestError when the constraint leaves nothing.
        """
        best = _finite_best(logits)
        adjusted = self._adjusted(logits)
        token_id = self._choose(adjusted, best if adjusted is logits else _finite_best(adjusted))
        logprob = _logprob(logits, token_id, self.params.top_logprobs) if self.params.top_logprobs is not None else None
        self.count(token_id)
        return Drawn(token_id, logprob)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits after constraint, bias and penalties; a copy when anything changes."""
        p = self.params
        if not self.adjusts:
            return logits
        logits = self._allowed(logits)
        if p.logit_bias:
            logits[list(p.logit_bias)] += torch.tensor(list(p.logit_bias.values()))
        if self.seen:
            ids = list(self.seen)
            chosen = logits[ids]
            penalised = torch.where(chosen > 0, chosen / p.repetition_penalty, chosen * p.repetition_penalty)
            logits[ids] = penalised.clamp_(max=LARGEST)
        if self.generated and (p.presence_penalty or p.frequency_penalty):
            counts = torch.tensor(list(self.generated.values()), dtype=torch.float32)
            logits[list(self.generated)] -= p.presence_penalty + p.frequency_penalty * counts
        return logits

    def _allowed(self, logits: Tensor) -> Tensor:
        """A copy of the logits, with minus infinity where the constraint forbids a token, and where it knows none."""
        words = None if self.constraint is None else self.constraint.mask()
        if words is None:
            return logits.clone()
        addends = _ADDENDS.take(np.frombuffer(words, dtype=np.uint8), axis=0).reshape(-1)[: len(logits)]
        unknown = np.full(len(logits) - len(addends), -np.inf, dtype=np.float32)
        return torch.from_numpy(np.concatenate((addends, unknown)) if len(unknown) else addends).add_(logits)

    def _choose(self, logits: Tensor, best: float) -> int:
        if self.greedy:
            return int(logits.numpy().argmax())
        ids, weights = self._candidates(logits, best)
        cumulative = weights.cumsum(0)
        total = int(cumulative[-1])
        target = min(int(self.uniform() * total), total - 1)
        index = int(torch.searchsorted(cumulative, target, right=True))
        return index if ids is None else int(ids[index])

    def _candidates(self, logits: Tensor, best: float) -> tuple[Tensor | None, Tensor]:
        """What top_k, top_p and min_p leave, in the vocabulary's order: (ids, or None for all of them; weights)."""
        p = self.params
        kept, ids = logits, None
        if 0 < p.top_k < len(logits):
            kept, ids = _at_least(logits, torch.topk(logits, p.top_k).values[-1])
        weights = self._weights(kept, best)
        if p.top_p < 1.0:
            kept, nucleus = _at_least(kept, self._nucleus_cutoff(kept, weights, best))
            ids, weights = nucleus if ids is None else ids[nucleus], weights[nucleus]
        if p.min_p > 0.0:
            likely = torch.from_numpy(np.flatnonzero(weights.numpy() >= int(p.min_p * WEIGHT_OF_BEST)))
            ids, weights = likely if ids is None else ids[likely], weights[likely]
        return ids, weights

    def _weights(self, logits: Tensor, best: float) -> Tensor:
        return (logits - best).div_(self.params.temperature).exp_().mul_(WEIGHT_OF_BEST).long()

    def _nucleus_cutoff(self, logits: Tensor, weights: Tensor, best: float) -> Tensor:
        """The least logit of those that hold top_p of the weights."""
        needed = max(int((self.params.top_p - TOP_P_SLACK) * int(weights.sum())), 1)
        width = _FIRST_NUCLEUS
        while True:
            values = torch.topk(logits, min(width, len(logits))).values
            held = self._weights(values, best).cumsum(0)
            if held[-1] >= needed or width >= len(logits):
                return values[min(int(torch.searchsorted(held, needed)), len(values) - 1)]
            width *= 8


def _finite_best(logits: Tensor) -> float:
    """The largest logit. Raises EngineFailure where it is not finite."""
    best = float(logits.numpy().max())  # numpy's reductions are several times as fast as torch's, and carry a NaN through as well
    if not math.isfinite(best):
        raise not_finite()
    return best


def not_finite() -> EngineFailure:
    """What is raised, and not a token drawn, from damaged logits."""
    return EngineFailure("The model's output is not finite: the weights or the KV cache are damaged. Check the GGUF file's checksum.")


def _at_least(logits: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Those logits that are not below the cutoff, and where they stand, in order."""
    at = torch.from_numpy(np.flatnonzero(logits.numpy() >= cutoff.item()))
    return logits[at], at


def _logprob(logits: Tensor, token_id: int, top: int) -> TokenLogprob:
    total = torch.logsumexp(logits, 0)
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = torch.topk(logits, min(top, len(logits)))
        best = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
    return TokenLogprob(token_id, float(logits[token_id] - total), best)
