"""One chunk at one layer of experts: what is asked for, who computes what, and in which groups the streamed experts cross the bus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from server.engine.gpu.ring import Layout
from server.engine.gpu.roads import LayerShape, Load
from server.engine.gpu.sections import ExpertWeights
from server.engine.kernels.plain_grouped import Runs


@dataclass(frozen=True, slots=True)
class Chunk:
    """out [n, hidden] += sum over j of weights[:, j] * ffn of expert ids[:, j] (y)."""

    layer: ExpertWeights
    y: Tensor  # float32 [n, hidden]
    ids: Tensor  # int32 [n, top_k]
    weights: Tensor  # float32 [n, top_k]
    out: Tensor  # float32 [n, hidden]


@dataclass(frozen=True, slots=True)
class Ahead:
    """Groups of a layer's experts that were copied before anybody chose them, while the GPU had no experts to wait for; the first is in `slot`."""

    layer: ExpertWeights
    layout: Layout
    slot: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def experts(self) -> list[int]:
        return [expert for group in self.groups for expert in group]


@dataclass(frozen=True, slots=True)
class Plan:
    """Who computes what, once it is known who chose whom."""

    counts: list[int]  # tokens of every expert
    there: list[int]  # experts that were copied ahead; the GPU computes them if they were chosen
    streamed: list[int]  # experts that are copied now, ascending; each was chosen
    shape: LayerShape
    locked: bool  # all bytes come from page-locked memory

    @property
    def chosen(self) -> int:
        """How many experts have tokens."""
        return sum(map(bool, self.counts))

    @property
    def on_gpu(self) -> list[int]:
        return self.there + self.streamed

    @property
    def both(self) -> bool:
        """Whether the pool has a part."""
        return any(count for expert, count in enumerate(self.counts) if expert not in set(self.on_gpu))

    @property
    def streamed_load(self) -> Load:
        """What is copied now, and all that the GPU computes."""
        return self.shape.load(len(self.streamed), self._rows_on_gpu())

    @property
    def pool_load(self) -> Load:
        on_gpu = sum(self.counts[e] > 0 for e in self.on_gpu)
        return self.shape.load(self.chosen - on_gpu, sum(self.counts) - self._rows_on_gpu())

    def _rows_on_gpu(self) -> int:
        return sum(self.counts[e] for e in self.on_gpu)


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that are in a slot together, ascending, and their sorted rows."""

    experts: tuple[int, ...]
    runs: Runs


@dataclass(frozen=True, slots=True)
class Sorted:
    """A chunk's tokens by expert, on the device. Rows of experts that are the pool's come last; within an expert, rows are in the tokens' order."""

    x: Tensor  # bf16 [n, hidden]
    tokens: Tensor  # int32 [n * top_k]: the token of each sorted row
    slots: Tensor  # int32 [n, top_k]: the sorted row of each token's experts
    groups: list[Group]


def neighbours(experts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place, first expert, how many) of the experts that lie behind one another: one copy each."""
    start = 0
    for i in range(1, len(experts) + 1):
        if i == len(experts) or experts[i] != experts[i - 1] + 1:
            yield start, experts[start], i - start
            start = i


def cut(counts: Sequence[int], experts: int, most_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of experts, given by their tokens, that are a group: so many of them and of their rows at most, but always one expert."""
    first, rows = 0, 0
    for i, count in enumerate(counts):
        if i > first and (i - first == experts or rows + count > most_rows):
            yield first, i
            first, rows = i, 0
        rows += count
    if counts:
        yield first, len(counts)
