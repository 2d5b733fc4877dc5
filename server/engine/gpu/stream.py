"""Routed experts of a prompt's chunk, streamed: their bytes come over PCIe as they lie, and the GPU computes them.

    begin    count the tokens of each expert on the GPU; the counts (and what the pool needs, where it has a part) are on their way to the host
    finish   sort the tokens by expert; then, group of experts after group (gpu/streamer.py),
                 copy stream      gate, up and down of the chosen ones into the next slot of the ring
                 compute stream   open them to bfloat16; gate, up and SwiGLU; down; add each token's share to the output

A group's copy runs under the computation of those before it, so a layer takes as long as its chosen experts need to cross the bus. The host waits once, for
the counts. Where the pool takes part, roads.divide leaves some experts to it, and it works at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from server.engine.gpu.locked import PageLocks
from server.engine.gpu.plan import Chunk, Plan
from server.engine.gpu.ring import Layout
from server.engine.gpu.roads import Pace, Sample, divide
from server.engine.gpu.sections import ExpertWeights
from server.engine.gpu.staging import Staging
from server.engine.gpu.streamer import Streamer, StreamKernels, most_rows
from server.engine.gpu.threads import executor

__all__ = ["Chunk", "ExpertWeights", "StreamedExperts"]

CpuExperts = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # y, ids, weights, out on the host; writes out in full; id -1 is no expert


class StreamedExperts:
    """Routed experts on the GPU, through a ring of its memory. One thread at a time may call it."""

    def __init__(
        self,
        kernels: StreamKernels,
        device: torch.device,
        ring_bytes: int,
        staging: Staging | None = None,
        locks: PageLocks | None = None,
        pace: Pace | None = None,
    ) -> None:
        """The ring, opened weights included, is allocated here. Without a pace, half of the chosen experts are left to the pool where it has a part.

        Raises torch.OutOfMemoryError.
        """
        self._kernels, self.pace = kernels, pace
        self._staging = staging or Staging(device)
        self._streamer = Streamer(kernels, device, ring_bytes, self._staging, locks)
        self._lane = self._streamer.lane
        self._issuer: ThreadPoolExecutor | None = None
        self._first: ExpertWeights | None = None  # layer of a model
        self._before: ExpertWeights | None = None  # the last layer that was run
        self._next: dict[ExpertWeights, ExpertWeights] = {}  # which layer came behind which
        self.last: Plan | None = None  # of the last layer, for metrics

    @property
    def copied_bytes(self) -> int:
        """Of weights, over PCIe, since the start."""
        return self._streamer.copied_bytes

    def can_stream(self, layer: ExpertWeights) -> str:
        """ "", or why these experts can only be computed by the pool."""
        if reason := layer.unreadable():
            return reason
        if (needed := Layout.needed_bytes(layer.sections())) > self._streamer.ring_bytes:
            return f"an expert needs {needed / 1e6:.0f} MB of the ring, which has {self._streamer.ring_bytes / 1e6:.0f} MB"
        return ""

    @staticmethod
    def scratch_bytes(layer: ExpertWeights, n: int, top_k: int) -> int:
        """GPU memory besides the ring that a chunk of n tokens takes at most, where no token has an expert twice."""
        hidden, ffn = int(layer.gate.cols), int(layer.gate.rows)
        return 2 * n * hidden + most_rows(n) * (2 * ffn + 4 * hidden) + 48 * n * top_k

    def run(self, layer: ExpertWeights, y: Tensor, ids: Tensor, weights: Tensor, out: Tensor, cpu: CpuExperts | None = None) -> None:
        """out [n, hidden] += sum over j of weights[:, j] * ffn of expert ids[:, j] (y), as Ops.experts; with `cpu`, the pool computes a part of them."""
        self.begin(layer, y, ids, weights, out, cpu)()

    def begin(self, layer: ExpertWeights, y: Tensor, ids: Tensor, weights: Tensor, out: Tensor, cpu: CpuExperts | None = None) -> Callable[[], None]:
        """As run, once what is returned has been called. What the caller launches in between runs beside the first copies."""
        chunk = Chunk(layer, y, ids, weights, out)
        counted = torch.zeros(layer.gate.count, dtype=torch.int32, device=ids.device)
        counted.scatter_add_(0, ids.flatten().long(), torch.ones_like(ids).flatten())
        counts = self._staging.rows("counts", 1, layer.gate.count, torch.int32)[0]
        counts.copy_(counted, non_blocking=True)
        there = self._lane.mark()
        on_pool = self._send(chunk, cpu) if cpu else None

        def finish() -> None:
            there()
            self._finish(chunk, self._plan(chunk, counts.tolist(), on_pool is not None), on_pool)

        return finish

    def time(self, chunk: Chunk, copies: bool = True) -> Sample:
        """What streaming all of the chunk's experts takes; without copies, their products alone, of whatever the ring holds. Waits for the GPU."""
        counts = torch.bincount(chunk.ids.flatten(), minlength=chunk.layer.gate.count).tolist()
        plan = Plan(counts, [], [e for e, count in enumerate(counts) if count], chunk.layer.shape(chunk.ids.shape[1]), locked=True)
        self._streamer.stream(chunk, plan, copies)
        self._lane.mark()()
        return Sample(plan.streamed_load, self._lane.seconds() or 0.0)

    def close(self) -> None:
        """Wait for the copies, and end the threads."""
        self._streamer.close()
        if self._issuer is not None:
            self._issuer.shutdown()

    # --- Who computes what -------------------------------------------------------

    def _plan(self, chunk: Chunk, counts: list[int], with_pool: bool) -> Plan:
        self._learn()
        shape, locked = chunk.layer.shape(chunk.ids.shape[1]), self._streamer.is_locked(chunk.layer)
        there = self._streamer.there(chunk.layer, counts, len(chunk.ids))
        streamed = [e for e, count in enumerate(counts) if count and e not in set(there)]
        if with_pool:
            streamed = divide(counts, shape, self.pace, locked, there) if self.pace else streamed[::2]
        self.last = Plan(counts, there, streamed, shape, locked)
        return self.last

    def _learn(self) -> None:
        """What the last layer's stream took, if it is over."""
        seconds, plan = self._lane.seconds(), self.last
        if self.pace is not None and plan is not None and seconds is not None:
            self.pace.observe("stream", plan.streamed_load, seconds, plan.both, plan.locked)

    def _finish(self, chunk: Chunk, plan: Plan, on_pool: Callable[[Plan], Tensor] | None) -> None:
        stream = partial(self._stream, chunk, plan, self._follower(chunk.layer))
        if on_pool is None or not plan.both:
            stream()
            return
        streaming = self._elsewhere(stream)
        try:
            sums = on_pool(plan)
        finally:
            streaming.result()
        self._kernels.receive(chunk.out, sums)

    def _stream(self, chunk: Chunk, plan: Plan, follower: ExpertWeights | None) -> None:
        self._streamer.stream(chunk, plan)
        if follower is not None:
            self._streamer.fetch_ahead(follower, plan)

    def _follower(self, layer: ExpertWeights) -> ExpertWeights | None:
        """The layer that came behind this one the last time. Behind the last one there is none: it may be the prompt's end."""
        self._first = self._first or layer
        if self._before is not None and layer not in (self._before, self._first):
            self._next[self._before] = layer
        self._before = layer
        return self._next.get(layer)

    def _elsewhere(self, stream: Callable[[], None]) -> Future[None]:
        """Issue the stream from a thread of its own, for the caller's is the pool's; with the caller's stream and mode, which are a thread's."""
        if self._issuer is None:
            self._issuer = executor(1, "stream")
        bound, inference = self._lane.bound(stream), torch.is_inference_mode_enabled()

        def issue() -> None:
            with torch.inference_mode(inference):
                bound()

        return self._issuer.submit(issue)

    # --- The pool's part ---------------------------------------------------------

    def _send(self, chunk: Chunk, cpu: CpuExperts) -> Callable[[Plan], Tensor]:
        """What the pool needs, on its way to the host. What is returned computes there and gives the sums [n, hidden], pinned."""
        (n, top_k), hidden = chunk.ids.shape, chunk.y.shape[1]
        y, sums = (self._staging.rows(name, n, hidden) for name in ("hidden", "sums"))
        ids, weights = self._staging.rows("ids", n, top_k, torch.int32), self._staging.rows("weights", n, top_k)
        for to, source in ((y, chunk.y), (ids, chunk.ids), (weights, chunk.weights)):
            to.copy_(source, non_blocking=True)
        there = self._lane.mark()

        def on_pool(plan: Plan) -> Tensor:
            on_gpu = torch.zeros(len(plan.counts), dtype=torch.bool)
            on_gpu[plan.on_gpu] = True
            there()
            ids.masked_fill_(on_gpu[ids.long()], -1)
            start = time.perf_counter()
            cpu(y, ids, weights, sums)
            if self.pace is not None:
                self.pace.observe("cpu", plan.pool_load, time.perf_counter() - start, bool(plan.on_gpu))
            return sums

        return on_pool
