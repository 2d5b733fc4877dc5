"""Which form latent attention takes, and what attention allocates: arithmetic alone, so that a loader can plan without Triton."""

from __future__ import annotations

from dataclasses import dataclass

MATVEC_TOKENS = 8  # more tokens go through opened weights
OPENED_BYTES = 32 << 20  # of the weights opened for them at a time
MOST_ABSORBED = 64  # tokens: memory grows with them
CONTEXT_BLOCK = 4096  # tokens of the context whose keys and values are expanded at a time; whole pages
EXPANDED_BYTES = 64 << 20  # of those keys and values

_SPLIT_ROWS = 64  # of the programs that leave parts to be combined, at most, 2 programs a multiprocessor
_PAGE = 64


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Sizes of one layer of latent attention."""

    heads: int
    kv_lora: int
    rope: int
    nope: int
    v_dim: int


def absorbs(shape: LatentShape, n: int, context: int) -> bool:
    """Whether n tokens over a context (that includes them) go absorbed: always as matrix-vector products do, else by the multiplications a head.

    Expanding costs (nope + v_dim) * kv_lora for each token of the context, absorbing as much for each new one; a score and its value then cost
    2 * kv_lora + rope absorbed and nope + rope + v_dim expanded.
    """
    if n <= MATVEC_TOKENS:
        return True
    way = (shape.nope + shape.v_dim) * shape.kv_lora
    absorbed = n * way + n * context * (2 * shape.kv_lora + shape.rope)
    expanded = context * way + n * context * (shape.nope + shape.rope + shape.v_dim)
    return n <= MOST_ABSORBED and absorbed < expanded


def heads_at_once(shape: LatentShape, context: int, itemsize: int) -> int:
    """For how many heads a block's keys and values are expanded at a time."""
    return max(1, min(shape.heads, EXPANDED_BYTES // (min(context, CONTEXT_BLOCK) * (shape.nope + shape.v_dim) * itemsize)))


def latent_scratch_bytes(shape: LatentShape, n: int, context: int, itemsize: int, sms: int = 132) -> int:
    """The most that latent attention allocates besides its arguments, for up to n tokens at a time over a context up to this long and a cache of such items.

    Beyond CONTEXT_BLOCK tokens it grows with the context no more.
    """
    few = _absorbed_bytes(shape, min(n, MOST_ABSORBED), itemsize, sms)
    return max(few, _expanded_bytes(shape, n, context, itemsize)) if n > MATVEC_TOKENS else few


def scratch_bytes(heads: int, head_dim: int, n: int, itemsize: int, sms: int = 132) -> int:
    """The same of grouped-query attention: the queries that are multiplied, and the parts of splits."""
    return n * heads * head_dim * itemsize + 2 * sms * 2 * _SPLIT_ROWS * (head_dim + 1) * 4


def _absorbed_bytes(shape: LatentShape, n: int, itemsize: int, sms: int) -> int:
    """Queries and what they found; the parts of splits; opened weights with the operands of their products."""
    rows = n * shape.heads
    found = rows * (shape.kv_lora * 4 + (shape.kv_lora + shape.rope) * itemsize)
    parts = 2 * sms * _SPLIT_ROWS * (shape.kv_lora + 1) * 4
    products = 2 * OPENED_BYTES + 2 * rows * (shape.kv_lora + max(shape.nope, shape.v_dim)) * itemsize if n > MATVEC_TOKENS else 0
    return found + parts + products


def _expanded_bytes(shape: LatentShape, n: int, context: int, itemsize: int) -> int:
    """A block's latents, in whole pages, and still those of the one before; keys and values for some heads; those heads' weights, opened by way of
    another type; queries and sums."""
    block = -(-min(context, CONTEXT_BLOCK) // _PAGE) * _PAGE
    values, heads = shape.nope + shape.v_dim, heads_at_once(shape, context, itemsize)
    expanded = 2 * block * (shape.kv_lora + shape.rope) + heads * block * values
    return (expanded + heads * (2 * values * shape.kv_lora + n * (shape.nope + shape.rope))) * itemsize + heads * n * 4
