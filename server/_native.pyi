"""The native module's surface (native/bindings). Only server.engine.native imports it.

Addresses are plain ints (`tensor.data_ptr()`): the caller keeps the memory alive and contiguous. Floats are float32 unless said otherwise.
Every function checks its counts and raises ValueError; none allocates after the first call of its size.
"""

from collections.abc import Sequence

from typing_extensions import Buffer

def compiled_isas() -> list[str]:
    """The instruction sets that there are kernels for, best first: "amx", "avx512_vnni", "avx512_bf16", "avx512", "avx2", "scalar"."""

def available_isas() -> list[str]:
    """Those of them that this CPU and kernel can run (CPUID and XCR0)."""

def refused_isas() -> list[str]:
    """Those that this CPU has, but whose use the kernel refuses to this process."""

def bind_error(node: int) -> str:
    """Why pages cannot be bound to the kernel's memory node of that number, in the system's words; "" where they can."""

def supported_types() -> list[int]:
    """ggml type ids that Matrix takes."""

class Matrix:
    """A weight matrix in GGUF blocks, borrowed from `data` (which is kept alive): [rows, cols], row-major, cols a multiple of the block.

    With a count, that many such matrices one behind the other: experts, or heads. `pack` brings it into tile order, strip by strip (16 rows); then it
    has its own memory, and `data` is let go. Until the last strip it can be used as it was."""

    def __init__(self, type_id: int, rows: int, cols: int, data: Buffer, count: int = 1) -> None: ...
    @property
    def type_id(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all of the matrices, in the order that they are in."""

    @property
    def address(self) -> int:
        """Where they lie, one behind the other; 0 for a matrix that was spread and packed (see parts)."""

    @property
    def in_tiles(self) -> bool: ...
    @property
    def parts(self) -> list[tuple[int, int, int, int]]:
        """Of each node, where the matrix was spread: the address (0 before anything is packed), the bytes, rows and columns; empty otherwise."""

    @property
    def strips_left(self) -> int:
        """Strips still to be packed; 0 once all are, and for a type that stays in row order."""

    @property
    def next_byte(self) -> int:
        """Where in `data` the next strip's rows begin."""

    def pack(self, pool: Pool, strips: int) -> None:
        """Pack the next `strips` strips. ValueError when fewer are left, MemoryError when there is no memory."""

class Program:
    """Calls of a pool's methods that were recorded (Pool.record), with the addresses and matrices that they were given: these must stay alive."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def set_pages(self, pages: Sequence[int]) -> None:
        """What calls that took `pages` get from now on."""
    def run(self, pool: Pool, start: int) -> None:
        """The calls in their order, with this `start`. ValueError from the first that it does not suit."""

class Handoff:
    """Flags between a GPU's graph and a pool, in memory that both reach: `count` each way, 64 bytes apart, uint32 (0: not yet, 1: done, 2: failed).

    While `serve` runs, an operation or a wait of more than `timeout_ms` answers all flags as failed, so that the graph runs to its end."""

    def __init__(self, asked: int, answered: int, count: int, timeout_ms: int) -> None: ...
    def reset(self) -> None:
        """Take all flags down; before the graph is launched."""
    def serve(self, pool: Pool, program: Program) -> None:
        """Run operation i of the program once asked[i] is raised, and answer it, for each i in order. RuntimeError after a timeout."""
    def fail(self) -> None:
        """Answer whatever is not answered yet as failed."""
    @property
    def turns(self) -> list[tuple[int, int]]:
        """Of the last step: when each operation was asked for and answered, in nanoseconds since the reset."""

class Pool:
    """`len(cpus)` threads pinned to those CPUs; the thread that calls a method is one of them (the first CPU is its own, pinned by pin_caller;
    when another program takes it, the caller changes places with a worker).

    All methods are for one calling thread at a time and release the GIL. Idle workers spin for at most spin_us, then park.
    """

    def __init__(self, cpus: Sequence[int], isa: str, spin_us: int = 50000, nodes: Sequence[int] = ()) -> None:
        """nodes[i] is the memory node of cpus[i], counting from 0; all are on node 0 without."""
    @property
    def threads(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def crossovers(self) -> dict[int, int]:
        """Of the types that were packed: from how many tokens they go through panels, as measured."""

    @property
    def busy_ns(self) -> int:
        """Nanoseconds that all threads together have worked on pieces of work since the start. Any thread may ask, while the pool works too."""

    @property
    def expert_bytes_read(self) -> int:
        """Bytes of routed experts' weights read by `experts` since the start: each expert that a call has tokens for counts once. Any thread may ask."""

    @property
    def dense_bytes_read(self) -> int:
        """Bytes of the weights read by `linear`, `ffn` and the latent's heads since the start: each matrix counts once a call. Any thread may ask."""

    def pin_caller(self) -> None:
        """Pin the calling thread to the pool's first CPU."""
    def close(self) -> None:
        """Join the workers."""
    def record(self, program: Program | None) -> None:
        """From now on, methods that take addresses check their arguments and are added to the program instead of run; None ends that."""
    def linear(
        self, matrices: Sequence[Matrix], x: int, n: int, outs: Sequence[int], accumulate: bool, norm: int = 0, eps: float = 0.0, biases: Sequence[int] = ()
    ) -> None:
        """outs[i][n, rows_i] (+)= x[n, cols] @ matrices[i].T for at most 8 matrices, which share cols.

        Where some matrix is quantised, x is rounded once to int8 with a scale for each 32 values; F32, F16 and BF16 matrices meet x as it is.
        norm [cols] is the address of a weight: x then goes through RMSNorm first. 0: no norm. biases are addresses of [rows_i], or none at all."""
    def ffn(self, gate: Matrix, up: Matrix, down: Matrix, x: int, n: int, out: int, accumulate: bool, norm: int = 0, eps: float = 0.0, scales: int = 0) -> None:
        """out[n, hidden] (+)= scales * down(silu(gate(x)) * up(x)), x [n, hidden]. norm as in linear; without one, out must not overlap x.

        scales [n] is the address of one factor a token; 0: none."""
    def spread(self, gate: Matrix, up: Matrix, down: Matrix, memory: Sequence[int], copies: bool) -> None:
        """Before they are packed: have the experts laid out in parts, one for each of the pool's nodes; its pages are bound to the kernel's node memory[i].

        Each part is a slice of the intermediate dimension (rows of gate and up, columns of down, at multiples of 32), or with `copies` everything. Types
        without tile order are then packed too, as they are. Packed, they serve `experts` alone."""
    def experts(self, gate: Matrix, up: Matrix, down: Matrix, x: int, n: int, ids: int, weights: int, top_k: int, out: int, accumulate: bool = True) -> None:
        """out[n, hidden] (+)= sum over j of weights[:, j] * ffn of expert ids[:, j] (x), x [n, hidden]; the matrices hold `count` experts.

        ids [n, top_k] are int32; -1 stands for none, and another one that is not there is a ValueError. out must not overlap x. The sum does not depend on
        the threads' timing."""
    def route(
        self,
        router: Matrix,
        top_k: int,
        sigmoid: bool,
        normalize: bool,
        scale: float,
        groups: int,
        groups_used: int,
        group_top: int,
        bias: int,
        x: int,
        n: int,
        ids: int,
        weights: int,
    ) -> None:
        """ids [n, top_k] int32 and weights [n, top_k] of the experts of x [n, hidden], as server.engine.ops.Routing says; softmax unless sigmoid.

        bias [experts] may be 0 for none. ids are valid and distinct whatever x is; at most 64 groups."""
    def sigmoid(self, x: int, count: int) -> None:
        """1 / (1 + exp(-x)) of `count` values in place, on the calling thread."""
    def dequantize_rows(self, matrix: Matrix, row_ids: int, n: int, out: int) -> None:
        """out[n, cols] = rows of the matrix; row_ids [n] are int64, and one that is not there is a ValueError."""
    def rms_norm(self, x: int, weight: int, out: int, n: int, dim: int, eps: float) -> None:
        """out[n, dim] = x / sqrt(mean(x^2) + eps) * weight; in place when out == x."""
    def rope(self, x: int, n: int, heads: int, head_dim: int, rot_dim: int, table: int, interleaved: bool) -> None:
        """Rotate the first rot_dim of each head of x [n, heads, head_dim] in place; table [n, rot_dim / 2, 2] holds (cos, sin).

        interleaved: pairs (2i, 2i+1), as llama's GGUF files want; otherwise (i, i + rot_dim / 2), as NeoX."""
    def store_kv(
        self, k: int, v: int, n: int, kv_heads: int, head_dim: int, k_cache: int, v_cache: int, half: bool, page_size: int, pages: Sequence[int], start: int
    ) -> None:
        """Write k, v [n, kv_heads, head_dim] of positions start.. into the layer's pages.

        k_cache [num_pages, kv_heads, head_dim, page_size] (transposed, so that scores need no horizontal sums),
        v_cache [num_pages, kv_heads, page_size, head_dim]; float16 when half, else float32; page_size a multiple of 16."""
    def attention(
        self,
        q: int,
        n: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        k_cache: int,
        v_cache: int,
        half: bool,
        page_size: int,
        pages: Sequence[int],
        start: int,
        scale: float,
        out: int,
    ) -> None:
        """Causal attention of q [n, heads, head_dim] at positions start.. over all start + n cached tokens -> out [n, heads, head_dim]."""
    def attend(
        self,
        q: int,
        k: int,
        v: int,
        n: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        table: int,
        positions: int,
        rot_dim: int,
        interleaved: bool,
        k_cache: int,
        v_cache: int,
        half: bool,
        page_size: int,
        pages: Sequence[int],
        start: int,
        scale: float,
        out: int,
    ) -> None:
        """rope on q and k in place, store_kv, attention: in one call. table is that of rope for positions 0 .. positions - 1."""
    def linear_heads(self, matrix: Matrix, x: int, n: int, width: int, out: int) -> None:
        """out[n, count, rows] = matrix h @ x[:, h, : cols] for each of the `count` heads, x [n, count, width]. x is rounded as in linear."""
    def attend_latent(
        self,
        q: int,
        latent: int,
        n: int,
        norm: int,
        eps: float,
        table: int,
        positions: int,
        rot_dim: int,
        interleaved: bool,
        cache: int,
        half: bool,
        page_size: int,
        pages: Sequence[int],
        start: int,
        k_b: Matrix,
        v_b: Matrix,
        scale: float,
        out: int,
    ) -> None:
        """Multi-head latent attention, absorbed: q [n, heads, nope + rot_dim] and latent [n, kv_lora + rot_dim], overwritten -> out [n, heads, v_dim].

        norm [kv_lora] is a weight's address, table as in attend. k_b holds `heads` matrices [kv_lora, nope], v_b as many [v_dim, kv_lora]. The latents'
        first kv_lora values are normed, their last and the queries' last rot_dim rotated; cache [num_pages, page_size, kv_lora + rot_dim] takes the
        latents."""
    def read_sweep(self, data: int, bytes: int) -> float:
        """Seconds in which all threads together read `bytes`, a multiple of 2^20, with the instruction set's widest loads."""
    def peak_ops(self) -> dict[str, float]:
        """Operations a second that all threads together reach on registers alone, a multiplication and an addition being two: of "f32", "int8"."""
