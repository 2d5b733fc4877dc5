"""The GPU's sampler: it draws by the definition in server/engine/sampler.py, and of a step the host sees one token.

What a request asks for stands in device memory (history, bias, the tokens that its constraint allows) and in a few pinned scalars that the first kernel
fetches, so that one graph serves every step and every request of the same way of drawing. The uniform numbers come from the request's own generator on the
host, as they do on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from server.engine.gpu import drawing
from server.engine.gpu.drawing import DrawBuffers, Way
from server.engine.protocol import Drawn
from server.engine.sampler import TOP_P_SLACK, WEIGHT_OF_BEST, SamplerState, not_finite
from server.types import SamplingParams, TokenLogprob, TokenMask

Draw = Callable[[Tensor, DrawBuffers, Way], None]


class GpuSampler:
    """One for an engine. A step is `enqueue`, a wait for the stream, and `result`; the next step may follow only then.

    `logits` [vocab] float32 is the sampler's own; a model whose last product writes there saves a copy.
    """

    def __init__(self, vocab: int, device: torch.device, draw: Draw, recorded: bool = True) -> None:
        """draw is kernels/sample.py's, or its twin, which no graph may hold: then each draw is launched anew (`recorded` is False)."""
        self.logits = torch.zeros(vocab, device=device)
        self._buffers = drawing.draw_buffers(vocab, device)
        self._scalars = self._buffers.scalars.numpy()
        self._draw = draw
        pin = device.type != "cpu"
        self._graphs: dict[Way, torch.cuda.CUDAGraph] | None = {} if pin and recorded else None
        self._history = torch.zeros(vocab, dtype=torch.int32, pin_memory=pin)  # where a new request's history and bias are laid out for the copy
        self._bias = torch.zeros(vocab, pin_memory=pin)
        self._allowed = torch.zeros_like(self._buffers.allowed, device="cpu", pin_memory=pin)
        self._owner: SamplerState | None = None  # whose history and bias are on the device
        self._drawing: SamplerState | None = None  # whose step is under way

    def begin(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> SamplerState:
        """The drawing state for a new request."""
        return SamplerState(params, prompt_ids, constraint)

    def compile(self) -> None:
        """Launch what every way of drawing launches, whatever comes of it."""
        for way in _ways():
            self._draw(self.logits, self._buffers, way)

    def warm_up(self) -> None:
        """Compile and record every way of drawing, so that no request waits for it; nothing to do without a GPU."""
        if self._graphs is not None:
            for way in _ways():
                self._graph(way)

    def enqueue(self, logits: Tensor, state: SamplerState) -> None:
        """Draw from logits [vocab] (or [1, vocab]) float32 in the current stream. Part of a graph where that stream is being captured.

        A constraint is asked here, on the CPU, while the GPU computes those logits. Raises RequestError when it leaves nothing.
        """
        if logits.data_ptr() != self.logits.data_ptr():
            self.logits.copy_(logits.view(-1))
        way = _way(state.params, len(self.logits), state)
        if way.adjust and self._owner is not state:
            self._hand_over(state)
        if state.constraint is not None:
            self._hand_over_mask(state.constraint.mask())
        self._write_scalars(state)
        self._drawing = state
        if self._graphs is None or torch.cuda.is_current_stream_capturing():
            self._draw(self.logits, self._buffers, way)
        else:
            self._graph(way).replay()

    def result(self) -> Drawn:
        """The token of the step before, once its stream has been waited for. Raises EngineFailure when the logits were not finite."""
        state, self._drawing = self._drawing, None
        assert state is not None, "nothing was drawn"
        token_id = int(self._buffers.token[0])
        if token_id == drawing.NOT_FINITE:
            raise not_finite()
        state.count(token_id)
        return Drawn(token_id, self._logprob(token_id, state.params.top_logprobs))

    def _logprob(self, token_id: int, top: int | None) -> TokenLogprob | None:
        if top is None:
            return None
        logprobs, ids = self._buffers.logprobs.tolist(), self._buffers.leader_ids.tolist()
        count = min(top, len(self.logits))
        return TokenLogprob(token_id, logprobs[0], tuple(zip(ids[:count], logprobs[1 : 1 + count], strict=True)))

    def _hand_over(self, state: SamplerState) -> None:
        """Put a request's history and bias where the kernels read them."""
        history, bias = self._history.zero_().numpy(), self._bias.zero_().numpy()
        history[list(state.seen)] = drawing.IN_PROMPT
        for token_id, count in state.generated.items():
            history[token_id] += count
        for token_id, value in state.params.logit_bias.items():
            bias[token_id] = value
        self._buffers.history.copy_(self._history, non_blocking=True)
        self._buffers.bias.copy_(self._bias, non_blocking=True)
        self._hand_over_mask(None)
        self._owner = state

    def _hand_over_mask(self, words: memoryview | None) -> None:
        """Put down which tokens the next draw may take: all of them, or those of a mask, which ends with the tokenizer's vocabulary."""
        allowed = self._allowed.numpy()
        if words is None:
            allowed.fill(-1)
        else:
            known = np.frombuffer(words, dtype=np.int32)[: len(allowed)]
            allowed[: len(known)] = known
            allowed[len(known) :] = 0
        self._buffers.allowed.copy_(self._allowed, non_blocking=True)

    def _write_scalars(self, state: SamplerState) -> None:
        p, scalars = state.params, self._scalars
        scalars[drawing.UNIFORM] = state.uniform()
        scalars[drawing.TEMPERATURE] = p.temperature
        scalars[drawing.REPETITION] = p.repetition_penalty
        scalars[drawing.PRESENCE] = p.presence_penalty
        scalars[drawing.FREQUENCY] = p.frequency_penalty
        scalars[drawing.TOP_K] = p.top_k
        scalars[drawing.TOP_P] = p.top_p - TOP_P_SLACK
        scalars[drawing.LEAST_WEIGHT] = int(p.min_p * WEIGHT_OF_BEST)
        scalars[drawing.LEADERS] = min(p.top_logprobs or 0, len(self.logits))

    def _graph(self, way: Way) -> torch.cuda.CUDAGraph:
        assert self._graphs is not None
        if way not in self._graphs:
            self._graphs[way] = self._captured(way)
        return self._graphs[way]

    def _captured(self, way: Way) -> torch.cuda.CUDAGraph:
        """Drawn once, for kernels are compiled at their first launch, and then recorded; the history is as before."""
        history = self._buffers.history.clone()
        torch.cuda.synchronize()
        self._draw(self.logits, self._buffers, way)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._draw(self.logits, self._buffers, way)
        self._buffers.history.copy_(history)
        return graph


def _way(params: SamplingParams, vocab: int, state: SamplerState) -> Way:
    leaders = params.top_logprobs is not None
    if state.greedy:
        return Way(True, state.adjusts, leaders=leaders)
    return Way(False, state.adjusts, 0 < params.top_k < vocab, params.top_p < 1.0, leaders)


def _ways() -> list[Way]:
    """Every way that a request can ask for."""
    flags = (False, True)
    greedy = [Way(True, adjust, leaders=leaders) for adjust in flags for leaders in flags]
    return greedy + [Way(False, adjust, top_k, top_p, leaders) for adjust in flags for top_k in flags for top_p in flags for leaders in flags]
