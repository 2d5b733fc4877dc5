"""The native pool, as the layers use it: torch tensors in, pinned threads at work, nothing copied. The only importer of server._native.

    ops = open_ops(cpu_infer=None)         # the CPUs that there are, the best instruction set (or MOESPAN_ISA's)
    w = ops.matrix(type_id, rows, cols, memoryview(mmap)[a:b])
    ops.linear([w], x, [out])

A step makes some 250 calls for each token, of about 2 us here each, so what only our own code can get wrong is no more than asserted,
and cheaply; the module itself checks every count.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.engine.ops import KVPages, LatentPages, Norm, Rotation, Routing, Span
from server.errors import DeviceError

if TYPE_CHECKING:
    from server._native import Matrix, Pool

_log = logging.getLogger(__name__)

_FLOAT = torch.float32
SLICE = 32 << 20  # bytes of a matrix that are laid out at a time: as much of a file is in memory twice


class NativeOps:
    """server.engine.ops.Ops on a pool of pinned CPU threads. One thread at a time may call it: it is one of the pool's."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._matrix = _module().Matrix
        self.threads = pool.threads
        self.isa = pool.isa

    def pin_caller(self) -> None:
        """Pin the calling thread, which will drive the steps, to the pool's first CPU."""
        self._pool.pin_caller()

    def close(self) -> None:
        """End the pool's threads; a second call does nothing."""
        self._pool.close()

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview, count: int = 1) -> Matrix:
        """Borrow `count` weight matrices [rows, cols] in GGUF blocks. ValueError when the type, the columns or the bytes do not fit."""
        matrix: Matrix = self._matrix(type_id, rows, cols, data, count)
        return matrix

    def lay_out(self, matrix: Matrix) -> Iterator[tuple[int, int]]:
        """Tile order for a matrix of a type that has one; yields each slice's bytes before they are read. Raises DeviceError without memory."""
        while left := matrix.strips_left:
            begin = matrix.next_byte
            strips = min(left, max(1, SLICE * left // (matrix.nbytes - begin)))
            yield begin, min(begin + -(-(matrix.nbytes - begin) * strips // left), matrix.nbytes)
            try:
                matrix.pack(self._pool, strips)
            except MemoryError:
                raise DeviceError("There is not enough memory for the weights. Close other programs, or use a smaller model.") from None

    def linear(self, matrices: Sequence[Matrix], x: Tensor, outs: Sequence[Tensor], accumulate: bool = False, norm: Norm | None = None) -> None:
        """outs[i] [n, rows_i] (+)= norm(x) [n, cols] @ matrices[i].T; the input is rounded to int8 once where some matrix is quantised."""
        cols = matrices[0].cols
        n = x.numel() // cols
        assert _holds(x, n * cols)
        for i, out in enumerate(outs):
            assert _holds(out, n * matrices[i].rows)
        self._pool.linear(matrices, x.data_ptr(), n, [out.data_ptr() for out in outs], accumulate, *_address(norm, cols))

    def ffn(
        self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, out: Tensor, accumulate: bool = False, norm: Norm | None = None, scales: Tensor | None = None
    ) -> None:
        """out [n, hidden] (+)= scales * down(silu(gate(y)) * up(y)) with y = norm(x), x [n, hidden]; out may be x where there is a norm."""
        cols = gate.cols
        n = x.numel() // cols
        assert _holds(x, n * cols)
        assert _holds(out, n * down.rows)
        assert scales is None or _holds(scales, n)
        self._pool.ffn(gate, up, down, x.data_ptr(), n, out.data_ptr(), accumulate, *_address(norm, cols), 0 if scales is None else scales.data_ptr())

    def route(self, router: Matrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """ids [n, top_k] int32 and weights [n, top_k] of each token's experts, best first; ValueError where `routing` does not fit the router."""
        r = routing
        n = x.numel() // router.cols
        assert _holds(x, n * router.cols)
        assert _are_ids(ids, n * r.top_k)
        assert _holds(weights, n * r.top_k)
        assert r.bias is None or _holds(r.bias, router.rows)
        self._pool.route(
            router, r.top_k, r.gating == "sigmoid", r.normalize, r.scale, r.groups, r.groups_used, r.group_top, 0 if r.bias is None else r.bias.data_ptr(),
            x.data_ptr(), n, ids.data_ptr(), weights.data_ptr(),
        )  # fmt: skip

    def experts(self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """out [n, hidden] += sum over j of weights[:, j] * ffn of expert ids[:, j] (x); ValueError for an expert that is not there."""
        n, top_k = ids.shape
        assert _holds(x, n * gate.cols)
        assert _are_ids(ids, n * top_k)
        assert _holds(weights, n * top_k)
        assert _holds(out, n * down.rows)
        self._pool.experts(gate, up, down, x.data_ptr(), n, ids.data_ptr(), weights.data_ptr(), top_k, out.data_ptr())

    def dequantize_rows(self, matrix: Matrix, row_ids: Tensor, out: Tensor) -> None:
        """out [n, cols] = rows row_ids [n] (int64) of the matrix. ValueError for a row that is not there."""
        n = row_ids.numel()
        assert row_ids.dtype is torch.int64
        assert row_ids.is_contiguous()
        assert _holds(out, n * matrix.cols)
        self._pool.dequantize_rows(matrix, row_ids.data_ptr(), n, out.data_ptr())

    def rms_norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> None:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (weight's length), to out, or in place."""
        dim = norm.weight.numel()
        n = x.numel() // dim
        assert _holds(x, n * dim)
        assert out is None or _holds(out, n * dim)
        self._pool.rms_norm(x.data_ptr(), norm.weight.data_ptr(), (x if out is None else out).data_ptr(), n, dim, norm.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        """Rotate q and k in place, store k and v, and attend causally over all start + n cached tokens.

        q and out [n, heads, head_dim], k and v [n, kv_heads, head_dim], rotation.table [n, rot_dim / 2, 2] of (cos, sin).
        """
        n, heads, (_, kv_heads, head_dim, page_size), half = span.n, q.shape[1], cache.k.shape, rotation.table.shape[1]
        assert _holds(q, n * heads * head_dim)
        assert _holds(out, n * heads * head_dim)
        assert _holds(k, n * kv_heads * head_dim)
        assert _holds(v, n * kv_heads * head_dim)
        assert _holds(rotation.table, n * half * 2)
        self._pool.attend(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), n, heads, kv_heads, head_dim,
            rotation.table.data_ptr(), 2 * half, rotation.interleaved,
            cache.k.data_ptr(), cache.v.data_ptr(), _is_half(cache.k, cache.v), page_size, span.pages, span.start,
            scale, out.data_ptr(),
        )  # fmt: skip

    def attend_latent(
        self,
        q: Tensor,
        latent: Tensor,
        norm: Norm,
        rotation: Rotation,
        cache: LatentPages,
        span: Span,
        k_b: Matrix,
        v_b: Matrix,
        scale: float,
        out: Tensor,
    ) -> None:
        """Norm, rotate and store the latents, and attend to all start + n of them in the absorbed form; q and latent are left overwritten.

        q [n, heads, nope + rope], latent [n, kv_lora + rope], out [n, heads, v_dim]; k_b and v_b hold `heads` matrices each.
        """
        n, heads, (_, page_size, width), half = span.n, k_b.count, cache.latent.shape, rotation.table.shape[1]
        assert width == k_b.rows + 2 * half
        assert _holds(q, n * heads * (k_b.cols + 2 * half))
        assert _holds(latent, n * width)
        assert _holds(norm.weight, k_b.rows)
        assert _holds(rotation.table, n * half * 2)
        assert _holds(out, n * heads * v_b.rows)
        self._pool.attend_latent(
            q.data_ptr(), latent.data_ptr(), n, norm.weight.data_ptr(), norm.eps,
            rotation.table.data_ptr(), 2 * half, rotation.interleaved,
            cache.latent.data_ptr(), _is_half(cache.latent), page_size, span.pages, span.start,
            k_b, v_b, scale, out.data_ptr(),
        )  # fmt: skip

    def read_sweep(self, x: Tensor) -> float:
        """Seconds in which the pool's threads read all of x together: a contiguous tensor of a multiple of 2^20 bytes."""
        assert x.is_contiguous()
        return self._pool.read_sweep(x.data_ptr(), x.nbytes)

    def peak_ops(self) -> dict[str, float]:
        """Operations a second that the pool reaches on registers alone, by the kind of numbers: "f32", "int8"."""
        return self._pool.peak_ops()


def open_ops(cpu_infer: int | None = None) -> NativeOps:
    """A pool of `cpu_infer` pinned threads: None for one on each CPU that there is; more than that are capped with a warning.

    The instruction set is the best that the CPU has, or what MOESPAN_ISA names. Raises DeviceError with a sentence.
    """
    module = _module()
    cpus = cpus_allowed()
    if cpu_infer is not None and cpu_infer > len(cpus):
        _log.warning("cpu_infer is %d, but only %d CPUs may be used here: running with %d.", cpu_infer, len(cpus), len(cpus))
    isa = _wanted_isa(module.available_isas())
    try:
        return NativeOps(module.Pool(cpus[:cpu_infer], isa))
    except RuntimeError as error:
        raise DeviceError(f"The pool of CPU threads could not be started: {error}.") from error


def supported_types() -> frozenset[int]:
    """The ggml type ids that a matrix may have."""
    return frozenset(_module().supported_types())


def cpus_allowed() -> list[int]:
    """The CPUs that this process may use: its affinity, cut to the CPU quota of its cgroups.

    A quota is rounded down, to one at least: a pool that runs over it is stopped as a whole until the next period.
    """
    cpus = sorted(os.sched_getaffinity(0))
    quotas = [quota for directory in _cgroup_directories() if (quota := cgroup_quota(directory)) is not None]
    return cpus[: max(1, int(min(quotas, default=len(cpus))))]


def cgroup_quota(directory: Path) -> float | None:
    """CPUs' worth of time that one cgroup directory grants: cpu.max (v2) or cpu.cfs_quota_us (v1); None without a limit."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota, period = ((directory / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):  # no such controller here
        return None


def _cgroup_directories(root: Path = Path("/sys/fs/cgroup")) -> Iterator[Path]:
    """The directories of this process's cgroups and of those above them, any of which may set a quota."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers  # v2 has no controllers in its line
        inner = top / path.lstrip("/")
        yield from (directory for directory in (inner, *inner.parents) if directory.is_relative_to(top))


def _wanted_isa(available: Sequence[str]) -> str:
    wanted = os.environ.get("MOESPAN_ISA", "") or "auto"
    if wanted not in ("auto", "scalar", "avx2", "avx512"):
        raise DeviceError(
            f"MOESPAN_ISA asks for '{wanted}', which is no instruction set. Available here: {', '.join(available)}. Unset it for the best of them."
        )
    if wanted != "auto" and wanted not in available:
        raise DeviceError(f"MOESPAN_ISA asks for '{wanted}', which this CPU cannot run. Available here: {', '.join(available)}. Unset it for the best of them.")
    return wanted


def _module() -> ModuleType:
    try:
        return importlib.import_module("server._native")
    except ImportError as error:
        raise DeviceError(
            f"The native module cannot be loaded ({error}). Build it with `pip install -e .` in the source tree, which needs a C++20 compiler."
        ) from error


def _holds(x: Tensor, count: int) -> bool:
    """Whether the native side may read or write `count` floats at x's address."""
    return x.dtype is _FLOAT and x.numel() == count and x.is_contiguous()


def _are_ids(ids: Tensor, count: int) -> bool:
    """The same for int32."""
    return ids.dtype is torch.int32 and ids.numel() == count and ids.is_contiguous()


def _address(norm: Norm | None, cols: int) -> tuple[int, float]:
    """The weight's address and eps, as the module takes them; 0 for no norm."""
    if norm is None:
        return 0, 0.0
    assert _holds(norm.weight, cols)
    return norm.weight.data_ptr(), norm.eps


def _is_half(*stores: Tensor) -> bool:
    dtype = stores[0].dtype
    assert dtype in (torch.float16, torch.float32)
    assert all(store.dtype is dtype for store in stores)
    return dtype is torch.float16
