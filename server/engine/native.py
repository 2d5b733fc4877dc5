"""The native pool, as the layers use it: torch tensors in, pinned threads at work, nothing copied. The only importer of server._native.

    ops = open_ops(cpu_infer=None)         # the CPUs that there are, the best instruction set (or MOESPAN_ISA's)
    w = ops.matrix(type_id, rows, cols, memoryview(mmap)[a:b])
    ops.linear([w], x, [out])

Between `record` and its end, operations are written down and not run: a `Program` of them is then one native call for each token, with no Python between.
What only our own code can get wrong is no more than asserted, and cheaply; the module itself checks every count.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.engine.limits import cpus_allowed
from server.engine.numa import Node, Spread, nodes_here, seats
from server.engine.ops import KVPages, LatentPages, Norm, Rotation, Routing, Span
from server.errors import DeviceError
from server.types import EngineUse

if TYPE_CHECKING:
    from server import _native
    from server._native import Matrix as Matrix  # for the GPU stage too
    from server._native import Pool
    from server.config import Numa, Precision

_log = logging.getLogger(__name__)

_FLOAT = torch.float32
_BF16_ISAS = ("amx", "avx512_bf16")  # AVX-512 with products of bf16 beside those of int8
SLICE = 32 << 20  # bytes of a matrix that are laid out at a time: as much of a file is in memory twice


class Program:
    """Operations that were recorded, to be run again with the memory that they were given: one step of a model, for any place in a sequence."""

    def __init__(self, pool: Pool, program: _native.Program) -> None:
        self._pool, self.native = pool, program
        self.kept: list[object] = []  # tensors whose addresses the program holds
        self._pages: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.native)

    def run(self, start: int, pages: tuple[int, ...]) -> None:
        """As if the operations were called with Span(start, n, pages), n being as recorded."""
        if pages is not self._pages:  # a sequence keeps its pages: most steps bring the same tuple
            self.native.set_pages(pages)
            self._pages = pages
        self.native.run(self._pool, start)


class Handover:
    """The pool's side of a captured GPU step: operation i of `program` runs when the GPU raises asked[i], and answered[i] is raised behind it.

    Both are pinned int32, a flag each 16 words. An operation or a wait of more than timeout_ms ends the step, and leaves no flag without an answer.
    """

    def __init__(self, native: NativeOps, program: Program, asked: Tensor, answered: Tensor, timeout_ms: int) -> None:
        self._pool, self._program = native.pool, program
        self._kept = asked, answered
        self._flags = _module().Handoff(asked.data_ptr(), answered.data_ptr(), len(program), timeout_ms)

    def reset(self) -> None:
        """Take the flags down, before the graph is launched."""
        self._flags.reset()

    def serve(self) -> None:
        """Run the program's operations as they are asked for. Raises RuntimeError after a timeout, ValueError for an expert that is not there."""
        self._flags.serve(self._pool, self._program.native)

    @property
    def turns(self) -> list[tuple[int, int]]:
        """When each operation of the last step was asked for and answered, in nanoseconds since the reset."""
        turns: list[tuple[int, int]] = self._flags.turns
        return turns


