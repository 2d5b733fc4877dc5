"""Matrix products of a group of experts, each with the tokens that chose it, on tensor cores (Triton). plain_grouped.py says what each computes.

One launch serves the whole group: the first axis of the grid are tiles of tokens, expert after expert, and each program finds its expert among the runs.
Neighbours on that axis share the rows of the weights that they read, so that weights come from memory once, however many tiles of tokens an expert has.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from server.engine.kernels.plain_grouped import TILE_MEANS, Runs
from server.engine.kernels.tuning import limits


@dataclass(frozen=True, slots=True)
class Tile:
    """Block sizes of a product: tokens, rows of the weights, columns; and how it is run."""

    tokens: int
    rows: int
    cols: int
    warps: int
    stages: int

    def fitted(self, matrices: int, shared: int) -> Tile:
        """With as many stages as fit into `shared` bytes of a multiprocessor, for a kernel that reads that many weight matrices at a time."""
        stage = 2 * self.cols * (self.tokens + matrices * self.rows)
        return Tile(self.tokens, self.rows, self.cols, self.warps, max(1, min(self.stages, shared // stage)))


# For each of TILE_MEANS, and beyond. Few tokens: what counts is that many bytes of weights are on their way at once.
_GATED = (Tile(16, 32, 128, 4, 5), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 128, 64, 8, 3))
_GROUPED = (Tile(16, 64, 128, 4, 5), Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 256, 64, 8, 4))


def gated(x: Tensor, tokens: Tensor, gate: Tensor, up: Tensor, runs: Runs, out: Tensor, tile: Tile | None = None) -> None:
    """out[i] = silu(gate[e] y) * (up[e] y) with y = x[tokens[runs.first + i]]; see the twin for shapes. `tile` is for timing."""
    _, ffn, cols = gate.shape
    tile = tile or _choose(_GATED, runs).fitted(2, limits(x.device).shared_bytes)
    if grid := _grid(runs, tile, ffn):
        _gated_kernel[grid](
            x, tokens, gate, up, runs.offsets, out, ffn, runs.first, runs.experts, _padded(runs), cols,
            tile.tokens, tile.rows, tile.cols, x.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def grouped(x: Tensor, weights: Tensor, runs: Runs, out: Tensor, tile: Tile | None = None) -> None:
    """out[i] = weights[e] x[i]; see the twin for shapes. `tile` is for timing."""
    _, rows, cols = weights.shape
    tile = tile or _choose(_GROUPED, runs).fitted(1, limits(x.device).shared_bytes)
    if grid := _grid(runs, tile, rows):
        _grouped_kernel[grid](
            x, weights, runs.offsets, out, rows, runs.first, runs.experts, _padded(runs), cols,
            tile.tokens, tile.rows, tile.cols, x.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def combine(h: Tensor, slots: Tensor, weights: Tensor, runs: Runs, out: Tensor) -> None:
    """out[t] += sum over j, in order, of weights[t, j] * h[slots[t, j] - runs.first], for those slots that are rows of the group."""
    (n, top_k), hidden = slots.shape, h.shape[1]
    block = min(1024, _power_of_2(hidden))
    if runs.rows:
        _combine_kernel[n, -(-hidden // block)](h, slots, weights, out, hidden, runs.first, runs.starts[-1], top_k, _power_of_2(top_k), block)


def _choose(tiles: Sequence[Tile], runs: Runs) -> Tile:
    mean = runs.rows / max(1, sum(count > 0 for count in runs.counts()))
    return tiles[bisect_left(TILE_MEANS, mean)]


def _padded(runs: Runs) -> int:
    """Room for the group's experts in a vector: one size for most groups, as each is compiled."""
    return max(16, _power_of_2(runs.experts))


def _power_of_2(n: int) -> int:
    """That is n or the next above it."""
    return 1 << (n - 1).bit_length()


