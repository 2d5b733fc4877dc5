"""The routed experts of a prompt: each chunk takes the road that the cost model picks, among those that the layer can take.

prefill = PrefillExperts(native, kernels, device, staging, "auto", ring_bytes)
prefill.prepare(layers, top_k, most)        # all experts are laid out: page-lock them, compile, measure
finish = prefill.begin(gate, up, down, x, ids, weights, out)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from server.engine.gpu.experts import PoolExperts
from server.engine.gpu.locked import CudaDriver, PageLocks
from server.engine.gpu.pace import measure_pace, warm_up
from server.engine.gpu.roads import Mode, Road, Roads
from server.engine.gpu.staging import Staging
from server.engine.gpu.stream import CpuExperts, ExpertWeights, StreamedExperts
from server.engine.gpu.threads import CPUS, executor
from server.engine.kernels import Kernels
from server.engine.native import NativeOps
from server.engine.ops import Matrix

_log = logging.getLogger(__name__)

LOCK_S = 120.0  # that page-locking may take: R1's 377 GB take about 20


class PrefillExperts:
    """Ops.experts for chunks of a prompt. One thread at a time may call it: it is one of the pool's."""

    def __init__(self, native: NativeOps, kernels: Kernels, device: torch.device, staging: Staging, mode: Mode, ring_bytes: int) -> None:
        """The ring is allocated here, unless `mode` is "cpu". Raises torch.OutOfMemoryError."""
        self._native, self._kernels, self._device, self._mode = native, kernels, device, mode
        self._pool = PoolExperts(native, kernels, device, staging)
        self._locks = _page_locks() if device.type == "cuda" and mode != "cpu" else None
        self._streamed = None if mode == "cpu" else StreamedExperts(kernels, device, ring_bytes, staging, self._locks)
        self._roads: Roads | None = None
        self._streamable: set[ExpertWeights] = set()
        self.taken: Counter[Road] = Counter()  # chunks of a layer by their road, for the metrics

    @property
    def streamed_bytes(self) -> int:
        """Of experts' weights, over PCIe, since the start."""
        return self._streamed.copied_bytes if self._streamed is not None else 0

    def prepare(self, layers: Sequence[ExpertWeights], top_k: int, most: int) -> None:
        """Once all experts are laid out; `layers` are the model's, in order, and `most` tokens are a chunk. The log is told what was measured."""
        if self._streamed is None:
            return
        reasons = {layer: self._streamed.can_stream(layer) for layer in layers}
        for reason in {*reasons.values()} - {""}:
            count = sum(other == reason for other in reasons.values())
            _log.info("Prefill: %d of %d layers of experts are computed by the CPU, since %s.", count, len(layers), reason)
        streamable = [layer for layer in layers if not reasons[layer]]
        if not streamable:
            return
        unlocked = self._lock(streamable)
        with self._compiling():
            warm_up(self._streamed, streamable, top_k, most, self._device)
        first = streamable[0]
        pace = measure_pace(self._streamed, first, self._on_pool(first), top_k, most, self._device, unlocked)
        self._roads, self._streamable = Roads(self._mode, first.shape(top_k), pace), set(streamable)
        _log.info("%s", self._roads.describe(most))

    def begin(self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
        """As Ops.experts: the sums are in `out` once what is returned has been called."""
        layer = ExpertWeights(gate, up, down)
        road = self._roads.pick(len(x)) if self._roads is not None and layer in self._streamable else "cpu"
        self.taken[road] += 1
        if road == "cpu" or self._streamed is None:
            return self._pool.begin(gate, up, down, x, ids, weights, out)
        return self._streamed.begin(layer, x, ids, weights, out, self._on_pool(layer) if road == "split" else None)

    def close(self) -> None:
        """Wait for copies, and unlock the experts' memory, which must still be there."""
        if self._streamed is not None:
            self._streamed.close()
        if self._locks is not None:
            self._locks.close()

    def _lock(self, layers: Sequence[ExpertWeights]) -> ExpertWeights | None:
        """Page-lock as much as there is time for. Returns the first layer that is not, if there is one beside others that are."""
        if self._locks is None or not self._locks.lock([layer.ranges() for layer in layers], LOCK_S):
            return None
        return next((layer for layer in layers[1:] if not all(self._locks.holds(*part) for part in layer.ranges())), None)

    def _compiling(self) -> AbstractContextManager[None]:
        compile_only = self._kernels.compile_only
        return nullcontext() if compile_only is None else compile_only(executor(len(CPUS), "compile"))

    def _on_pool(self, layer: ExpertWeights) -> CpuExperts:
        return partial(self._native.experts, layer.gate, layer.up, layer.down, accumulate=False)


def _page_locks() -> PageLocks | None:
    try:
        return PageLocks(CudaDriver())
    except ImportError:
        _log.warning("cuda-bindings is not installed, so experts are streamed to the GPU through buffers, slower. Install it with: pip install cuda-bindings")
        return None
