"""Which road the routed experts of a prompt's chunk take, and how a layer is divided where it takes both.

    cpu      the pool computes them where they lie
    stream   their bytes go over PCIe and the GPU computes them (gpu/stream.py)
    split    both at once: experts with many tokens are streamed, which costs the same for one token as for a thousand; the rest stays with the pool

A `Pace` holds what was measured: seconds for a byte of weights and for a multiplication, on each side. Everything here is arithmetic on such numbers; who
measures hands them in.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Road = Literal["cpu", "stream", "split"]
Mode = Literal["auto", "cpu", "stream", "split"]
Side = Literal["cpu", "stream"]
_NEW = 0.3  # share of the newest layer in a correction
_MOST = 8.0  # a correction beyond this factor is a disturbance


@dataclass(frozen=True, slots=True)
class Load:
    """What some experts with their tokens are: bytes of weights as they lie, and operations (two for each weight and token)."""

    nbytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A load, and the seconds that it took."""

    load: Load
    seconds: float


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = byte * bytes + flop * operations: weights are read and opened once, and then meet their tokens."""

    byte: float
    flop: float

    def __call__(self, load: Load) -> float:
        return self.byte * load.nbytes + self.flop * load.flops


def fit(samples: Sequence[Sample]) -> Line:
    """The line through two samples or more, by least squares of relative errors; neither cost is negative. ValueError without a sample."""
    if not samples:
        raise ValueError("no sample to fit")
    rows = np.array([[s.load.nbytes / s.seconds, s.load.flops / s.seconds] for s in samples])
    scale = np.maximum(rows.max(0), 1e-30)
    candidates: list[NDArray[np.floating]] = [np.array([*_alone(rows[:, :1] / scale[0]), 0.0]), np.array([0.0, *_alone(rows[:, 1:] / scale[1])])]
    if len(samples) > 1:
        candidates.append(np.linalg.lstsq(rows / scale, np.ones(len(rows)), rcond=None)[0])
    sound = [c for c in candidates if (c >= 0).all()]
    best: NDArray[np.floating] = min(sound, key=lambda c: float(np.square(rows / scale @ c - 1).sum()))
    return Line(float(best[0] / scale[0]), float(best[1] / scale[1]))


def _alone(column: NDArray[np.floating]) -> NDArray[np.floating]:
    solution: NDArray[np.floating] = np.linalg.lstsq(column, np.ones(len(column)), rcond=None)[0]
    return solution


@dataclass(slots=True)
class Pace:
    """How fast each side is. The lines are measured at start; `observe` corrects them layer by layer, apart for one side alone and both beside each other."""

    cpu: Line
    link: Line  # PCIe from page-locked memory: bytes only
    gpu: Line  # opening the weights, and multiplying
    unlocked_link: Line | None = None  # through buffers; None: as `link`
    _factors: dict[tuple[Side, bool], float] = field(default_factory=dict)

    def seconds(self, side: Side, load: Load, beside: bool = False, locked: bool = True) -> float:
        """What the load takes on one side; `beside`: while the other one works too. A copy runs under the computation of what came before it."""
        return self._factors.get((side, beside), 1.0) * self._plain(side, load, locked)

    def observe(self, side: Side, load: Load, seconds: float, beside: bool = False, locked: bool = True) -> None:
        """The load took so long."""
        if (expected := self._plain(side, load, locked)) <= 0 or seconds <= 0:
            return
        factor, old = min(max(seconds / expected, 1 / _MOST), _MOST), self._factors.get((side, beside))
        self._factors[side, beside] = factor if old is None else (1 - _NEW) * old + _NEW * factor

    def _plain(self, side: Side, load: Load, locked: bool) -> float:
        if side == "cpu":
            return self.cpu(load)
        link = self.link if locked or self.unlocked_link is None else self.unlocked_link
        return max(link(load), self.gpu(load))


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The routed experts of a layer."""

    experts: int
    top_k: int
    expert_bytes: float  # gate, up and down of one, as they lie
    expert_weights: int
    hidden: int

    def load(self, experts: float, rows: float) -> Load:
        """`experts` of them, with `rows` tokens all together."""
        return Load(experts * self.expert_bytes, 2 * self.expert_weights * rows)


