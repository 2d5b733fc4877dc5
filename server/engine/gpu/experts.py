"""The routed experts of a prompt's chunk: on the pool of CPU threads, while the GPU goes on with what does not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.engine.gpu.staging import Staging
from server.engine.kernels import Kernels
from server.engine.native import NativeOps

if TYPE_CHECKING:
    from server.engine.native import Matrix


class PoolExperts:
    """A chunk's hidden states go to pinned memory, the pool adds up its experts there, and the sum comes back."""

    def __init__(self, native: NativeOps, kernels: Kernels, device: torch.device, staging: Staging) -> None:
        self._native, self._kernels, self._staging = native, kernels, staging
        self._sent = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def begin(self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
        """As Ops.experts. The copies are under way; the pool works within what is returned."""
        n, hidden = x.shape
        top_k = ids.shape[1]
        host_x, host_out = (self._staging.rows(name, n, hidden) for name in ("hidden", "sums"))
        host_ids = self._staging.rows("ids", n, top_k, torch.int32)
        host_weights = self._staging.rows("weights", n, top_k)
        for to, source in ((host_x, x), (host_ids, ids), (host_weights, weights)):
            to.copy_(source, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

        def finish() -> None:
            if self._sent is not None:
                self._sent.synchronize()
            self._native.experts(gate, up, down, host_x, host_ids, host_weights, host_out, accumulate=False)
            self._kernels.receive(out, host_out)

        return finish
