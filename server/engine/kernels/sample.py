"""Drawing a token on the GPU, by the definition in server/engine/sampler.py, without sorting and without asking the host.

One program looks at BLOCK logits; what programs must know of each other goes from one kernel to the next through small arrays. Greedy: the best of each
block, then the best of all. Otherwise every token is weighed, a cutoff is searched for top_k and one for top_p, what stays is summed for each block, and
the number drawn finds first its block and then its token.

A search finds the largest cutoff at or above which there are enough tokens (top_k), or enough weight (top_p). As integers, float32 values
are a range of 2^32, and each pass tries WAYS cutoffs of what is left of it: every block tallies what it has at or above each, and the next pass begins
by adding up the blocks' tallies. Tallies are integers, so no order of adding can change a token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from server.engine.gpu import drawing
from server.engine.gpu.drawing import DrawBuffers, Way
from server.engine.kernels.keys import GONE, index_of, is_finite, key, ordered, value_of

_UNIFORM = tl.constexpr(drawing.UNIFORM)
_TEMPERATURE = tl.constexpr(drawing.TEMPERATURE)
_REPETITION = tl.constexpr(drawing.REPETITION)
_PRESENCE = tl.constexpr(drawing.PRESENCE)
_FREQUENCY = tl.constexpr(drawing.FREQUENCY)
_TOP_K = tl.constexpr(drawing.TOP_K)
_TOP_P = tl.constexpr(drawing.TOP_P)
_LEAST_WEIGHT = tl.constexpr(drawing.LEAST_WEIGHT)
_LEADERS = tl.constexpr(drawing.LEADERS)
_SCALARS = tl.constexpr(drawing.SCALARS)
_LEADER_SLOTS = tl.constexpr(drawing.LEADER_SLOTS)
_NOT_FINITE = tl.constexpr(drawing.NOT_FINITE)
_WORD = tl.constexpr(drawing.WORD)
_IN_PROMPT = tl.constexpr(drawing.IN_PROMPT)
_WEIGHT_OF_BEST = tl.constexpr(2.0**44)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_BOTTOM = tl.constexpr(-(2**31))  # a cutoff below every logit
_NOTHING, _COUNT, _WEIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a pass of a search adds up
_WARPS = 4
_PASS_WARPS = 8  # every logit meets every cutoff there


def draw(logits: Tensor, b: DrawBuffers, way: Way) -> None:
    """From logits [vocab] float32 and b.scalars to b.token, and to b.logprobs and b.leader_ids where asked for; kernels only, nothing waits."""
    vocab, blocks = logits.numel(), b.peaks.numel()
    sizes = {"BLOCK": drawing.BLOCK, "num_warps": _WARPS}
    padded = triton.next_power_of_2(blocks)
    if way != Way(greedy=True):
        _fetch[(1,)](b.scalars, b.settings, num_warps=1)
    _peaks[(blocks,)](logits, b.settings, b.history, b.bias, b.allowed, b.values, b.peaks, vocab, ADJUST=way.adjust, **sizes)
    values = b.values if way.adjust else logits
    if way.greedy:
        _take_best[(1,)](b.peaks, b.history, b.token, b.drawn, blocks, ADJUST=way.adjust, BLOCKS=padded, num_warps=1)
    else:
        _weigh[(blocks,)](values, b.peaks, b.settings, b.weights, b.sums, vocab, blocks, BLOCKS=padded, **sizes)
        cut = _search(values, b, way) if way.top_k or way.top_p else 0
        known = (b.weights, b.sums, b.peaks, b.settings, b.floors, b.history)
        _find[(1,)](values, *known, b.token, b.drawn, vocab, blocks, cut, ADJUST=way.adjust, CUT=cut > 0, BLOCKS=padded, **sizes)
    if way.leaders:
        _leaders[(blocks,)](logits, b.settings, b.leaders, b.block_max, b.block_sum, vocab, **sizes)
        _logprobs[(1,)](logits, b.settings, b.leaders, b.block_max, b.block_sum, b.drawn, b.leader_ids, b.logprobs, blocks, BLOCKS=padded, num_warps=_WARPS)


def _search(values: Tensor, b: DrawBuffers, way: Way) -> int:
    """Leave the cutoff in b.floors, at the place that this returns, and in b.sums what stays."""
    kinds = [_COUNT.value] * (drawing.PASSES * way.top_k) + [_WEIGHT.value] * (drawing.PASSES * way.top_p)
    shifts = [max(32 - drawing.WAY_BITS * (i % drawing.PASSES + 1), 0) for i in range(len(kinds))]
    vocab, blocks = values.numel(), b.peaks.numel()
    floor_at = drawing.PASSES if way.top_k and way.top_p else -1  # where the cutoff of top_k stands when top_p is searched for
    for i, (before, kind) in enumerate(zip([_NOTHING.value, *kinds], [*kinds, _NOTHING.value], strict=True)):
        _pass[(blocks,)](
            values,
            b.weights,
            b.settings,
            b.tallies[(i + 1) % 2],
            b.tallies[i % 2],
            b.floors,
            b.sums,
            vocab,
            blocks,
            i,
            shifts[i - 1],
            shifts[i] if i < len(shifts) else 0,
            BEFORE=before,
            BEFORE_BEGAN=i % drawing.PASSES == 1,
            KIND=kind,
            BEGINS=i % drawing.PASSES == 0,
            FLOOR_AT=floor_at,
            WAYS=drawing.WAYS,
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK=drawing.BLOCK,
            num_warps=_PASS_WARPS,
        )
    return len(kinds)


@triton.jit
def _fetch(scalars, settings):
    """Bring the step's scalars over, by one warp: were every program to read them from the host's memory, that would take a millisecond."""
    slot = tl.arange(0, _SCALARS)
    tl.store(settings + slot, tl.load(scalars + slot, volatile=True))


@triton.jit
def _peaks(logits, settings, history, bias, allowed, values, peaks, vocab, ADJUST: tl.constexpr, BLOCK: tl.constexpr):
    """Adjust the logits where asked for, and find each block's best. Above all stands what is not finite."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    value = tl.load(logits + at, mask=inside, other=float("-inf"))
    if ADJUST:
        may = (tl.load(allowed + at // _WORD, mask=inside, other=0) >> at % _WORD) & 1
        value = _adjusted(value, may != 0, tl.load(bias + at, mask=inside, other=0.0), tl.load(history + at, mask=inside, other=0), settings)
        tl.store(values + at, value, mask=inside)
    tl.store(peaks + tl.program_id(0), tl.max(tl.where(inside, key(value, at), GONE), axis=0))


@triton.jit
def _adjusted(value, may, bias, past, settings):
    """Logits after constraint, bias and penalties."""
    damaged = (value != value) | (value == float("inf"))
    repetition = tl.load(settings + _REPETITION).to(tl.float32)
    presence = tl.load(settings + _PRESENCE).to(tl.float32)
    frequency = tl.load(settings + _FREQUENCY).to(tl.float32)
    biased = value + bias
    penalised = tl.where(biased > 0, tl.div_rn(biased, repetition), biased * repetition)
    penalised = tl.where(past != 0, tl.minimum(penalised, _LARGEST), biased)
    count = past & (_IN_PROMPT - 1)
    penalised -= tl.where(count > 0, presence + frequency * count.to(tl.float32), 0.0)
    return tl.where(damaged, value, tl.where(may, penalised, float("-inf")))


@triton.jit
def _take_best(peaks, history, token, drawn, blocks, ADJUST: tl.constexpr, BLOCKS: tl.constexpr):
    best = _best(peaks, blocks, BLOCKS)
    _answer(tl.where(is_finite(best), index_of(best), _NOT_FINITE), history, token, drawn, ADJUST)


@triton.jit
def _best(peaks, blocks, BLOCKS: tl.constexpr):
    """The best of all."""
    block = tl.arange(0, BLOCKS)
    return tl.max(tl.load(peaks + block, mask=block < blocks, other=GONE), axis=0)


@triton.jit
def _answer(chosen, history, token, drawn, ADJUST: tl.constexpr):
    """Tell the host and the later kernels, and count what was drawn."""
    tl.store(token, chosen)
    tl.store(drawn, chosen)
    if ADJUST:
        counted = history + tl.maximum(chosen, 0)
        tl.store(counted, tl.load(counted) + 1)


@triton.jit
def _weigh(values, peaks, settings, weights, sums, vocab, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Weigh each token against the best one; the block's sum is of those that min_p leaves."""
    best = _best(peaks, blocks, BLOCKS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    value = tl.load(values + at, mask=inside, other=float("-inf"))
    temperature = tl.load(settings + _TEMPERATURE).to(tl.float32)
    power = tl.exp(tl.div_rn(value - value_of(best), temperature))
    weight = (tl.where(inside & is_finite(best), power, 0.0) * _WEIGHT_OF_BEST).to(tl.int64)
    tl.store(weights + at, weight, mask=inside)
    least = tl.load(settings + _LEAST_WEIGHT).to(tl.int64)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(weight >= least, weight, 0), axis=0))


@triton.jit(do_not_specialize=["step", "shift_before", "shift"])
def _pass(
    values,
    weights,
    settings,
    tallies_before,
    tallies,
    floors,
    sums,
    vocab,
    blocks,
    step,
    shift_before,
    shift,
    BEFORE: tl.constexpr,
    BEFORE_BEGAN: tl.constexpr,
    KIND: tl.constexpr,
    BEGINS: tl.constexpr,
    FLOOR_AT: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Settle the pass before this one; then try the cutoffs of this one, or after the last pass sum up what stays."""
    block = tl.program_id(0)
    order, amount = _block(values, weights, block, vocab, KIND == _COUNT, BLOCK)  # on their way while the pass before is settled
    low = tl.full([], _BOTTOM, tl.int64)
    if BEFORE != _NOTHING:
        if not BEFORE_BEGAN:
            low = tl.load(floors + step - 1)
        low = _settled(low, tallies_before, settings, blocks, shift_before, BEFORE, WAYS, BLOCKS)
    if block == 0:
        tl.store(floors + step, low)
    if KIND == _NOTHING:
        tl.store(sums + block, tl.sum(_kept(order, amount, low.to(tl.int32), settings), axis=0))
    else:
        floor = tl.full([], _BOTTOM, tl.int64)  # top_p is of what lies above this
        if BEGINS:
            floor, low = low, floor
        elif FLOOR_AT >= 0:
            floor = tl.load(floors + FLOOR_AT)
        way = tl.arange(0, WAYS).to(tl.int64)
        cutoffs = tl.where(way == 0, floor, low + (way << shift)).to(tl.int32)
        held = tl.where(order[:, None] >= cutoffs[None, :], amount[:, None], 0)
        tl.store(tallies + block * WAYS + tl.arange(0, WAYS), tl.sum(held, axis=0))


@triton.jit
def _settled(low, tallies, settings, blocks, shift, KIND: tl.constexpr, WAYS: tl.constexpr, BLOCKS: tl.constexpr):
    """The highest cutoff tried that still has enough at or above it; the lowest, way 0, has by what was found before."""
    block, way = tl.arange(0, BLOCKS)[:, None], tl.arange(0, WAYS)
    held = tl.sum(tl.load(tallies + block * WAYS + way[None, :], mask=block < blocks, other=0), axis=0)
    if KIND == _COUNT:
        needed = tl.load(settings + _TOP_K).to(tl.int64)
    else:  # way 0 has all that top_k left
        whole = tl.sum(tl.where(way == 0, held, 0), axis=0)
        needed = tl.maximum((tl.load(settings + _TOP_P) * whole.to(tl.float64)).to(tl.int64), 1)
    enough = tl.sum(((held >= needed) & (way > 0)).to(tl.int64), axis=0)
    return low + (enough << shift)


@triton.jit
def _block(values, weights, block, vocab, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """A block's logits, as integers that order as they do, and the weights, or 1 for each."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    order = ordered(tl.load(values + at, mask=at < vocab, other=float("-inf")))
    amount = (at < vocab).to(tl.int64)
    if not COUNT:
        amount = tl.load(weights + at, mask=at < vocab, other=0)
    return order, amount


@triton.jit
def _kept(order, weight, cutoff, settings):
    """Weights, with 0 for what does not stay."""
    least = tl.load(settings + _LEAST_WEIGHT).to(tl.int64)
    return tl.where((order >= cutoff) & (weight >= least), weight, 0)


@triton.jit(do_not_specialize=["cut"])
def _find(
    values,
    weights,
    sums,
    peaks,
    settings,
    floors,
    history,
    token,
    drawn,
    vocab,
    blocks,
    cut,
    ADJUST: tl.constexpr,
    CUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first token whose cumulative weight is above uniform * total: first its block, then its place there."""
    slot = tl.arange(0, BLOCKS)
    share = tl.load(sums + slot, mask=slot < blocks, other=0)
    total = tl.sum(share, axis=0)
    target = tl.minimum((tl.load(settings + _UNIFORM) * total.to(tl.float64)).to(tl.int64), total - 1)
    block = tl.minimum(tl.sum((tl.cumsum(share, axis=0) <= target).to(tl.int32), axis=0), blocks - 1)
    target -= tl.sum(tl.where(slot < block, share, 0), axis=0)
    cutoff = tl.full([], _BOTTOM, tl.int32)
    if CUT:
        cutoff = tl.load(floors + cut).to(tl.int32)
    order, weight = _block(values, weights, block, vocab, False, BLOCK)
    kept = _kept(order, weight, cutoff, settings)
    place = tl.sum((tl.cumsum(kept, axis=0) <= target).to(tl.int32), axis=0)
    finite = is_finite(_best(peaks, blocks, BLOCKS))
    _answer(tl.where(finite, tl.minimum(block * BLOCK + place, vocab - 1), _NOT_FINITE), history, token, drawn, ADJUST)


@triton.jit
def _leaders(logits, settings, leaders, block_max, block_sum, vocab, BLOCK: tl.constexpr):
    """Each block's likeliest tokens, as keys, and its part of the sum of exp(logit)."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + at, mask=at < vocab, other=float("-inf"))
    top = tl.max(value, axis=0)
    tl.store(block_max + block, top)
    tl.store(block_sum + block, tl.sum(tl.exp(value - top), axis=0))
    keys = tl.where(at < vocab, key(value, at), GONE)
    for j in range(tl.load(settings + _LEADERS).to(tl.int32)):
        best = tl.max(keys, axis=0)
        tl.store(leaders + block * _LEADER_SLOTS + j, best)
        keys = tl.where(keys == best, GONE, keys)


@triton.jit
def _logprobs(logits, settings, leaders, block_max, block_sum, drawn, leader_ids, logprobs, blocks, BLOCKS: tl.constexpr):
    """The log probability of the drawn token, then the likeliest tokens and theirs."""
    slot = tl.arange(0, BLOCKS)
    tops = tl.load(block_max + slot, mask=slot < blocks, other=float("-inf"))
    top = tl.max(tops, axis=0)
    whole = top + tl.log(tl.sum(tl.load(block_sum + slot, mask=slot < blocks, other=0.0) * tl.exp(tops - top), axis=0))
    tl.store(logprobs, tl.load(logits + tl.maximum(tl.load(drawn), 0)) - whole)
    count = tl.load(settings + _LEADERS).to(tl.int32)
    rank = tl.arange(0, _LEADER_SLOTS)[None, :]
    keys = tl.load(leaders + slot[:, None] * _LEADER_SLOTS + rank, mask=(slot[:, None] < blocks) & (rank < count), other=GONE)
    for j in range(count):
        best = tl.max(tl.max(keys, axis=1), axis=0)
        tl.store(leader_ids + j, index_of(best))
        tl.store(logprobs + 1 + j, value_of(best) - whole)
        keys = tl.where(keys == best, GONE, keys)
