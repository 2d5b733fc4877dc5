"""One layer of routed experts, timed alone for q tokens at a time, beside what the same threads can read and multiply at most.

Whoever reads the figures wants to know how far they are from the machine's limits, so the limits are measured in the same run by the same pool: a
sweep over memory and loops that only multiply, both before each format and after the last. GB/s counts the bytes of the experts
that have a token, once a call; TFLOPS count 2 * 3 * hidden * ffn operations for each token in each of its experts.

The errors are the whole layer's, against float64 on the dequantised weights: for Gaussian tokens, and for such as models have, in which a few channels are
much larger than the rest. Those are what costs where activations are rounded.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from server.bench.random_experts import Kinds, LayerSize, RandomExperts, Router, Routes
from server.engine.native import NativeOps
from server.engine.ops import Matrix

WARM_S, TIMED_S, LEAST_CALLS = 0.2, 2.0, 5  # a point is timed for so long, and for so many calls at least
SETS = 64  # of tokens: a call takes the next q of them
SAMPLED = 8  # tokens whose error is looked at, of as many calls as it takes
OUTLIERS, OUTLIER = 0.005, 8  # a share of the channels, and how much larger those are
SWEEPS = 2  # passes over the memory each time


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do at most."""

    sweep_bytes: int
    sweeps: tuple[float, ...]  # GB/s of every pass, in order
    peaks: dict[str, float]  # operations a second by the kind of numbers: "f32", "int8", ..., on registers; "bf16_loaded": from L1

    @property
    def gbps(self) -> float:
        return max(self.sweeps)

    def peak(self, kind: GGMLQuantizationType) -> float:
        """TFLOPS of the fastest arithmetic that a format may use: int8 only where the weights are quantised."""
        floats = kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
        return max(rate for name, rate in self.peaks.items() if name != "int8" or not floats) / 1e12


@dataclass(frozen=True, slots=True)
class Times:
    """The timed calls of one point, in order."""

    seconds: tuple[float, ...]
    touched: tuple[int, ...]  # experts


@dataclass(frozen=True, slots=True)
class Point:
    """The layer in one format with q tokens; medians over the calls."""

    format: str  # a GGUF type, in lower case
    down_format: str  # of the down projections
    q: int
    calls: int
    ms: float
    ms_min: float
    ms_max: float
    gbps: float
    tflops: float
    intensity: float  # operations per byte
    error: float  # relative, of Gaussian tokens
    outliers: float  # of tokens with outliers

    @property
    def kind(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.format.upper()]

    @classmethod
    def of(cls, size: LayerSize, names: tuple[str, str], expert_bytes: float, q: int, times: Times, errors: tuple[float, float]) -> Point:
        ms = [1000 * seconds for seconds in times.seconds]
        gbps = [expert_bytes * touched / seconds / 1e9 for touched, seconds in zip(times.touched, times.seconds, strict=True)]
        operations = size.operations * q * size.top_k
        middle = statistics.median(ms)
        touched = statistics.mean(times.touched)
        rates = (statistics.median(gbps), operations / middle / 1e9, operations / (touched * expert_bytes))
        return cls(*names, q, len(ms), middle, min(ms), max(ms), *rates, *errors)


@dataclass(slots=True)
class Bench:
    """The machine and what was asked for; `run` yields the points one by one, and `limits` says afterwards what they are to be held against."""

    ops: NativeOps
    size: LayerSize
    qs: tuple[int, ...]
    sweep_bytes: int
    repeat: int | None = None  # timed calls of a point; None for as many as fit into TIMED_S
    _sweeps: list[float] = field(default_factory=list)
    _peaks: dict[str, float] = field(default_factory=dict)

    def run(self, formats: tuple[GGMLQuantizationType, ...]) -> Iterator[Point]:
        """Time every format at every q. The pool is driven by a thread of its own, as in the server: it is pinned, and this one is not."""
        memory = _memory(self.sweep_bytes)
        with ThreadPoolExecutor(1, initializer=self.ops.pin_caller) as driver:
            for kind in formats:
                driver.submit(self._measure_limits, memory).result()
                yield from self._format(kind, driver)
            driver.submit(self._measure_limits, memory).result()

    @property
    def limits(self) -> Limits:
        return Limits(self.sweep_bytes, tuple(self._sweeps), self._peaks)

    def _measure_limits(self, memory: torch.Tensor) -> None:
        self._sweeps += [self.sweep_bytes / self.ops.read_sweep(memory) / 1e9 for _ in range(SWEEPS)]
        for name, rate in self.ops.peak_ops().items():
            self._peaks[name] = max(rate, self._peaks.get(name, 0.0))

    def _lay_out(self, matrix: Matrix) -> None:
        for _ in self.ops.lay_out(matrix):
            pass

    def _format(self, kind: GGMLQuantizationType, driver: ThreadPoolExecutor) -> Iterator[Point]:
        kinds = Kinds.of(kind, self.size)
        experts = RandomExperts(self.size, kinds, kinds.layers(self.size))
        layers = NativeLayers(self.ops, experts, max(self.qs), lambda matrix: driver.submit(self._lay_out, matrix).result())
        router = Router(self.size, experts.layers)
        for q in self.qs:
            times = driver.submit(time_calls, layers, router, q, self.repeat).result()
            errors = driver.submit(layer_errors, experts, layers, router, q).result()
            names = (kind.name.lower(), kinds.down.name.lower())
            yield Point.of(self.size, names, kinds.expert_bytes(self.size), q, times, errors)


