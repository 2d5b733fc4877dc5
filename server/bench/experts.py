"""One layer of routed experts, timed alone for q tokens at a time, beside what the same threads can read and multiply at most.

Whoever reads the figures wants to know how far they are from the machine's limits, so the limits are measured in the same run by the same pool: a
sweep over memory and loops that only multiply, both before each format and after the last. GB/s counts the bytes of the experts
that have a token, once a call; TFLOPS count 2 * 3 * hidden * ffn operations for each token in each of its experts.
"""

from __future__ import annotations

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
SAMPLED = 4  # tokens of a call whose error is looked at
SWEEPS = 2  # passes over the memory each time


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do at most."""

    sweep_bytes: int
    sweeps: tuple[float, ...]  # GB/s of every pass, in order
    peaks: dict[str, float]  # operations a second by the kind of numbers: "f32", "int8", ...

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
    error: float  # relative, against float64 on the dequantised weights

    @property
    def kind(self) -> GGMLQuantizationType:
        return GGMLQuantizationType[self.format.upper()]

    @classmethod
    def of(cls, size: LayerSize, names: tuple[str, str], expert_bytes: float, q: int, times: Times, error: float) -> Point:
        ms = [1000 * seconds for seconds in times.seconds]
        gbps = [expert_bytes * touched / seconds / 1e9 for touched, seconds in zip(times.touched, times.seconds, strict=True)]
        operations = size.operations * q * size.top_k
        middle = statistics.median(ms)
        touched = statistics.mean(times.touched)
        return cls(
            *names, q, len(ms), middle, min(ms), max(ms), statistics.median(gbps), operations / middle / 1e9, operations / (touched * expert_bytes), error
        )


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
            error = driver.submit(relative_error, experts, layers, router.draw(q)).result()
            names = (kind.name.lower(), kinds.down.name.lower())
            yield Point.of(self.size, names, kinds.expert_bytes(self.size), q, times, error)


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

    def result(self, routes: Routes) -> NDArray[np.float32]:
        """What that gives for the first set: [q, hidden]."""
        ...

    def tokens(self, q: int, number: int) -> torch.Tensor:
        """x [q, hidden] of a set, float32."""
        ...


class NativeLayers:
    """The layers as the pool runs them, and room for at most `most` tokens."""

    def __init__(self, ops: NativeOps, experts: RandomExperts, most: int, lay_out: Callable[[Matrix], None]) -> None:
        self._ops = ops
        self._matrices: list[list[Matrix]] = []  # gate, up and down of each layer
        for layer in range(experts.layers):
            self._matrices.append([])
            for stack in (experts.gate, experts.up, experts.down):
                matrix = ops.matrix(stack.kind, stack.rows, stack.cols, experts.blocks(stack, layer), experts.size.experts)
                lay_out(matrix)
                self._matrices[-1].append(matrix)
        self._x = torch.from_numpy(np.random.default_rng(1).standard_normal((most + SETS - 1, experts.size.hidden), np.float32))
        self._out = torch.zeros(most, experts.size.hidden)

    def call(self, routes: Routes, number: int) -> None:
        q = len(routes.ids)
        ids, weights = torch.from_numpy(routes.ids), torch.from_numpy(routes.weights)
        gate, up, down = self._matrices[routes.layer]
        self._ops.experts(gate, up, down, self.tokens(q, number), ids, weights, self._out[:q])

    def result(self, routes: Routes) -> NDArray[np.float32]:
        self._out.zero_()
        self.call(routes, 0)
        return self._out[: len(routes.ids)].numpy()

    def tokens(self, q: int, number: int) -> torch.Tensor:
        return self._x[number % SETS : number % SETS + q]


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


def relative_error(experts: RandomExperts, layers: Layers, routes: Routes) -> float:
    """|result - exact| / |exact| over a few of the tokens, in float64 on the dequantised weights."""
    sampled = np.unique(np.linspace(0, len(routes.ids) - 1, SAMPLED, dtype=np.int64))
    result = layers.result(routes)[sampled]
    exact = experts.exact(routes.layer, layers.tokens(len(routes.ids), 0).numpy()[sampled], routes.ids[sampled], routes.weights[sampled])
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))
