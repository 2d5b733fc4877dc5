"""The engine on a GPU: a prompt's chunks run operation by operation, and each token of decode is one launch of a captured graph.

The next token is drawn on the GPU too, behind the step and without the CPU in between; what comes back is one number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from server.engine.engine import WARM_UP, LocalEngine
from server.engine.gpu.flags import open_flags
from server.engine.gpu.memory import no_memory_left
from server.engine.gpu.meter import open_meter
from server.engine.gpu.ops import GpuOps
from server.engine.gpu.sampler import GpuSampler
from server.engine.gpu.step import GraphStep
from server.engine.kv_cache import PAGE_SIZE, KVCache
from server.engine.models.transformer import Transformer
from server.engine.protocol import Drawn, Sampler, Step
from server.engine.sampler import SamplerState
from server.errors import EngineFailure
from server.types import EngineUse, SamplingParams, TokenMask

_log = logging.getLogger(__name__)

COMPILED_FOR = (1, 2, 3, 4, 5, 6, 7, 8, 13, 48, 67)  # tokens


class GpuEngine(LocalEngine):
    """One model on a GPU and this machine's CPUs: server.engine.protocol.Engine. Called from one thread, which is one of the pool's."""

    def __init__(self, model: Transformer, cache: KVCache, ops: GpuOps, prefill_chunk: int, graphs: bool = True) -> None:
        """The model's matrices are laid out. Without `graphs`, or with the plain twins, each token of decode calls the model's operations."""
        super().__init__(model, cache, ops.native, prefill_chunk, recorded=False)
        recorded = ops.kernels.name == "triton"
        self._gpu, self._graphs = ops, graphs and recorded
        self._graph: GraphStep | None = None
        self._sampler = GpuSampler(model.vocab_size, ops.device, ops.kernels.draw, recorded)
        self._meter = open_meter(ops.device)
        self._done = torch.cuda.Event(blocking=True) if ops.device.type == "cuda" else None  # to wait for it costs no CPU

    def start(self) -> None:
        """As LocalEngine.start; kernels are compiled by it, the roads of a prompt's experts are measured, and then the step is captured.

        Raises DeviceError where the GPU's memory does not do.
        """
        try:
            self._start()
        except torch.OutOfMemoryError as error:
            raise no_memory_left("to work in", error) from error

    def _start(self) -> None:
        if self._gpu.device.type == "cuda":
            torch.cuda.set_device(self._gpu.device)
        self._compile()
        super().start()
        moe = self._model.hparams.moe
        if moe is not None:
            self._gpu.prepare(moe.top_k, self._prefill_chunk)
        if self._graphs:
            self._graph = GraphStep(self._model, self._cache, self._gpu, open_flags(), self._cache.num_pages * PAGE_SIZE)
        self._sampler.warm_up()
        self.step(Step((0,), 0, (0,), self.new_sampler(WARM_UP, ())))

    @torch.inference_mode()
    def _compile(self) -> None:
        """Have the kernels of all kinds of chunks compiled: a number of tokens that is 1, a multiple of 16 or neither is each a kernel of its own."""
        if self._gpu.kernels.compile_only is None:
            return
        began, most = time.monotonic(), min(self._prefill_chunk, self._cache.num_pages * PAGE_SIZE)
        with self._gpu.compile_only():
            for n in sorted({min(n, most) for n in COMPILED_FOR} | {most}):
                self._last_logits(Step((0,) * n, 0, tuple(range(-(-n // PAGE_SIZE))), None))
            self._sampler.compile()
        _log.info("The GPU's kernels are compiled (%.1f s; the next start finds them).", time.monotonic() - began)

    def new_sampler(self, params: SamplingParams, prompt_ids: tuple[int, ...], constraint: TokenMask | None = None) -> Sampler:
        """Raises RequestError when logit_bias names a token that the model does not have."""
        self._check(params)
        return self._sampler.begin(params, prompt_ids, constraint)

    @torch.inference_mode()
    def step(self, step: Step) -> Drawn | None:
        """As LocalEngine.step. Raises EngineFailure where the GPU's memory does not do."""
        try:
            return self._step(step)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise EngineFailure(
                f"The GPU has no memory left for a step of {len(step.token_ids)} tokens ({str(error).split('. ')[0]}). "
                "Lower --prefill_chunk or --cache_lens, or close what else uses the GPU."
            ) from error

    def _step(self, step: Step) -> Drawn | None:
        try:
            self._enqueue(step)
        finally:  # whatever failed, the next step must find the GPU at rest, and nobody reading what it is going to write
            self._wait()
        return self._sampler.result() if step.sampler is not None else None

    def _enqueue(self, step: Step) -> None:
        """All of the step but the wait for its end."""
        if step.sampler is None:
            self._hidden(step)
            return
        assert isinstance(step.sampler, SamplerState)
        captured = self._graph if len(step.token_ids) == 1 else None
        if captured is None:
            logits = self._last_logits(step)
        else:
            logits = captured.launch(step.token_ids[0], step.start, step.pages)
            captured.finish()
        self._sampler.enqueue(logits, step.sampler)  # while the GPU is at the head: before `finish` it would keep the pool waiting

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        return super().logits(step).cpu()

    def close(self) -> None:
        self._graph = None
        self._gpu.close()

    def use(self) -> EngineUse | None:
        use = super().use()
        if use is None:
            return None
        return replace(use, streamed_bytes=self._gpu.streamed_bytes, roads=self.roads, gpu=self._meter.read() if self._meter is not None else None)

    @property
    def roads(self) -> Mapping[str, int]:
        """How many chunks of a layer's experts took each road since the start."""
        return self._gpu.roads

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Of the last token: when each layer's experts were asked for and answered, in nanoseconds from its launch."""
        return self._graph.turns if self._graph is not None else []

    def _wait(self) -> None:
        """For the GPU."""
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
