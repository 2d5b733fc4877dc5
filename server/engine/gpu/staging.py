"""Memory of the CPU's that the GPU can reach: page-locked, kept, and handed out by name. A copy through pageable memory would stop the CPU for each."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Named buffers that grow. Who asks for a name again gets the same memory: the work that read it must have been waited for."""

    def __init__(self, device: torch.device) -> None:
        self._locked = device.type == "cuda"
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, n: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, width], with whatever it held."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < n * width or buffer.dtype is not dtype:
            with torch.inference_mode(False):  # or it could be written to in that mode alone
                buffer = self._buffers[name] = torch.empty(n * width, dtype=dtype, pin_memory=self._locked)
        return buffer[: n * width].view(n, width)
