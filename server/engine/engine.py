"""The engine: a step goes in, its tokens run through the model, one token comes out. Nothing here knows what a request is."""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.decode import DecodeProgram
from server.engine.kv_cache import PAGE_SIZE, KVCache
from server.engine.models.transformer import Transformer
from server.engine.native import NativeOps
from server.engine.ops import Span
from server.engine.protocol import Drawn, Sampler, Step
from server.engine.sampler import TokenSampler
from server.errors import RequestError
from server.types import EngineUse, SamplingParams, TokenMask

WARM_UP_TOKENS = (8, 64)  # a prompt of few and one of many
WARM_UP = SamplingParams(temperature=0.0)


class LocalEngine:
    """One model on this machine's CPUs: server.engine.protocol.Engine. Called from one thread, which is one of the pool's."""

    def __init__(self, model: Transformer, cache: KVCache, ops: NativeOps, prefill_chunk: int, recorded: bool = True) -> None:
        """The model's matrices are laid out. Not `recorded`, each step of decode calls the model's own operations, which may be another maker's."""
        self._model, self._cache, self._ops = model, cache, ops
        self._prefill_chunk = prefill_chunk
        self._decode = DecodeProgram(model, cache, ops) if recorded else None

    @property
    def page_size(self) -> int:
        return PAGE_SIZE

    @property
    def num_pages(self) -> int:
        return self._cache.num_pages

    @property
    def prefill_chunk(self) -> int:
        return self._prefill_chunk

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def start(self) -> None:
        """To be called once by the thread that will call step: takes its place in the pool, then warms the model up.

        The warm-up writes to page 0, which no sequence has yet.
        """
        self._ops.pin_caller()
        for n in {min(n, self._prefill_chunk) for n in WARM_UP_TOKENS}:
            self.logits(Step((0,) * n, 0, (0,), None))
        self._last_logits(Step((0,), 0, (0,), None))

    def new_sampler(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> Sampler:
        """Raises RequestError when logit_bias names a token that the model does not have."""
        self._check(params)
        return TokenSampler(params, prompt_ids, constraint)

    def _check(self, params: SamplingParams) -> None:
        beyond = [token_id for token_id in params.logit_bias if not 0 <= token_id < self.vocab_size]
        if beyond:
            raise RequestError(f"logit_bias: token id {beyond[0]} is not in the vocabulary of {self.vocab_size} tokens.", param="logit_bias")

    @torch.inference_mode()
    def step(self, step: Step) -> Drawn | None:
        """Run the step's tokens; with a sampler, draw from the last one's logits."""
        if step.sampler is None:
            self._hidden(step)
            return None
        assert isinstance(step.sampler, TokenSampler)
        return step.sampler.draw(self._last_logits(step))

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        """Run the step's tokens and return the logits after each of them, [n, vocab] float32: for evaluation and tests."""
        return self._model.logits(self._hidden(step))

    def use(self) -> EngineUse | None:
        """What the engine's parts have done since the start; None once it is closed. Any thread may ask, and no step waits for it."""
        return self._ops.use()

    def close(self) -> None:
        self._ops.close()

    def _last_logits(self, step: Step) -> Tensor:
        """Logits [vocab] after the step's last token; the next step may overwrite them."""
        if self._decode is not None and len(step.token_ids) == 1:
            return self._decode.run(step.token_ids[0], step.start, step.pages)
        return self._model.logits(self._hidden(step)[-1:])[0]

    def _hidden(self, step: Step) -> Tensor:
        """Hidden states [n, hidden] after the last layer."""
        n = len(step.token_ids)
        assert 0 < n <= self._prefill_chunk, f"a step of {n} tokens"
        assert len(step.pages) * PAGE_SIZE >= step.start + n, "the pages do not cover the step"
        span = Span(step.start, n, step.pages)
        return self._model.forward(torch.tensor(step.token_ids, dtype=torch.int64), self._cache.layers, span)
