"""The GPU stage: everything but the routed experts runs on the GPU, and these on the pool of CPU threads, or streamed to the GPU.

    dense matrices   packed by the pool into tile order, copied to the GPU as they are, and freed in RAM
    experts          stay in RAM, in the same order (NativeOps)
    embedding        stays in the file; its rows are looked up on the CPU

Activations are float32 on the GPU. Few tokens meet the quantised weights as they lie (kernels.matvec); for many, a run of rows at a time is opened to
bfloat16 and multiplied by the GPU's tensor cores (cuBLAS, through torch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.memory import OPENED_BYTES, RING_BYTES, no_memory_left
from server.engine.gpu.place import Place
from server.engine.gpu.prefill import PrefillExperts
from server.engine.gpu.sections import ExpertWeights
from server.engine.gpu.staging import Staging
from server.engine.gpu.threads import CPUS, executor
from server.engine.kernels import Kernels
from server.engine.native import NativeOps, packed_bytes
from server.engine.ops import KVPages, LatentPages, Norm, Rotation, Routing, Span

if TYPE_CHECKING:
    from server.config import Prefill
    from server.engine.gpu.step import Capture
    from server.engine.native import Matrix

FEW = 1  # tokens that meet quantised weights as they lie: the kernels could take 8, each number compiled for itself

_FLOATS = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}


@dataclass(slots=True)
class HybridMatrix:
    """A matrix's place: `native` in RAM until a dense one is laid out, `device` from then on. Experts and tables stay where they are."""

    data: memoryview | None
    native: Matrix | None
    device: DeviceMatrix | None = None
    experts: bool = False

    @property
    def host(self) -> Matrix:
        """Of what is in RAM."""
        assert self.native is not None, "a dense matrix that was laid out"
        return self.native


