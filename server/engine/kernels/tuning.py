"""How attention is cut for a GPU: what fits into its shared memory, and enough programs to fill it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

_RESERVED = 4096  # bytes of shared memory that the compiler's own exchanges of layouts take besides tiles
_MOST_STAGES = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one device."""

    sms: int
    shared_bytes: int  # that one program may have

    def stages(self, tile_bytes: int, fixed_bytes: int) -> int:
        """How many tiles of keys and values may be on their way at once, besides what is held throughout; at least 1."""
        return max(1, min(_MOST_STAGES, (self.shared_bytes - _RESERVED - fixed_bytes) // tile_bytes))

    def splits(self, programs: int, tiles: int) -> int:
        """Into how many parts the context is cut where `programs` would run without, so that all multiprocessors have work."""
        return max(1, min(self.sms // programs, tiles))


@lru_cache
def limits(device: torch.device) -> Limits:
    """The device's; on the CPU, where kernels are only interpreted, those of a small GPU."""
    if device.type != "cuda":
        return Limits(sms=4, shared_bytes=99 * 1024)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return Limits(properties["multiprocessor_count"], properties["max_shared_mem"])