def divide(counts: Sequence[int], shape: LayerShape, pace: Pace, locked: bool = True, there: Sequence[int] = ()) -> list[int]:
    """Which experts are streamed, ascending, so that both sides end together: those with the most tokens. counts[e] are the tokens of expert e.

    The experts `there` are on the GPU already, which computes them in any case; they are not in the answer.
    """
    tokens = np.asarray(counts)
    held = np.zeros(len(tokens), bool)
    held[list(there)] = True
    order = np.argsort(-tokens, kind="stable")
    order = order[(tokens[order] > 0) & ~held[order]]
    rows_streamed = tokens[held].sum() + np.concatenate(([0], np.cumsum(tokens[order])))
    rows_left = tokens.sum() - rows_streamed

    def stream_s(streamed: int) -> float:
        return pace.seconds("stream", shape.load(streamed, float(rows_streamed[streamed])), True, locked)

    def pool_s(streamed: int) -> float:
        return pace.seconds("cpu", shape.load(len(order) - streamed, float(rows_left[streamed])), True)

    # With more of them the stream never takes less and the pool never more: the best is where they cross.
    cross = bisect_left(range(len(order)), True, key=lambda streamed: stream_s(streamed) >= pool_s(streamed))
    best = min(range(max(0, cross - 1), cross + 1), key=lambda streamed: max(stream_s(streamed), pool_s(streamed)))
    return sorted(int(e) for e in order[:best])


@dataclass(slots=True)
class Roads:
    """Picks a chunk's road: what is asked for, or for "auto" what the pace says is the shortest."""

    mode: Mode
    shape: LayerShape
    pace: Pace
    cpu_fixed_s: float = 5e-4  # a layer's hand-over to the pool and back, besides its activations
    stream_fixed_s: float = 2e-3  # a layer's read-back, and the copy of its first group of experts, under which there is nothing to compute

    def pick(self, n: int) -> Road:
        """For a chunk of n tokens."""
        return self.mode if self.mode != "auto" else min(self.estimates(n).items(), key=lambda item: item[1])[0]

    def estimates(self, n: int) -> dict[Road, float]:
        """Seconds of a layer on each road, tokens choosing evenly."""
        chosen = self._chosen(n)
        rows = n * self.shape.top_k
        load = self.shape.load(chosen, rows)
        handed = self.cpu_fixed_s + self.pace.link(Load(8.0 * n * self.shape.hidden, 0))  # there and back, float32
        counts = _even(rows, max(1, round(chosen)))
        streamed = len(divide(counts, self.shape, self.pace))
        part = self.shape.load(streamed, sum(counts[:streamed]))
        rest = self.shape.load(len(counts) - streamed, sum(counts[streamed:]))
        both = max(self.pace.seconds("stream", part, True), handed + self.pace.seconds("cpu", rest, True))
        return {
            "cpu": handed + self.pace.seconds("cpu", load),
            "stream": self.stream_fixed_s + self.pace.seconds("stream", load),
            "split": self.stream_fixed_s + self.cpu_fixed_s + both,
        }

    def _chosen(self, n: int) -> float:
        """How many experts n tokens choose, evenly and independently."""
        share = self.shape.top_k / self.shape.experts
        return self.shape.experts * -math.expm1(n * math.log1p(-share)) if share < 1 else self.shape.experts

    def describe(self, most: int) -> str:
        """For the log: what was measured, and which chunks of up to `most` tokens take which road."""
        pace, shape = self.pace, self.shape
        layer = self._chosen(most)
        seconds = self.estimates(most)
        measured = (
            f"PCIe {1e-9 / pace.link.byte:.3g} GB/s, a layer of {most} tokens ({layer:.0f} experts, {layer * shape.expert_bytes / 1e9:.3g} GB): "
            + ", ".join(f"{road} {1e3 * s:.3g} ms" for road, s in seconds.items())
        )
        return f"Prefill, --prefill {self.mode}: {measured}; {self._ranges(most)}."

    def _ranges(self, most: int) -> str:
        sizes = sorted({1, *(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})
        starts: list[tuple[Road, int]] = []
        for n in sizes:
            if not starts or starts[-1][0] != self.pick(n):
                starts.append((self.pick(n), self._first(sizes, n)))
        return ", ".join(f"{road} from {n} token{'s' if n > 1 else ''}" for road, n in starts)

    def _first(self, sizes: Sequence[int], n: int) -> int:
        """The smallest number of tokens behind the size before n that takes n's road; the roads are taken to change once in between."""
        before = [size for size in sizes if size < n]
        low, high = (before[-1] + 1 if before else n), n
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.pick(middle) == self.pick(n) else (middle + 1, high)
        return low


def _even(rows: int, experts: int) -> list[int]:
    """rows tokens over the experts, the first ones having one more."""
    each, more = divmod(rows, experts)
    return [each + (e < more) for e in range(experts)]