class NativeOps:
    """server.engine.ops.Ops on a pool of pinned CPU threads. One thread at a time may call it: it is one of the pool's."""

    def __init__(self, pool: Pool, spread: Spread | None = None) -> None:
        self.pool = pool
        self._spread = spread
        self._matrix = _module().Matrix
        self._kept: list[object] | None = None  # while a program is recorded: what it must keep alive
        self.threads = pool.threads
        self.isa = pool.isa

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def pin_caller(self) -> None:
        """Pin the calling thread, which will drive the steps, to the pool's first CPU."""
        self.pool.pin_caller()

    def close(self) -> None:
        """End the pool's threads; a second call does nothing."""
        self.pool.close()

    def use(self) -> EngineUse | None:
        """What the pool has done; None once it is closed. Any thread may ask, while the pool works."""
        pool = self.pool
        try:
            return EngineUse(pool.threads, pool.busy_ns * 1e-9, pool.expert_bytes_read, pool.dense_bytes_read)
        except ValueError:
            return None

    def program(self) -> Program:
        """An empty one, for `record`."""
        return Program(self.pool, _module().Program())

    @contextmanager
    def record(self, program: Program | None = None) -> Iterator[Program]:
        """Within, operations become the program, or more of one, and compute nothing. Their span counts only for its number of tokens; matrices must be
        laid out."""
        program = self.program() if program is None else program
        self._kept = program.kept
        self.pool.record(program.native)
        try:
            yield program
        finally:
            self.pool.record(None)
            self._kept = None

    def _at(self, x: Tensor) -> int:
        """The tensor's address, for an operation that is made now."""
        if self._kept is not None:
            self._kept.append(x)
        return x.data_ptr()

    def matrix(self, type_id: int, rows: int, cols: int, data: memoryview, count: int = 1) -> Matrix:
        """Borrow `count` weight matrices [rows, cols] in GGUF blocks. ValueError when the type, the columns or the bytes do not fit."""
        matrix: Matrix = self._matrix(type_id, rows, cols, data, count)
        return matrix

    @property
    def numa(self) -> str:
        """How experts are spread over nodes of memory: "off", "shard" or "replicate"."""
        return "off" if self._spread is None else self._spread.mode

    def spread_experts(self, gate: Matrix, up: Matrix, down: Matrix) -> None:
        """Have the matrices laid out node by node, where there are several; from then on only `experts` takes them."""
        if self._spread is not None:
            self.pool.spread(gate, up, down, [node.memory for node in self._spread.nodes], self._spread.mode == "replicate")
            for matrix in (gate, up, down):
                self._spread.add([nbytes for _, nbytes, _, _ in matrix.parts])

    def check_nodes(self) -> None:
        """Whether the nodes have room for the experts that were spread since the last time; the log is told. Raises DeviceError with a sentence."""
        if self._spread is not None:
            self._spread.check()

    def lay_out(self, matrix: Matrix) -> Iterator[tuple[int, int]]:
        """Tile order for a matrix of a type that has one; yields each slice's bytes before they are read. Raises DeviceError without memory."""
        while left := matrix.strips_left:
            begin = matrix.next_byte
            strips = min(left, max(1, SLICE * left // (matrix.nbytes - begin)))
            yield begin, min(begin + -(-(matrix.nbytes - begin) * strips // left), matrix.nbytes)
            try:
                matrix.pack(self.pool, strips)
            except MemoryError:
                raise DeviceError("There is not enough memory for the weights. Close other programs, or use a smaller model.") from None

    def linear(
        self, matrices: Sequence[Matrix], x: Tensor, outs: Sequence[Tensor], accumulate: bool = False, norm: Norm | None = None, biases: Sequence[Tensor] = ()
    ) -> None:
        """outs[i] [n, rows_i] (+)= norm(x) [n, cols] @ matrices[i].T (+ biases[i]); the input is rounded once for all matrices, as each type wants it."""
        cols = matrices[0].cols
        n = x.numel() // cols
        assert _holds(x, n * cols)
        for i, out in enumerate(outs):
            assert _holds(out, n * matrices[i].rows)
        for i, bias in enumerate(biases):
            assert _holds(bias, matrices[i].rows)
        at = self._at
        self.pool.linear(matrices, at(x), n, [at(out) for out in outs], accumulate, *self._norm(norm, cols), [at(bias) for bias in biases])

    def ffn(
        self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, out: Tensor, accumulate: bool = False, norm: Norm | None = None, scales: Tensor | None = None
    ) -> None:
        """out [n, hidden] (+)= scales * down(silu(gate(y)) * up(y)) with y = norm(x), x [n, hidden]; out may be x where there is a norm."""
        cols = gate.cols
        n = x.numel() // cols
        assert _holds(x, n * cols)
        assert _holds(out, n * down.rows)
        assert scales is None or _holds(scales, n)
        self.pool.ffn(gate, up, down, self._at(x), n, self._at(out), accumulate, *self._norm(norm, cols), 0 if scales is None else self._at(scales))

    def route(self, router: Matrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """ids [n, top_k] int32 and weights [n, top_k] of each token's experts, best first; ValueError where `routing` does not fit the router."""
        r = routing
        n = x.numel() // router.cols
        assert _holds(x, n * router.cols)
        assert _are_ids(ids, n * r.top_k)
        assert _holds(weights, n * r.top_k)
        assert r.bias is None or _holds(r.bias, router.rows)
        self.pool.route(
            router, r.top_k, r.gating == "sigmoid", r.normalize, r.scale, r.groups, r.groups_used, r.group_top, 0 if r.bias is None else self._at(r.bias),
            self._at(x), n, self._at(ids), self._at(weights),
        )  # fmt: skip

    def experts(
        self, gate: Matrix, up: Matrix, down: Matrix, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, accumulate: bool = True
    ) -> Callable[[], None]:
        """out [n, hidden] (+)= sum over j of weights[:, j] * ffn of expert ids[:, j] (x), at once; id -1 stands for none.

        ValueError for an expert that is not there.
        """
        n, top_k = ids.shape
        assert _holds(x, n * gate.cols)
        assert _are_ids(ids, n * top_k)
        assert _holds(weights, n * top_k)
        assert _holds(out, n * down.rows)
        self.pool.experts(gate, up, down, self._at(x), n, self._at(ids), self._at(weights), top_k, self._at(out), accumulate)
        return lambda: None  # it is there already

    def sigmoid(self, x: Tensor) -> None:
        """1 / (1 + exp(-x)), in place."""
        assert _holds(x, x.numel())
        self.pool.sigmoid(self._at(x), x.numel())

    def dequantize_rows(self, matrix: Matrix, row_ids: Tensor, out: Tensor) -> None:
        """out [n, cols] = rows row_ids [n] (int64) of the matrix. ValueError for a row that is not there."""
        n = row_ids.numel()
        assert row_ids.dtype is torch.int64
        assert row_ids.is_contiguous()
        assert _holds(out, n * matrix.cols)
        self.pool.dequantize_rows(matrix, self._at(row_ids), n, self._at(out))

    def rms_norm(self, x: Tensor, norm: Norm, out: Tensor | None = None) -> None:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (weight's length), to out, or in place."""
        dim = norm.weight.numel()
        n = x.numel() // dim
        assert _holds(x, n * dim)
        assert out is None or _holds(out, n * dim)
        self.pool.rms_norm(self._at(x), self._at(norm.weight), self._at(x if out is None else out), n, dim, norm.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: KVPages, span: Span, scale: float, out: Tensor) -> None:
        """Rotate q and k in place, store k and v, and attend causally over all start + n cached tokens.

        q and out [n, heads, head_dim], k and v [n, kv_heads, head_dim].
        """
        n, heads, (_, kv_heads, head_dim, page_size), (positions, half, _) = span.n, q.shape[1], cache.k.shape, rotation.table.shape
        assert _holds(q, n * heads * head_dim)
        assert _holds(out, n * heads * head_dim)
        assert _holds(k, n * kv_heads * head_dim)
        assert _holds(v, n * kv_heads * head_dim)
        assert _holds(rotation.table, positions * half * 2)
        self.pool.attend(
            self._at(q), self._at(k), self._at(v), n, heads, kv_heads, head_dim,
            self._at(rotation.table), positions, 2 * half, rotation.interleaved,
            self._at(cache.k), self._at(cache.v), _is_half(cache.k, cache.v), page_size, span.pages, span.start,
            scale, self._at(out),
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
        """Norm, rotate and store the latents, and attend to all start + n of them in the absorbed form; latent is left overwritten.

        q [n, heads, nope + rope], latent [n, kv_lora + rope], out [n, heads, v_dim]; k_b and v_b hold `heads` matrices each.
        """
        n, heads, (_, page_size, width), (positions, half, _) = span.n, k_b.count, cache.latent.shape, rotation.table.shape
        assert width == k_b.rows + 2 * half
        assert _holds(q, n * heads * (k_b.cols + 2 * half))
        assert _holds(latent, n * width)
        assert _holds(norm.weight, k_b.rows)
        assert _holds(rotation.table, positions * half * 2)
        assert _holds(out, n * heads * v_b.rows)
        self.pool.attend_latent(
            self._at(q), self._at(latent), n, self._at(norm.weight), norm.eps,
            self._at(rotation.table), positions, 2 * half, rotation.interleaved,
            self._at(cache.latent), _is_half(cache.latent), page_size, span.pages, span.start,
            k_b, v_b, scale, self._at(out),
        )  # fmt: skip

    def _norm(self, norm: Norm | None, cols: int) -> tuple[int, float]:
        """The weight's address and eps, as the module takes them; 0 for no norm."""
        if norm is None:
            return 0, 0.0
        assert _holds(norm.weight, cols)
        return self._at(norm.weight), norm.eps

    def read_sweep(self, x: Tensor) -> float:
        """Seconds in which the pool's threads read all of x together: a contiguous tensor of a multiple of 2^20 bytes."""
        assert x.is_contiguous()
        return self.pool.read_sweep(x.data_ptr(), x.nbytes)

    def peak_ops(self) -> dict[str, float]:
        """Operations a second that the pool reaches on registers alone, by the kind of numbers: "f32", "int8"."""
        return self.pool.peak_ops()


def open_ops(cpu_infer: int | None = None, numa: Numa = "off", nodes: Sequence[Node] | None = None, precision: Precision = "auto") -> NativeOps:
    """A pool of `cpu_infer` pinned threads: None for one on each CPU that there is; more than that are capped with a warning.

    The instruction set is the best that the CPU has, or what MOESPAN_ISA names. `numa`: how experts are spread over nodes of memory (engine/numa.py); `nodes`
    takes the place of the machine's. `precision`: of activations, as `prefill_precision` says. Raises DeviceError or ConfigError with a sentence.
    """
    module = _module()
    cpus = cpus_allowed()
    by_node, spread = seats(numa, nodes_here() if nodes is None else nodes, cpu_infer, len(cpus))
    taken = [(cpu, node) for node, own in enumerate(by_node) for cpu in own] or [(cpu, 0) for cpu in cpus[:cpu_infer]]
    if cpu_infer is not None and cpu_infer > len(taken):
        _log.warning("cpu_infer is %d, but only %d CPUs may be used here: running with %d.", cpu_infer, len(taken), len(taken))
    for reason in {module.bind_error(node.memory) for node in spread.nodes} - {""} if spread else ():
        _log.warning("NUMA: pages cannot be bound to nodes here (%s), so they lie where their node's threads write them first.", reason)
    isa = _wanted_isa(module, precision)
    try:
        return NativeOps(module.Pool([cpu for cpu, _ in taken], isa, nodes=[node for _, node in taken]), spread)
    except RuntimeError as error:
        raise DeviceError(f"The pool of CPU threads could not be started: {error}.") from error


def prefill_precision(wanted: Precision = "auto") -> str:
    """What activations are rounded to here where many tokens meet weights: "bf16" or "int8". Raises DeviceError where `wanted` cannot be."""
    module = _module()
    isa = _wanted_isa(module, wanted)
    return "bf16" if (module.available_isas()[0] if isa == "auto" else isa) in _BF16_ISAS else "int8"


def supported_types() -> frozenset[int]:
    """The ggml type ids that a matrix may have."""
    return frozenset(_module().supported_types())


def _wanted_isa(module: ModuleType, precision: Precision) -> str:
    """What MOESPAN_ISA names, or "auto"; a set that the kernel refuses is told, as the next best runs slower."""
    wanted = os.environ.get("MOESPAN_ISA", "") or "auto"
    available: list[str] = module.available_isas()
    for refused in module.refused_isas():
        _log.warning("This CPU has %s, but the operating system refuses its use to this process: %s runs instead.", refused, available[0])
    if wanted not in ("auto", *available):
        why = "which this CPU cannot run" if wanted in module.compiled_isas() else "which is no instruction set"
        raise DeviceError(f"MOESPAN_ISA asks for '{wanted}', {why}. Available here: {', '.join(available)}. Unset it for the best of them.")
    if precision == "auto":
        return wanted
    fitting = [isa for isa in available if wanted in ("auto", isa) and (isa in _BF16_ISAS) == (precision == "bf16")]
    if fitting:
        return fitting[0]
    if wanted != "auto":
        raise DeviceError(f"MOESPAN_ISA asks for '{wanted}', which has no prefill in {precision} as --prefill_precision asks. Leave one of the two out.")
    raise DeviceError("--prefill_precision bf16 needs a CPU with AMX or AVX512_BF16, and this one has neither. Leave it out: int8 is what runs here.")


def packed_bytes(matrix: Matrix) -> Tensor:
    """The bytes of a packed matrix, uint8 [nbytes]: borrowed, so the matrix must outlive them."""
    assert matrix.address, "a matrix that lies in parts"
    return torch.frombuffer((ctypes.c_uint8 * matrix.nbytes).from_address(matrix.address), dtype=torch.uint8)


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


def _is_half(*stores: Tensor) -> bool:
    dtype = stores[0].dtype
    assert dtype in (torch.float16, torch.float32)
    assert all(store.dtype is dtype for store in stores)
    return dtype is torch.float16