def _memory(nbytes: int) -> torch.Tensor:
    """Memory that is really there: all of it written, since what was not is the kernel's one page of zeros. numpy asks for large pages."""
    memory = torch.from_numpy(np.empty(nbytes // 4, np.float32))
    step = 16 << 20
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda start: memory[start : start + step].fill_(1.0), range(0, len(memory), step)))
    return memory


class Layers(Protocol):
    """Layers of experts that some engine runs."""

    def call(self, routes: Routes, number: int) -> None:
        """Run routes.layer for a set of tokens: what is timed."""
        ...

    def result(self, routes: Routes, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What it gives for these tokens [q, hidden]: as many."""
        ...


class NativeLayers:
    """The layers as the pool runs them, and room for at most `most` tokens."""

    def __init__(self, ops: NativeOps, experts: RandomExperts, most: int, lay_out: Callable[[Matrix], None]) -> None:
        self._ops = ops
        self._matrices: list[list[Matrix]] = []  # gate, up and down of each layer
        for layer in range(experts.layers):
            stacks = (experts.gate, experts.up, experts.down)
            matrices = [ops.matrix(stack.kind, stack.rows, stack.cols, experts.blocks(stack, layer), experts.size.experts) for stack in stacks]
            ops.spread_experts(*matrices)
            ops.check_nodes()
            for matrix in matrices:
                lay_out(matrix)
            self._matrices.append(matrices)
        self._x = torch.from_numpy(np.random.default_rng(1).standard_normal((most + SETS - 1, experts.size.hidden), np.float32))
        self._out = torch.zeros(most, experts.size.hidden)

    def call(self, routes: Routes, number: int) -> None:
        self._run(routes, self._x[number % SETS : number % SETS + len(routes.ids)])

    def result(self, routes: Routes, x: NDArray[np.float32]) -> NDArray[np.float32]:
        self._out.zero_()
        self._run(routes, torch.from_numpy(x))
        return self._out[: len(x)].numpy()

    def _run(self, routes: Routes, x: torch.Tensor) -> None:
        ids, weights = torch.from_numpy(routes.ids), torch.from_numpy(routes.weights)
        gate, up, down = self._matrices[routes.layer]
        self._ops.experts(gate, up, down, x, ids, weights, self._out[: len(x)])


def time_calls(layers: Layers, router: Router, q: int, repeat: int | None) -> Times:
    """Warm up, then time `repeat` calls, or as many as fit into TIMED_S, each with tokens and experts of its own."""
    began, number = time.perf_counter(), 0
    for number, routes in enumerate(_drawn(router, q)):
        if number >= 2 and time.perf_counter() - began >= WARM_S:
            break
        layers.call(routes, number)
    seconds: list[float] = []
    touched: list[int] = []
    for routes in _drawn(router, q):
        if len(seconds) >= (repeat or LEAST_CALLS) and (repeat or sum(seconds) >= TIMED_S):
            break
        number += 1
        start = time.perf_counter()
        layers.call(routes, number)
        seconds.append(time.perf_counter() - start)
        touched.append(routes.touched)
    return Times(tuple(seconds), tuple(touched))


def _drawn(router: Router, q: int) -> Iterator[Routes]:
    """Routes without end; those of small calls are drawn many at a time, so that the pool does not wait between calls."""
    while True:
        yield from [router.draw(q) for _ in range(max(1, 64 // q))]


def layer_errors(experts: RandomExperts, layers: Layers, router: Router, q: int) -> tuple[float, float]:
    """Of Gaussian tokens, and of tokens with outliers; q at a time."""
    gaussian, outliers = (relative_error(experts, layers, router, q, size) for size in (1, OUTLIER))
    return gaussian, outliers


def relative_error(experts: RandomExperts, layers: Layers, router: Router, q: int, outlier: int, sampled: int = SAMPLED) -> float:
    """|result - exact| / |exact| over `sampled` tokens or some more; OUTLIERS of the channels are `outlier` times larger than the others."""
    rng = np.random.default_rng(q)
    xs, ids, weights, results = [], [], [], []
    for _ in range(math.ceil(sampled / q)):
        routes, x = router.draw(q), _tokens(q, experts.size.hidden, outlier, rng)
        some = np.unique(np.linspace(0, q - 1, sampled, dtype=np.int64))
        results.append(layers.result(routes, x)[some])
        xs.append(x[some])
        ids.append(routes.layer * experts.size.experts + routes.ids[some])
        weights.append(routes.weights[some])
    exact = experts.exact(np.concatenate(xs), np.concatenate(ids), np.concatenate(weights))
    return float(np.linalg.norm(np.concatenate(results) - exact) / np.linalg.norm(exact))


def _tokens(q: int, hidden: int, outlier: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """x [q, hidden], in float32 but no finer than bfloat16: engines that take only those lose nothing."""
    x = rng.standard_normal((q, hidden), np.float32)
    x[:, rng.choice(hidden, max(1, round(OUTLIERS * hidden)), replace=False)] *= outlier
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
