"""Issues a layer's stream: group after group of experts is copied into the ring, opened to bfloat16, multiplied and added to the output.

Behind a layer's last group come the first ones of the layer that is next, so that the bus works on while the GPU is at attention. Which experts its tokens
will choose is not known then; in a prompt of some hundred tokens almost all of them are chosen, and only then is it done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from server.engine.gpu.locked import Bounce, PageLocks
from server.engine.gpu.plan import Ahead, Chunk, Group, Plan, Sorted, cut, neighbours
from server.engine.gpu.ring import SLOTS, Copy, CudaLane, Lane, Layout, PlainLane, Slot, cut_slot
from server.engine.gpu.sections import ExpertWeights, HostMatrix, Section
from server.engine.gpu.staging import Staging
from server.engine.kernels.plain_grouped import Runs

_LEAST_ROWS = 512  # sorted rows that a group may have in any case
_GROUPS = 6  # a layer is cut into so many groups at least, where it has the experts
_GROUP_BYTES = 100e6  # and into smaller ones than this, if an expert is: two milliseconds of the bus, and work for half of one to issue
_MOST_EXPERTS = 16  # of a group
_NEARLY_ALL = 0.9  # of a layer's experts: the next one's will be chosen too


class StreamKernels(Protocol):
    """What is used of server.engine.kernels.Kernels."""

    @property
    def dequantize(self) -> Callable[..., Any]: ...
    @property
    def gated(self) -> Callable[..., Any]: ...
    @property
    def grouped(self) -> Callable[..., Any]: ...
    @property
    def combine(self) -> Callable[..., Any]: ...
    @property
    def receive(self) -> Callable[..., Any]: ...


class Streamer:
    """The ring and the copy stream. One thread at a time; its stream is the compute stream."""

    def __init__(self, kernels: StreamKernels, device: torch.device, ring_bytes: int, staging: Staging, locks: PageLocks | None) -> None:
        self.lane: Lane = CudaLane(device) if device.type == "cuda" else PlainLane()
        self._kernels, self._device, self._staging, self._locks = kernels, device, staging, locks
        self.copied_bytes = 0  # since the start, for the metrics
        self._ring = torch.empty(ring_bytes, dtype=torch.uint8, device=device)
        self._bounce: Bounce | None = None
        self._slot = 0  # that is filled next
        self._layout: Layout | None = None  # of what was filled last
        self._ahead: Ahead | None = None
        self._slots: dict[tuple[Layout, int, Section, int], Slot] = {}

    @property
    def ring_bytes(self) -> int:
        return self._ring.numel()

    def is_locked(self, layer: ExpertWeights) -> bool:
        return all(self._matrix_is_locked(matrix) for section in layer.sections() for matrix in section)

    def there(self, layer: ExpertWeights, counts: Sequence[int], n: int) -> list[int]:
        """Experts of the layer that were copied ahead. They are given up where they are another layer's, or where too many of the n tokens chose a group."""
        if self._ahead is None:
            return []
        most = max(sum(counts[e] for e in group) for group in self._ahead.groups)
        if self._ahead.layer != layer or most > most_rows(n):
            self._ahead = None
            return []
        return self._ahead.experts

    def close(self) -> None:
        """Wait for the copies, and end the threads."""
        self.lane.drain()
        if self._bounce is not None:
            self._bounce.close()

    # --- A layer -----------------------------------------------------------------

    def stream(self, chunk: Chunk, plan: Plan, copies: bool = True) -> None:
        """Compute plan.on_gpu; plan.there is what `there` said. Without copies the products are of whatever the ring holds."""
        if not plan.on_gpu:
            return
        sections, ahead = chunk.layer.sections(), self._ahead if plan.there else None
        self._ahead = None  # even if this fails, for its slots are filled anew
        layout = ahead.layout if ahead else Layout.of(sections, self.ring_bytes, _group_size(len(plan.streamed), plan.shape.expert_bytes))
        assert layout is not None, "whether the ring is large enough is asked before"
        rows = self._sort(chunk, plan, ahead.groups if ahead else (), layout.experts)
        first = ahead.slot if ahead else self._slot
        self._cut_ring(layout)
        self.lane.start()
        for turn, (section, group) in enumerate((section, group) for section in sections for group in rows.groups):
            slot = self._cut_slot(layout, (first + turn) % SLOTS, section, len(group.experts))
            if copies and (ahead is None or turn >= len(ahead.groups)):
                self.lane.fill((first + turn) % SLOTS, self._copies(section, group.experts, slot), self._copy)
            self.lane.take((first + turn) % SLOTS)
            self._compute(chunk, rows, group, slot, partial(self.lane.release, (first + turn) % SLOTS))
        self._slot = (first + len(sections) * len(rows.groups)) % SLOTS
        self.lane.end()

    def fetch_ahead(self, layer: ExpertWeights, plan: Plan) -> None:
        """Fill the slots with the first experts of this layer, which comes next, if the last one's plan lets expect that they will be chosen."""
        bounced = self._device.type == "cuda" and not self.is_locked(layer)  # then the host would wait here
        if bounced or plan.chosen < _NEARLY_ALL * plan.shape.experts or not plan.on_gpu:
            return
        section = layer.sections()[0]
        layout = Layout.of(layer.sections(), self.ring_bytes, _group_size(len(plan.on_gpu), layer.shape(plan.shape.top_k).expert_bytes))
        groups = min(SLOTS, len(plan.on_gpu) // (2 * layout.experts)) if layout else 0  # half of what it may have there: the rest is still to be divided
        if layout is None or not groups:
            return
        self._cut_ring(layout)
        parts = tuple(tuple(range(i * layout.experts, (i + 1) * layout.experts)) for i in range(groups))
        for turn, part in enumerate(parts):
            at = (self._slot + turn) % SLOTS
            self.lane.fill(at, self._copies(section, part, self._cut_slot(layout, at, section, len(part))), self._copy)
        self._ahead = Ahead(layer, layout, self._slot, parts)

    def _cut_ring(self, layout: Layout) -> None:
        if layout != self._layout:
            self.lane.wait()
        self._layout = layout

    def _sort(self, chunk: Chunk, plan: Plan, ahead: Sequence[tuple[int, ...]], experts: int) -> Sorted:
        ids, count, on_gpu = chunk.ids, len(plan.counts), plan.on_gpu
        starts = tuple(accumulate((plan.counts[e] for e in on_gpu), initial=0))
        table = self._staging.rows("ranks", 1, count + len(starts), torch.int32)[0]
        table[:count] = len(on_gpu)
        table[on_gpu] = torch.arange(len(on_gpu), dtype=torch.int32)
        table[count:] = torch.tensor(starts, dtype=torch.int32)
        table = table.to(self._device, non_blocking=True)
        order = torch.argsort(table[:count][ids.flatten().long()], stable=True)
        slots = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
        slots[order] = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
        edges = list(accumulate(map(len, ahead), initial=0))
        ranges = list(pairwise(edges))
        ranges += [(edges[-1] + a, edges[-1] + b) for a, b in cut([plan.counts[e] for e in plan.streamed], experts, most_rows(len(ids)))]
        groups = [Group(tuple(on_gpu[a:b]), Runs(starts[a : b + 1], table[count + a : count + b + 1])) for a, b in ranges]
        return Sorted(chunk.y.to(torch.bfloat16), (order // ids.shape[1]).int(), slots.view_as(ids), groups)

    # --- A group -----------------------------------------------------------------

    def _cut_slot(self, layout: Layout, slot: int, section: Section, count: int) -> Slot:
        """Views, which are made once: a prompt goes through the same ones again and again."""
        key = (layout, slot, section, count)
        if key not in self._slots:
            self._slots[key] = cut_slot(self._ring, *key)
        return self._slots[key]

    def _copies(self, section: Section, experts: Sequence[int], slot: Slot) -> Iterator[Copy]:
        for part, matrix in zip(slot.parts, section, strict=True):
            each, locked = matrix.each, self._matrix_is_locked(matrix)
            for place, first, count in neighbours(experts):
                yield part[place * each : (place + count) * each], matrix.bytes_of(first, count), locked

    def _copy(self, to: Tensor, source: Tensor, locked: bool) -> None:
        self.copied_bytes += to.nbytes
        if locked or not to.is_cuda:
            to.copy_(source, non_blocking=True)
            return
        if self._bounce is None:
            self._bounce = Bounce(self._device)
        self._bounce.copy(to, source)

    def _matrix_is_locked(self, matrix: HostMatrix) -> bool:
        return self._locks is not None and self._locks.holds(matrix.address, matrix.nbytes)

    def _compute(self, chunk: Chunk, rows: Sorted, group: Group, slot: Slot, release: Callable[[], None]) -> None:
        _, _, ffn, hidden = slot.opened.shape
        for matrix, opened in slot.gate_up:
            self._kernels.dequantize(matrix, opened)
        joined = chunk.y.new_empty(group.runs.rows, ffn, dtype=torch.bfloat16)
        self._kernels.gated(rows.x, rows.tokens, slot.opened[0], slot.opened[1], group.runs, joined)
        self._kernels.dequantize(*slot.down)
        release()
        h = chunk.y.new_empty(group.runs.rows, hidden)
        self._kernels.grouped(joined, slot.down[1], group.runs, h)
        self._kernels.combine(h, rows.slots, chunk.weights, group.runs, chunk.out)


def _group_size(experts: int, expert_bytes: float) -> int:
    """Experts of a group, where a layer streams so many."""
    groups = max(_GROUPS, math.ceil(experts * expert_bytes / _GROUP_BYTES))
    return max(1, min(_MOST_EXPERTS, -(-experts // groups)))


def most_rows(n: int) -> int:
    """Sorted rows of a group: those of an expert that all n tokens chose fit."""
    return max(n, _LEAST_ROWS)