def _grid(runs: Runs, tile: Tile, rows: int) -> tuple[int, int] | None:
    """None where no expert has tokens."""
    tiles = sum(-(-count // tile.tokens) for count in runs.counts())  # triton.cdiv takes microseconds
    return (tiles, -(-rows // tile.rows)) if tiles else None


@triton.jit
def _find_run(offsets, tile, experts, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """The expert of this tile of tokens, its first sorted row, and where the expert's run ends."""
    expert = tl.arange(0, EXPERTS)
    start = tl.load(offsets + expert, mask=expert < experts, other=0)
    end = tl.load(offsets + 1 + expert, mask=expert < experts, other=0)
    tiles = (end - start + TOKENS - 1) // TOKENS
    through = tl.cumsum(tiles, 0)  # tiles of the experts up to and with this one
    found = tl.sum((through <= tile).to(tl.int32), 0)
    own = expert == found
    row = tl.sum(tl.where(own, start + (tile - (through - tiles)) * TOKENS, 0), 0)
    return found, row, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def _dot(a, b, sums, WIDE: tl.constexpr):
    """sums + a b. WIDE: as float32, for the interpreter, which takes bf16 for integers here."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit(do_not_specialize=["first", "experts"], do_not_specialize_on_alignment=["offsets"])
def _gated_kernel(
    x, tokens, gate, up, offsets, out, ffn, first, experts,
    EXPERTS: tl.constexpr, cols: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    expert, row, end = _find_run(offsets, tl.program_id(0), experts, EXPERTS, TOKENS)
    i = row + tl.arange(0, TOKENS)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    token = tl.load(tokens + i, mask=i < end, other=0)
    xs = x + token.to(tl.int64)[:, None] * cols + c[None, :]
    at = expert.to(tl.int64) * ffn * cols + tl.minimum(r, ffn - 1)[None, :] * cols + c[:, None]
    gates, ups = gate + at, up + at
    gate_sum = tl.zeros((TOKENS, ROWS), tl.float32)
    up_sum = tl.zeros((TOKENS, ROWS), tl.float32)
    for col in range(0, cols, COLS):
        if cols % COLS == 0:
            y = tl.load(xs)
            gate_sum = _dot(y, tl.load(gates), gate_sum, WIDE)
            up_sum = _dot(y, tl.load(ups), up_sum, WIDE)
        else:
            y = tl.load(xs, mask=c[None, :] < cols - col, other=0.0)
            gate_sum = _dot(y, tl.load(gates, mask=c[:, None] < cols - col, other=0.0), gate_sum, WIDE)
            up_sum = _dot(y, tl.load(ups, mask=c[:, None] < cols - col, other=0.0), up_sum, WIDE)
        xs += COLS
        gates += COLS
        ups += COLS
    product = gate_sum / (1 + tl.exp(-gate_sum)) * up_sum
    to = out + (i - first).to(tl.int64)[:, None] * ffn + r[None, :]
    tl.store(to, product.to(out.dtype.element_ty), mask=(i < end)[:, None] & (r < ffn)[None, :])


@triton.jit(do_not_specialize=["first", "experts"], do_not_specialize_on_alignment=["offsets"])
def _grouped_kernel(
    x, weights, offsets, out, rows, first, experts,
    EXPERTS: tl.constexpr, cols: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    expert, row, end = _find_run(offsets, tl.program_id(0), experts, EXPERTS, TOKENS)
    i = row + tl.arange(0, TOKENS)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    # A tile's rows beyond the run read its last one: their sums are not stored.
    xs = x + (tl.minimum(i, end - 1) - first).to(tl.int64)[:, None] * cols + c[None, :]
    ws = weights + expert.to(tl.int64) * rows * cols + tl.minimum(r, rows - 1)[None, :] * cols + c[:, None]
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    for col in range(0, cols, COLS):
        if cols % COLS == 0:
            sums = _dot(tl.load(xs), tl.load(ws), sums, WIDE)
        else:
            y = tl.load(xs, mask=c[None, :] < cols - col, other=0.0)
            sums = _dot(y, tl.load(ws, mask=c[:, None] < cols - col, other=0.0), sums, WIDE)
        xs += COLS
        ws += COLS
    to = out + (i - first).to(tl.int64)[:, None] * rows + r[None, :]
    tl.store(to, sums, mask=(i < end)[:, None] & (r < rows)[None, :])


@triton.jit(do_not_specialize=["first", "end"])
def _combine_kernel(h, slots, weights, out, hidden, first, end, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, SLOTS)
    slot = tl.load(slots + token * TOP_K + j, mask=j < TOP_K, other=-1)
    # Most tokens have no expert in a group.
    if tl.sum(((slot >= first) & (slot < end)).to(tl.int32), 0) > 0:
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(out + token * hidden + c, mask=c < hidden, other=0.0)
        for k in tl.static_range(TOP_K):
            row = tl.load(slots + token * TOP_K + k)
            inside = (row >= first) & (row < end)
            values = tl.load(h + (row - first).to(tl.int64) * hidden + c, mask=(c < hidden) & inside, other=0.0)
            total += tl.load(weights + token * TOP_K + k) * values
        tl.store(out + token * hidden + c, total, mask=c < hidden)
