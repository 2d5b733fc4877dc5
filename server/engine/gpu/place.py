"""Where a step's tokens stand in their sequence, as kernels read it: in device memory, so that a captured step serves every position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Positions start .. start + n - 1, in these pages of the KV cache."""

    start: Tensor  # int32 [1] on the device: tokens of the sequence that are in the cache already
    pages: Tensor  # int32 [max_pages] on the device: the sequence's pages, in order
    n: int  # new tokens
    end: int  # at least start + n, known on the host: exact in prefill, the cache's capacity in a captured step