class GpuOps:
    """server.engine.ops.Ops on one GPU and a pool of CPU threads. One thread at a time may call it: it is one of the pool's."""

    def __init__(self, native: NativeOps, device: torch.device, kernels: Kernels, max_pages: int, prefill: Prefill = "cpu") -> None:
        self.native, self.kernels = native, kernels
        self._device = device
        self._staging = Staging(device)
        self._experts = PrefillExperts(native, kernels, device, self._staging, prefill, RING_BYTES)
        self._layers: list[tuple[HybridMatrix, HybridMatrix, HybridMatrix]] = []  # of routed experts
        self._place = Place(torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(max_pages, dtype=torch.int32, device=device), 0, 0)
        self._span: Span | None = None  # that `_place` was written for
        self._capture: Capture | None = None
        self._opened: Tensor | None = None
        self._compiling = False  # kernels only

    @property
    def device(self) -> torch.device:
        return self._device

    # --- Weights -----------------------------------------------------------------

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview, count: int = 1) -> HybridMatrix:
        """Borrow `count` weight matrices [rows, cols] in GGUF blocks. ValueError as NativeOps.matrix."""
        return HybridMatrix(data, self.native.matrix(type_id, rows, cols, data, count))

    def spread_experts(self, gate: HybridMatrix, up: HybridMatrix, down: HybridMatrix) -> None:
        """These stay in RAM."""
        for matrix in (gate, up, down):
            matrix.experts = True
        self._layers.append((gate, up, down))
        self.native.spread_experts(gate.host, up.host, down.host)

    def lay_out(self, matrix: HybridMatrix) -> Iterator[tuple[int, int]]:
        """Tile order, in RAM for experts and on the GPU for all else. Raises DeviceError where memory does not do."""
        if matrix.experts:
            yield from self.native.lay_out(matrix.host)
            matrix.data = None
            return
        if not matrix.host.strips_left:  # floats, and types that have rows only
            yield 0, matrix.host.nbytes
        else:
            yield from self.native.lay_out(matrix.host)
        try:
            matrix.device = self._moved(matrix)
        except torch.OutOfMemoryError as error:
            raise no_memory_left("for the weights", error) from error
        matrix.native = matrix.data = None

    def _moved(self, matrix: HybridMatrix) -> DeviceMatrix:
        """A copy on the GPU: tile order as it is; floats as they are; other types, which have rows only, opened to bfloat16."""
        host = matrix.host
        shape = (host.count, host.rows, host.cols)
        if host.in_tiles:
            packed = packed_bytes(host).view(host.count, -(-host.rows // 16), -1)
            return DeviceMatrix(host.type_id, *shape[1:], host.count, packed.to(self._device, copy=True))
        dtype = _FLOATS.get(GGMLQuantizationType(host.type_id))
        if dtype is not None and matrix.data is not None:
            rows = torch.from_numpy(np.frombuffer(matrix.data, np.uint8).copy()).view(dtype).view(shape)
            return DeviceMatrix(host.type_id, *shape[1:], host.count, rows.to(self._device))
        return DeviceMatrix(int(GGMLQuantizationType.BF16), *shape[1:], host.count, self._opened_rows(matrix).view(shape))

    def _opened_rows(self, matrix: HybridMatrix) -> Tensor:
        host = matrix.host
        rows = torch.empty(host.count * host.rows, host.cols)
        assert matrix.data is not None
        single = self.native.matrix(host.type_id, len(rows), host.cols, matrix.data)
        self.native.dequantize_rows(single, torch.arange(len(rows)), rows)
        return rows.to(self._device, torch.bfloat16)

    def prepare(self, top_k: int, most: int) -> None:
        """Once everything is laid out: measure which road the experts of a prompt's chunk, of up to `most` tokens, are to take."""
        self._experts.prepare([ExpertWeights(gate.host, up.host, down.host) for gate, up, down in self._layers], top_k, most)

    @contextmanager
    def compile_only(self) -> Iterator[None]:
        """Within, operations compute nothing: the kernels that they need are compiled, side by side. Where that cannot be, each is at its first use."""
        if self.kernels.compile_only is None:
            yield
            return
        with self.kernels.compile_only(executor(len(CPUS), "compile")):
            self._compiling = True
            try:
                yield
            finally:
                self._compiling = False

    @property
    def roads(self) -> Mapping[str, int]:
        """How many chunks of a layer's experts took each road of a prompt's."""
        return {str(road): count for road, count in self._experts.taken.items()}

    @property
    def streamed_bytes(self) -> int:
        """Of experts' weights that went to the GPU over PCIe since the start."""
        return self._experts.streamed_bytes

    def close(self) -> None:
        """End the pool's threads, and let go what was page-locked."""
        self._experts.close()
        self.native.close()

    # --- Products ----------------------------------------------------------------

    def linear(
        self,
        matrices: Sequence[HybridMatrix],
        x: Tensor,
        outs: Sequence[Tensor],
        accumulate: bool = False,
        norm: Norm | None = None,
        biases: Sequence[Tensor] = (),
    ) -> None:
        weights = [_on_device(matrix) for matrix in matrices]
        y = self._normed(x.view(-1, weights[0].cols), norm, weights)
        for i, (matrix, out) in enumerate(zip(weights, outs, strict=True)):
            self._product(matrix, y, out.view(-1, matrix.rows), accumulate, biases[i] if biases else None)

    def ffn(
        self,
        gate: HybridMatrix,
        up: HybridMatrix,
        down: HybridMatrix,
        x: Tensor,
        out: Tensor,
        accumulate: bool = False,
        norm: Norm | None = None,
        scales: Tensor | None = None,
    ) -> None:
        first, second, last = (_on_device(matrix) for matrix in (gate, up, down))
        y = self._normed(x, norm, (first, second))
        gates, ups = (torch.empty(len(y), first.rows, device=self._device) for _ in range(2))
        self._product(first, y, gates)
        self._product(second, y, ups)
        joined = torch.empty_like(gates, dtype=_input_type(len(y), (last,)))
        self.kernels.swiglu(gates, ups, joined, scales)
        self._product(last, joined, out, accumulate)

    def _normed(self, x: Tensor, norm: Norm | None, readers: Sequence[DeviceMatrix]) -> Tensor:
        """norm(x), in the type that its readers want; without a norm, x as it is."""
        if norm is None:
            return x
        y = torch.empty_like(x, dtype=_input_type(len(x), readers))
        self.kernels.rms_norm(x, norm.weight, norm.eps, y)
        return y

    def _product(self, matrix: DeviceMatrix, x: Tensor, out: Tensor, accumulate: bool = False, bias: Tensor | None = None) -> None:
        """out [n, rows] (+)= x [n, cols] @ matrix.T (+ bias); x float32, or bfloat16 where there are many tokens."""
        if len(x) <= FEW:
            self.kernels.matvec(matrix, x, out, accumulate, bias)
            return
        step = self._rows_at_once(matrix.cols)
        for first in range(0, matrix.rows, step):
            rows = min(step, matrix.rows - first)
            add_product(x, self._weights(matrix, first, rows), out[:, first : first + rows], accumulate)
        if bias is not None:
            out += bias

    def _rows_at_once(self, cols: int) -> int:
        return max(16, OPENED_BYTES // (2 * cols) // 16 * 16)

    def _weights(self, matrix: DeviceMatrix, first: int, rows: int) -> Tensor:
        """Rows first .. first + rows - 1 [rows, cols], in bfloat16, or in float32 for a router's sake where that is what the file has."""
        if not matrix.tiled and matrix.data.dtype is not torch.float16:
            return matrix.data[0, first : first + rows]
        if self._opened is None:
            self._opened = torch.empty(OPENED_BYTES // 2, dtype=torch.bfloat16, device=self._device)
        if rows * matrix.cols > self._opened.numel():
            self._opened = torch.empty(rows * matrix.cols, dtype=torch.bfloat16, device=self._device)
        opened = self._opened[: rows * matrix.cols].view(rows, matrix.cols)
        self.kernels.dequantize(matrix, opened[None], first)
        return opened

    # --- Experts -----------------------------------------------------------------

    def route(self, router: HybridMatrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        matrix = _on_device(router)
        logits = x.new_empty(len(x), matrix.rows)
        self._product(matrix, x, logits)
        self.kernels.route(logits, routing, ids, weights)

    def experts(self, gate: HybridMatrix, up: HybridMatrix, down: HybridMatrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> Callable[[], None]:
        """As Ops.experts: on the pool while the GPU goes on, or streamed to the GPU; in a captured step, by hand-over."""
        if self._compiling:
            return lambda: None
        if self._capture is not None:
            return self._capture.experts(gate.host, up.host, down.host, x, ids, weights, out)
        return self._experts.begin(gate.host, up.host, down.host, x, ids, weights, out)

    # --- The rest ----------------------------------------------------------------

    def sigmoid(self, x: Tensor) -> None:
        x.sigmoid_()

    def dequantize_rows(self, matrix: HybridMatrix, row_ids: Tensor, out: Tensor) -> None:
        """On the CPU, where the table is."""
        if self._capture is not None:
            self._capture.dequantize_rows(matrix.host, row_ids, out)
            return
        rows = self._staging.rows("embedding", len(row_ids), out.shape[1])
        self.native.dequantize_rows(matrix.host, row_ids, rows)
        if len(row_ids) <= FEW:
            self.kernels.fetch(out, rows)  # sooner there than a copy
        else:
            out.copy_(rows, non_blocking=True)

    def rms_norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> None:
        flat = x.view(-1, norm.weight.numel())
        self.kernels.rms_norm(flat, norm.weight, norm.eps, flat if out is None else out.view_as(flat))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        self.kernels.attend(q, k, v, rotation, cache, self._placed(span), scale, out)

    def attend_latent(
        self,
        q: Tensor,
        latent: Tensor,
        norm: Norm,
        rotation: Rotation,
        cache: LatentPages,
        span: Span,
        k_b: HybridMatrix,
        v_b: HybridMatrix,
        scale: float,
        out: Tensor,
    ) -> None:
        place = self._placed(span)
        self.kernels.attend_latent(q, latent, norm, rotation, cache, place, _on_device(k_b), _on_device(v_b), scale, out, self.kernels)

    def _placed(self, span: Span) -> Place:
        """The span on the device, which is written once a step."""
        if self._capture is not None:
            return self._capture.place
        if span is not self._span:
            assert len(span.pages) <= len(self._place.pages)
            self._place.start.fill_(span.start)
            self._place.pages[: len(span.pages)].copy_(torch.tensor(span.pages, dtype=torch.int32))
            self._place = Place(self._place.start, self._place.pages, span.n, span.start + span.n)
            self._span = span
        return self._place

    @contextmanager
    def capturing(self, capture: Capture) -> Iterator[None]:
        """Within, operations are those of a captured step (gpu/step.py)."""
        self._capture = capture
        try:
            yield
        finally:
            self._capture = None


def add_product(x: Tensor, weights: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [n, rows] (+)= x [n, cols] @ weights.T, summed in float32; operands are rounded to the weights' type."""
    x, wide = x.to(weights.dtype), not x.is_cuda or weights.dtype is torch.float32
    product = x.float() @ weights.float().T if wide else torch.mm(x, weights.T, out_dtype=torch.float32)
    if accumulate:
        out += product
    else:
        out.copy_(product)


def _input_type(n: int, readers: Sequence[DeviceMatrix]) -> torch.dtype:
    """What n tokens are rounded to for products with these: many of them to bfloat16, as the weights are, but for float32 weights."""
    return torch.float32 if n <= FEW or any(matrix.data.dtype is torch.float32 for matrix in readers) else torch.bfloat16


def _on_device(matrix: HybridMatrix) -> DeviceMatrix:
    assert matrix.device is not None, "a dense matrix that was not laid out"
    return matrix.device
