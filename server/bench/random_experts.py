"""Layers of random experts and the routes of random tokens through them: what `moespan bench experts` times, with its truth in float64.

Gigabytes have to be there in seconds, all of them distinct memory. So one expert is drawn at random, in blocks as a file has them, and every other
one is that expert with its rows rotated by a random number, which costs a copy. It makes the truth cheap too: a product with any
of them is the first one's, rotated.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from server.engine.gguf.mix import fitting
from server.engine.gguf.quants import dequantize, random_blocks, row_bytes

COLD_BYTES = 1 << 30  # that lie between two uses of an expert, more or less: several times the largest cache


@dataclass(frozen=True, slots=True)
class LayerSize:
    """The experts of one layer, of which a token uses top_k."""

    experts: int
    top_k: int
    hidden: int
    ffn: int

    @property
    def operations(self) -> int:
        """Of one token in one expert; a multiplication and an addition are two."""
        return 2 * 3 * self.hidden * self.ffn


@dataclass(frozen=True, slots=True)
class Kinds:
    """The types of an expert's matrices, which differ where rows of `ffn` values are no whole number of the wanted type's blocks."""

    gate_up: GGMLQuantizationType
    down: GGMLQuantizationType

    @classmethod
    def of(cls, wanted: GGMLQuantizationType, size: LayerSize) -> Kinds:
        """What a quantised file would have."""
        return cls(fitting(wanted, size.hidden), fitting(wanted, size.ffn))

    def expert_bytes(self, size: LayerSize) -> int:
        return 2 * size.ffn * row_bytes(self.gate_up, size.hidden) + size.hidden * row_bytes(self.down, size.ffn)

    def layers(self, size: LayerSize) -> int:
        """So many that an expert is not in a cache any more when its turn comes again."""
        return math.ceil(COLD_BYTES / (size.experts * self.expert_bytes(size)))


class Rotated:
    """`count` matrices [rows, cols]: one random matrix, and each of them that one with its rows rotated."""

    def __init__(self, kind: GGMLQuantizationType, rows: int, cols: int, count: int, rng: np.random.Generator) -> None:
        self.kind, self.rows, self.cols = kind, rows, cols
        self._first = random_blocks(kind, rows, cols, 1 / math.sqrt(cols), rng)
        self._shifts = rng.integers(0, rows, count)

    def blocks(self, begin: int, end: int) -> memoryview:
        """The bytes of the matrices begin .. end - 1, one behind the other, in memory of their own."""
        data = np.empty((end - begin, *self._first.shape), np.uint8)

        def fill(index: int) -> None:
            shift = self._shifts[begin + index]
            data[index, shift:] = self._first[: self.rows - shift]
            data[index, :shift] = self._first[self.rows - shift :]

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(end - begin)))
        return data.reshape(-1).data

    def product(self, x: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
        """x[i] [cols] times the matrix index[i], for each i: [n, rows], in float64."""
        values = dequantize(self._first, self.kind, (self.rows, self.cols)).astype(np.float64)
        return np.stack([np.roll(row, self._shifts[i]) for row, i in zip(x @ values.T, index, strict=True)])


class RandomExperts:
    """`layers` layers of experts: gate, up and down have them one layer behind the other."""

    def __init__(self, size: LayerSize, kinds: Kinds, layers: int, seed: int = 0) -> None:
        rng, count = np.random.default_rng(seed), layers * size.experts
        self.size, self.kinds, self.layers = size, kinds, layers
        self.gate, self.up = (Rotated(kinds.gate_up, size.ffn, size.hidden, count, rng) for _ in range(2))
        self.down = Rotated(kinds.down, size.hidden, size.ffn, count, rng)

    def blocks(self, matrix: Rotated, layer: int) -> memoryview:
        """The bytes of one layer's experts, of self.gate, self.up or self.down."""
        return matrix.blocks(layer * self.size.experts, (layer + 1) * self.size.experts)

    def exact(self, x: NDArray[np.float32], ids: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float64]:
        """What Ops.experts should give for x [n, hidden], ids and weights [n, top_k], on the dequantised weights in float64: [n, hidden].

        ids count the experts of all layers: those of the second begin behind the first's.
        """
        wide = x.astype(np.float64).repeat(ids.shape[1], 0)
        index = ids.reshape(-1).astype(np.int64)
        gate, up = self.gate.product(wide, index), self.up.product(wide, index)
        result = self.down.product(gate / (1 + np.exp(-gate)) * up, index) * weights.reshape(-1, 1)
        return np.asarray(result.reshape(*ids.shape, -1).sum(1))


@dataclass(frozen=True, slots=True)
class Routes:
    """One call: the layer, the experts of each token and their weights."""

    layer: int
    ids: NDArray[np.int32]  # [q, top_k]
    weights: NDArray[np.float32]  # [q, top_k]
    touched: int  # experts that have a token


class Router:
    """Spreads tokens evenly, as a real router does: each token's experts are the beginning of a permutation of all.

    Which experts a call touches is then renamed to those that have rested longest, so that the memory is cold in every call, however few it takes.
    """

    def __init__(self, size: LayerSize, layers: int, seed: int = 0) -> None:
        self._size, self._rng = size, np.random.default_rng(seed)
        self._order = np.stack([self._rng.permutation(size.experts) for _ in range(layers)])  # in which a layer's experts have their turns
        self._turn = [0] * layers
        self._calls = 0

    def draw(self, q: int) -> Routes:
        """Routes of q tokens through the next layer."""
        layer = self._calls % len(self._turn)
        self._calls += 1
        chosen = self._rng.random((q, self._size.experts)).argsort(axis=1)[:, : self._size.top_k]
        used, places = np.unique(chosen, return_inverse=True)
        ids = self._order[layer][(self._turn[layer] + places) % self._size.experts].reshape(chosen.shape)
        self._turn[layer] += len(used)
        weights = self._rng.random(ids.shape, np.float32) + np.float32(0.1)
        return Routes(layer, ids.astype(np.int32), weights / weights.sum(1, keepdims=True), len(used))
