"""Drawing the next token: logit_bias, penalties, temperature, top_k, top_p, min_p, then one uniform number on the cumulative distribution.

The same seed over the same logits gives the same tokens. A vocabulary of 150,000 is never sorted as a whole unless the nucleus is that wide.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter

import torch
from torch import Tensor

from server.engine.protocol import Drawn
from server.errors import EngineFailure
from server.types import SamplingParams, TokenLogprob

_FIRST_NUCLEUS = 256  # candidates looked at first; widened eightfold until top_p is covered


class TokenSampler:
    """One request's drawing state: its random stream, and the counts of tokens that penalties look at."""

    def __init__(self, params: SamplingParams, prompt_ids: tuple[int, ...]) -> None:
        self._params = params
        self._random = torch.Generator().manual_seed(params.seed if params.seed is not None else secrets.randbits(63))
        self._generated: Counter[int] = Counter()
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else set()

    def draw(self, logits: Tensor) -> Drawn:
        """logits [vocab] float32 (kept as they are) -> the next token. Raises EngineFailure when the logits are not finite."""
        if not math.isfinite(logits.numpy().max()):  # numpy's reductions are several times as fast as torch's, and carry a NaN through as well
            raise EngineFailure("The model's output is not finite: the weights or the KV cache are damaged. Check the GGUF file's checksum.")
        token_id = self._choose(self._adjusted(logits))
        logprob = _logprob(logits, token_id, self._params.top_logprobs) if self._params.top_logprobs is not None else None
        self._count(token_id)
        return Drawn(token_id, logprob)

    def _count(self, token_id: int) -> None:
        self._generated[token_id] += 1
        if self._params.repetition_penalty != 1.0:
            self._seen.add(token_id)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits after bias and penalties; a copy when anything changes."""
        p = self._params
        if not p.logit_bias and p.repetition_penalty == 1.0 and not ((p.presence_penalty or p.frequency_penalty) and self._generated):
            return logits
        logits = logits.clone()
        if p.logit_bias:
            logits[list(p.logit_bias)] += torch.tensor(list(p.logit_bias.values()))
        if self._seen:
            ids = list(self._seen)
            chosen = logits[ids]
            logits[ids] = torch.where(chosen > 0, chosen / p.repetition_penalty, chosen * p.repetition_penalty)
        if self._generated and (p.presence_penalty or p.frequency_penalty):
            counts = torch.tensor(list(self._generated.values()), dtype=torch.float32)
            logits[list(self._generated)] -= p.presence_penalty + p.frequency_penalty * counts
        return logits

    def _choose(self, logits: Tensor) -> int:
        if self._params.temperature == 0.0:
            return int(logits.numpy().argmax())
        values, ids = self._candidates(logits / self._params.temperature)
        cumulative = (values - values.max()).double().exp_().cumsum_(0)
        target = torch.rand((), generator=self._random, dtype=torch.float64) * cumulative[-1]
        index = min(int(torch.searchsorted(cumulative, target, right=True)), len(ids) - 1)
        return int(ids[index])

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What top_k, top_p and min_p leave: (logits, ids); sorted from the likeliest wherever one of them is on."""
        p = self._params
        if p.top_k <= 0 and p.top_p >= 1.0 and p.min_p <= 0.0:
            return logits, torch.arange(len(logits))
        values, ids = self._truncated(logits)
        keep = _nucleus_size(values, p.top_p) if p.top_k > 0 else len(values)
        if p.min_p > 0.0:
            keep = min(keep, int((values >= values[0] + math.log(p.min_p)).sum()))
        return values[:keep], ids[:keep]

    def _truncated(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The top_k, or else as many as hold top_p of the whole distribution (all that min_p could keep when top_p is off)."""
        p = self._params
        if p.top_k > 0:
            return torch.topk(logits, min(p.top_k, len(logits)))
        total = torch.logsumexp(logits, 0)
        width = _FIRST_NUCLEUS
        while True:
            values, ids = torch.topk(logits, min(width, len(logits)))
            held = (values - total).double().exp_().cumsum_(0)
            covered = bool(held[-1] >= p.top_p) if p.top_p < 1.0 else bool(values[-1] < values[0] + math.log(p.min_p))
            if covered or len(values) == len(logits):
                keep = int(torch.searchsorted(held, torch.tensor(p.top_p, dtype=torch.float64))) + 1 if p.top_p < 1.0 else len(values)
                return values[:keep], ids[:keep]
            width *= 8


def _nucleus_size(values: Tensor, top_p: float) -> int:
    """How many of the sorted logits hold top_p of their own probability; at least one."""
    if top_p >= 1.0:
        return len(values)
    held = values.double().softmax(0).cumsum(0)
    return min(int(torch.searchsorted(held, torch.tensor(top_p, dtype=torch.float64))) + 1, len(values))


def _logprob(logits: Tensor, token_id: int, top: int) -> TokenLogprob:
    total = torch.logsumexp(logits, 0)
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = torch.topk(logits, min(top, len(logits)))
        best = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
    return TokenLogprob(token_id, float(logits[token_id] - total), best)
