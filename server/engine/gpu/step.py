"""Decode as one CUDA graph: the model's own layers, captured once for one token, with the pool of CPU threads inside.

    CPU   embedding row, place ── launch ── experts of layer 0 ── experts of layer 1 ── ... ── block until the logits are there
    GPU                            attention, router │ shared experts │ attention, router │ ...  head

Where a layer needs its routed experts, the graph sends the hidden state to pinned memory and raises a flag, goes on with the shared experts, and waits for
the pool's answer. What changes from token to token lies in pinned memory that the graph's first nodes read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.engine.gpu.flags import STRIDE, Flags
from server.engine.gpu.place import Place
from server.engine.kernels import Kernels
from server.engine.native import Handover, NativeOps
from server.engine.ops import Span
from server.errors import EngineFailure

if TYPE_CHECKING:
    from server.engine.gpu.ops import GpuOps
    from server.engine.kv_cache import KVCache
    from server.engine.models.transformer import Transformer
    from server.engine.native import Matrix

MOST_HANDOVERS = 256  # layers of experts
TIMEOUT_MS = 2000  # for one layer's experts, and for the GPU to ask for them


class Capture:
    """What a captured step needs beside the graph: programs of the pool's, and pinned memory."""

    def __init__(self, native: NativeOps, kernels: Kernels, flags: Flags, device: torch.device, max_pages: int, capacity: int) -> None:
        self._native, self._kernels, self._flags = native, kernels, flags
        self.before = native.program()  # of the step: what the CPU looks up
        self.served = native.program()  # one operation for each hand-over
        self.inputs = torch.zeros(1 + max_pages, dtype=torch.int32, pin_memory=True)  # start, pages
        self._inputs_there = torch.zeros(1 + max_pages, dtype=torch.int32, device=device)
        self.place = Place(self._inputs_there[:1], self._inputs_there[1:], 1, capacity)
        self.asked, self.answered = (torch.zeros(MOST_HANDOVERS * STRIDE, dtype=torch.int32, pin_memory=True) for _ in range(2))
        self.handovers = 0
        self._kept: list[Tensor] = []

    def fetch_inputs(self) -> None:
        """The graph's first node."""
        self._kernels.fetch(self._inputs_there, self.inputs)

    def dequantize_rows(self, table: Matrix, row_ids: Tensor, out: Tensor) -> None:
        """Rows that the CPU looks up before the graph is launched."""
        rows = self._pinned(out)
        with self._native.record(self.before):
            self._native.dequantize_rows(table, row_ids, rows)
        self._kernels.fetch(out, rows)

    def experts(self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
        """Hand over to the pool; what is returned waits for its answer and adds it to `out`."""
        host_x, host_ids, host_weights, host_out = (self._pinned(t) for t in (x, ids, weights, out))
        with self._native.record(self.served):
            self._native.experts(gate, up, down, host_x, host_ids, host_weights, host_out, accumulate=False)
        flag = slice(self.handovers * STRIDE, self.handovers * STRIDE + 1)
        self.handovers += 1
        self._kernels.send(x, ids, weights, host_x, host_ids, host_weights)
        self._flags.raise_flag(self.asked[flag])

        def finish() -> None:
            self._flags.await_flag(self.answered[flag])
            self._kernels.receive(out, host_out)

        return finish

    def _pinned(self, like: Tensor) -> Tensor:
        self._kept.append(torch.empty(like.shape, dtype=like.dtype, pin_memory=True))
        return self._kept[-1]


class GraphStep:
    """A model over a cache on a GPU, one token at a time. Everything is laid out, and a step of one token has been run before, so that kernels are compiled."""

    def __init__(self, model: Transformer, cache: KVCache, ops: GpuOps, flags: Flags, capacity: int) -> None:
        native = ops.native
        self._capture = Capture(native, ops.kernels, flags, ops.device, cache.num_pages, capacity)
        self._token = torch.zeros(1, dtype=torch.int64)
        self._capture.fetch_inputs()  # its kernel is compiled at its first launch, for which a capture is no place
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), ops.capturing(self._capture), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._capture.fetch_inputs()
            self._logits = model.logits(model.forward(self._token, cache.layers, Span(0, 1, ())))[0]
        self._model = model  # the programs read its matrices
        self._handover: Handover | None = None
        if self._capture.handovers:
            self._handover = Handover(native, self._capture.served, self._capture.asked, self._capture.answered, TIMEOUT_MS)
        self._inputs = self._capture.inputs.numpy()
        self._token_id = self._token.numpy()
        self._pages: tuple[int, ...] | None = None

    def launch(self, token_id: int, start: int, pages: tuple[int, ...]) -> Tensor:
        """Logits [vocab] on the GPU, in stream order: the same memory each time. `finish` must follow. Raises ValueError for a token that there is not."""
        self._token_id[0] = token_id
        self._inputs[0] = start
        if pages is not self._pages:
            self._inputs[1 : 1 + len(pages)] = pages
            self._pages = pages
        self._capture.before.run(0, ())
        if self._handover is not None:
            self._handover.reset()
        self._graph.replay()
        return self._logits

    def finish(self) -> None:
        """The pool's part of the step. Raises EngineFailure when an operation fails or takes too long; the graph then ends by itself."""
        if self._handover is None:
            return
        try:
            self._handover.serve()
        except (RuntimeError, ValueError) as error:
            torch.cuda.current_stream().synchronize()
            raise EngineFailure(f"A step of the model failed: {error}.") from error

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Of the last step: when each layer's experts were asked for and answered, in nanoseconds from its launch."""
        return self._handover.turns if self._handover is not None else []
