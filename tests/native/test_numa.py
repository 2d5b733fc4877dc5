"""Experts that are spread over nodes of memory, on pretended nodes: 1, 2 and 4 of them give what one pool without nodes gives.

Copies give the same bits. Slices give the same sums in another order: their terms (a weight's scale and codes times 16 or 32 activations, or the offset's part)
are rounded alike, since slices begin and end where activations share a scale. A float32 sum of T terms is within rounding(T) of the exact one, relative to
the sum of the terms' magnitudes (isas.rounding), so two orders are within twice that. T is top_k * (2 * width / 16) for the terms, and one for each node.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from server import _native
from tests.native.blocks import FLOAT_TYPES, TYPES, Weights, block_values, random_weights
from tests.native.isas import ISAS, address, open_pool, rounding
from tests.native.test_experts import Experts, draw, run
from tests.native.test_pool import busy

CPUS = sorted(os.sched_getaffinity(0))
BEST = _native.available_isas()[0]
NODES = (1, 2, 4)
STATUS = Path("/proc/self/status").read_text()
MEMORY = int([*re.findall(r"Mems_allowed_list:\s*(\d+)", STATUS), 0][0])  # the kernel's number of a node that we may use
Matrices = Sequence[_native.Matrix]


@contextmanager
def open_nodes(count: int, threads: int = 1, isa: str = BEST) -> Iterator[_native.Pool]:
    """A pool of `count` nodes with so many threads each."""
    seats = [(CPUS[i % len(CPUS)], i // threads) for i in range(count * threads)]
    pool = _native.Pool([cpu for cpu, _ in seats], isa, nodes=[node for _, node in seats])
    assert (pool.isa, pool.nodes, pool.threads) == (isa, count, count * threads)
    try:
        yield pool
    finally:
        pool.close()


def spread(pool: _native.Pool, experts: Experts, *, copies: bool = False, step: int = 10**6) -> Matrices:
    """The experts' matrices in parts, packed `step` strips at a time."""
    matrices = experts.matrices()
    pool.spread(*matrices, [MEMORY] * pool.nodes, copies)
    pack(pool, matrices, step)
    assert all(len(matrix.parts) == pool.nodes for matrix in matrices)
    return matrices


def pack(pool: _native.Pool, matrices: Matrices, step: int = 10**6) -> None:
    for matrix in matrices:
        while left := matrix.strips_left:
            matrix.pack(pool, min(step, left))


def results(pool: _native.Pool, matrices: Matrices, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, start: float = 0.0) -> np.ndarray:
    out = np.full(x.shape, start, np.float32)
    pool.experts(*matrices, address(x), len(x), address(ids), address(weights), ids.shape[1], address(out))
    return out


def without_nodes(experts: Experts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, isa: str = BEST) -> np.ndarray:
    with open_pool(isa) as pool:
        matrices = experts.matrices()
        pack(pool, matrices)
        return results(pool, matrices, x, ids, weights)


def magnitudes(experts: Experts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The sum of the magnitudes of down's terms, [n, hidden]; gated values that were rounded to int8 are less than a tenth larger, all together."""
    down = np.abs(experts.down.values - experts.down.offsets) + np.abs(experts.down.offsets)
    gate, up, down = (values.reshape(experts.count, -1, values.shape[1]) for values in (experts.gate.values, experts.up.values, down))
    total = np.zeros(x.shape)
    for token, chosen in enumerate(ids):
        for expert, weight in zip(chosen, weights[token], strict=True):
            g, u = gate[expert] @ x[token], up[expert] @ x[token]
            total[token] += down[expert] @ np.abs(g / (1 + np.exp(-g)) * u * weight)
    return 1.1 * total


def check_slices(experts: Experts, result: np.ndarray, same: np.ndarray, call: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    terms = call[1].shape[1] * 2 * experts.width / (1 if experts.down.type_id in FLOAT_TYPES else 16) + max(NODES)
    bound = 2 * rounding(terms) * magnitudes(experts, *call)
    assert (np.abs(result - same) <= bound).all(), np.max(np.abs(result - same) / bound)


# --- results -----------------------------------------------------------------


def width_of(type_id: Type) -> int:
    """Five super-blocks, which neither 2 nor 4 nodes can share without a cut; eleven blocks of 32, and a width that is no multiple of 32."""
    return {1: 360, 32: 352, 256: 1280}[block_values(type_id)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type_id", TYPES, ids=lambda t: t.name)
def test_slices_of_every_format(isa: str, type_id: Type) -> None:
    experts = Experts.random([type_id] * 3, 3, 256, width_of(type_id), seed=1)
    for n in (1, 12):  # too few tokens for bf16 tiles
        call = draw(n, 256, 3, 2, seed=n)
        same = without_nodes(experts, *call, isa)
        for count in NODES:
            with open_nodes(count, isa=isa) as pool:
                check_slices(experts, results(pool, spread(pool, experts), *call), same, call)


@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, down) for down in (Type.Q2_K, Type.Q4_K, Type.Q6_K, Type.IQ4_XS)], ids=lambda types: types[2].name)
def test_slices_by_bf16_tiles(types: Sequence[Type]) -> None:
    """Opened weights are scaled by what the whole row, or the slice of it, needs; both results are within the 0.5 % that tiles may cost."""
    experts, call = Experts.random(types, 2, 256, 768, seed=1), draw(40, 256, 2, 2, seed=1)
    same = without_nodes(experts, *call, "amx_emulated")
    for count in NODES:
        with open_nodes(count, isa="amx_emulated") as pool:
            result = results(pool, spread(pool, experts), *call)
        assert np.linalg.norm(result - same) <= 2 * 0.005 * np.linalg.norm(same)


@pytest.mark.parametrize(
    ("types", "hidden", "width"),
    [
        ((Type.Q4_K, Type.Q4_K, Type.Q8_0), 256, 1408),  # V2-Lite: down cannot be Q4_K
        ((Type.Q4_K, Type.Q4_K, Type.Q6_K), 512, 768),  # Qwen3: three super-blocks
        ((Type.IQ2_XXS, Type.IQ1_S, Type.Q2_K), 256, 1792),  # seven: whole ones and parts
        ((Type.Q4_K, Type.IQ3_S, Type.IQ2_S), 256, 768),  # three that cannot be cut: a fourth node has none
        ((Type.F32, Type.F16, Type.Q3_K), 40, 256),  # three strips of down, the last of 8 rows
        ((Type.F32, Type.Q4_0, Type.IQ4_XS), 96, 512),
        ((Type.F16, Type.F32, Type.BF16), 24, 40),  # slices of 32 and 8 columns, and two of none
        ((Type.F32, Type.F32, Type.F32), 17, 3),
    ],
)
@pytest.mark.parametrize("count", NODES)
def test_slices_of_many_shapes(types: Sequence[Type], hidden: int, width: int, count: int) -> None:
    experts = Experts.random(types, 6, hidden, width, seed=2)
    for n in (1, 2, 9, 40):
        call = draw(n, hidden, 6, 3, seed=n)
        with open_nodes(count, 2) as pool:
            check_slices(experts, results(pool, spread(pool, experts), *call), without_nodes(experts, *call), call)


@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, Type.Q6_K), (Type.F16,) * 3, (Type.IQ2_XS,) * 3], ids=lambda types: types[0].name)
@pytest.mark.parametrize("count", NODES)
def test_copies_give_the_same_bits(types: Sequence[Type], count: int) -> None:
    experts = Experts.random(types, 5, 256, 512, seed=3)
    for n in (1, 7, 60):
        call = draw(n, 256, 5, 2, seed=n)
        with open_nodes(count, 2) as pool:
            matrices = spread(pool, experts, copies=True)
            assert [part[1:] for part in matrices[2].parts] == [(matrices[2].nbytes // count, 256, 512)] * count
            np.testing.assert_array_equal(results(pool, matrices, *call), without_nodes(experts, *call))


@pytest.mark.parametrize("wiped", [0, 1])
def test_each_nodes_threads_read_their_own_copy(wiped: int) -> None:
    """With one of two copies wiped out, what its node's threads computed is 0, and what the other's computed is not: both turn up before long."""
    experts = Experts.random((Type.Q8_0,) * 3, 3, 256, 512, seed=3)
    call = draw(200, 256, 3, 2, seed=1)
    seen: set[bool] = set()
    with open_nodes(2) as pool:
        matrices = spread(pool, experts, copies=True)
        place, nbytes, _, _ = matrices[2].parts[wiped]
        ctypes.memset(place, 0, nbytes)
        for _ in range(300):
            seen |= set((results(pool, matrices, *call) != 0).ravel().tolist())
            if len(seen) == 2:
                break
    assert seen == {False, True}


@pytest.mark.parametrize("types", [(Type.Q4_K, Type.Q4_K, Type.Q5_K), (Type.F32,) * 3], ids=["quantised", "float"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("n", [1, 3, 30])
def test_slices_give_the_same_bits_again_and_again(types: Sequence[Type], count: int, n: int) -> None:
    """Whoever comes last adds the nodes' sums up, in their order; and with any number of threads."""
    experts, call, found = Experts.random(types, 8, 256, 768, seed=4), draw(n, 256, 8, 5, seed=5), []
    for threads in (1, 2, 3):
        with open_nodes(count, threads) as pool:
            matrices = spread(pool, experts)
            found += [results(pool, matrices, *call) for _ in range(5)]
    assert all((result == found[0]).all() for result in found[1:])


@pytest.mark.parametrize("count", [2, 4])
def test_one_hot_expert_and_eight_cold_ones(count: int) -> None:
    experts = Experts.random((Type.Q4_K, Type.Q4_K, Type.Q6_K), 9, 256, 768, seed=6)
    x, _, weights = draw(500, 256, 9, 1, seed=7)
    hot = x, np.full((500, 1), 4, np.int32), weights
    cold = draw(1, 256, 9, 8, seed=8)
    with open_nodes(count, 3) as pool:
        matrices = spread(pool, experts)
        for call in (hot, cold):
            check_slices(experts, results(pool, matrices, *call), without_nodes(experts, *call), call)


def test_the_sum_is_added_to_what_is_there() -> None:
    experts = Experts.random([Type.F32] * 3, 4, 24, 96, seed=1)
    with open_nodes(2) as pool:
        matrices = spread(pool, experts)
        for n in (1, 5):
            call = draw(n, 24, 4, 2, seed=n)
            np.testing.assert_allclose(results(pool, matrices, *call, start=5.0), results(pool, matrices, *call) + 5, rtol=1e-5, atol=1e-5)


def test_an_expert_twice_counts_twice() -> None:
    experts = Experts.random([Type.F32] * 3, 4, 24, 96, seed=1)
    x, ids, weights = draw(1, 24, 4, 3, seed=1)
    ids[:, 2] = ids[:, 0]
    with open_nodes(2) as pool:
        check_slices(experts, results(pool, spread(pool, experts), x, ids, weights), without_nodes(experts, x, ids, weights), (x, ids, weights))


# --- slices ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_id", "width", "widths"),
    [
        (Type.Q4_K, 2048, {1: [2048], 2: [1024] * 2, 4: [512] * 4}),
        (Type.Q4_K, 1536, {2: [768] * 2, 4: [384] * 4}),
        (Type.Q6_K, 768, {2: [384] * 2, 4: [128, 128, 256, 256]}),
        (Type.IQ4_XS, 256, {2: [128] * 2, 4: [64] * 4}),
        (Type.Q8_0, 1408, {2: [704] * 2, 4: [352] * 4}),
        (Type.Q5_0, 352, {2: [192, 160], 4: [96, 96, 96, 64]}),
        (Type.MXFP4, 32, {2: [32, 0]}),
        (Type.IQ2_XXS, 2048, {2: [1024] * 2, 4: [512] * 4}),
        (Type.IQ1_M, 768, {2: [512, 256], 4: [256, 256, 256, 0]}),
        (Type.F32, 40, {2: [32, 8], 4: [32, 0, 8, 0]}),
        (Type.BF16, 352, {2: [192, 160]}),
    ],
    ids=lambda value: value.name if isinstance(value, Type) else None,
)
def test_the_split_is_even_and_as_expected(type_id: Type, width: int, widths: dict[int, list[int]]) -> None:
    experts = Experts.random([Type.F32, Type.F32, type_id], 2, 64, width, seed=1)
    for count, expected in widths.items():
        with open_nodes(count) as pool:
            gate, up, down = spread(pool, experts)
            assert [part[2:] for part in gate.parts] == [part[2:] for part in up.parts] == [(columns, 64) for columns in expected]
            assert [part[2:] for part in down.parts] == [(64, columns) for columns in expected]
            assert [part[1] for part in gate.parts] == [2 * columns * 64 * 4 for columns in expected]
            assert down.nbytes == sum(part[1] for part in down.parts)


def test_a_cut_super_block_costs_its_scales_again() -> None:
    """Q4_K: 128 bytes of codes and 16 of scales for 256 weights, of which each part has all of the scales."""
    experts = Experts.random([Type.F32, Type.F32, Type.Q4_K], 1, 64, 768, seed=1)
    with open_nodes(2) as pool:
        down = spread(pool, experts)[2]
        assert [part[1] for part in down.parts] == [64 * (384 // 2 + 2 * 16)] * 2


# --- memory ------------------------------------------------------------------


def kernel(number: int, *arguments: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(number, *arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def policy_of(place: int) -> tuple[int, int]:
    """Mode and mask of nodes of the page at an address (get_mempolicy with MPOL_F_ADDR)."""
    mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    kernel(239, ctypes.byref(mode), mask, ctypes.c_ulong(1024), ctypes.c_ulong(place), ctypes.c_ulong(2))
    return mode.value, sum(word << 64 * i for i, word in enumerate(mask))


def nodes_of(place: int, nbytes: int) -> set[int]:
    """Where the pages lie (move_pages that moves nothing)."""
    pages = (ctypes.c_void_p * -(-nbytes // mmap.PAGESIZE))(*range(place, place + nbytes, mmap.PAGESIZE))
    nodes = (ctypes.c_int * len(pages))(*[-1] * len(pages))
    kernel(279, 0, ctypes.c_ulong(len(pages)), pages, None, nodes, 0)
    return set(nodes)


@pytest.mark.skipif(bool(_native.bind_error(MEMORY)), reason=f"the kernel lets no pages be bound here: {_native.bind_error(MEMORY)}")
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("count", NODES)
def test_the_kernel_says_that_pages_are_bound_to_the_node_and_lie_there(count: int, copies: bool) -> None:
    bind = 2
    experts = Experts.random((Type.Q4_K, Type.IQ2_XXS, Type.F16), 4, 256, 1024, seed=1)
    with open_nodes(count) as pool:
        matrices = spread(pool, experts, copies=copies)
    places = [part[:2] for matrix in matrices for part in matrix.parts]
    assert len(places) == 3 * count
    for place, nbytes in places:
        assert policy_of(place) == (bind, 1 << MEMORY)
        assert nodes_of(place, nbytes) == {MEMORY}


def test_memory_without_spreading_is_not_bound() -> None:
    """The test above can fail."""
    anywhere = np.ones(1 << 16, np.uint8)
    assert policy_of(address(anywhere))[0] == 0


def test_a_node_that_is_not_there_cannot_be_bound_to() -> None:
    assert _native.bind_error(-1)
    assert _native.bind_error(1023)
    assert _native.bind_error(10**6)


# --- packing, and what is refused --------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_packing_goes_on_where_it_stopped_and_experts_work_meanwhile(copies: bool) -> None:
    experts = Experts.random((Type.Q4_K, Type.F16, Type.Q8_0), 3, 256, 352, seed=1)
    call = draw(3, 256, 3, 2, seed=1)
    with open_nodes(2) as pool:
        whole = results(pool, spread(pool, experts, copies=copies), *call)
        matrices = experts.matrices()
        before = results(pool, matrices, *call)
        pool.spread(*matrices, [MEMORY] * 2, copies)
        np.testing.assert_array_equal(results(pool, matrices, *call), before)
        assert matrices[1].strips_left == 3 * 352 // 16  # floats are moved to their nodes too
        pack(pool, matrices, step=5)
        assert [matrix.in_tiles for matrix in matrices] == [True, False, True]
        np.testing.assert_array_equal(results(pool, matrices, *call), whole)


def test_a_pool_of_several_nodes_does_all_the_rest_as_well() -> None:
    weights = random_weights(Type.Q8_0, 80, 64, np.random.default_rng(1))
    x, out = np.ones((3, 64), np.float32), np.empty((3, 80), np.float32)
    experts = Experts.random([Type.Q8_0] * 3, 4, 64, 96, seed=1)
    call = draw(9, 64, 4, 2, seed=1)
    with open_nodes(4) as pool:
        pool.linear([matrix_of(weights)], address(x), 3, [address(out)], False)
        np.testing.assert_allclose(out, x @ weights.values.T, rtol=1e-4, atol=1e-2)
        np.testing.assert_array_equal(results(pool, experts.matrices(), *call), run_alone(experts, *call))


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_the_caller_keeps_to_its_node() -> None:
    """When another program takes the caller's core, it would change places with a worker, but not with one of another node."""
    pool = _native.Pool(CPUS[:2], BEST, nodes=[0, 1])
    weights = random_weights(Type.Q8_0, 1024, 512, np.random.default_rng(1))
    x, out = np.ones((1, 512), np.float32), np.empty((1, 1024), np.float32)

    def drive() -> set[int]:
        pool.pin_caller()
        with busy(CPUS[0]):
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and os.sched_getaffinity(0) == {CPUS[0]}:
                pool.linear([matrix_of(weights)], address(x), 1, [address(out)], False)
        return os.sched_getaffinity(0)

    with ThreadPoolExecutor(1) as driver:
        assert driver.submit(drive).result() == {CPUS[0]}
    pool.close()


def matrix_of(weights: Weights) -> _native.Matrix:
    return _native.Matrix(int(weights.type_id), *weights.values.shape, weights.data)


def run_alone(experts: Experts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    with open_pool(BEST, 1) as pool:
        return run(pool, experts, x, ids, weights)


def test_nodes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="each CPU needs a node"):
        _native.Pool(CPUS[:1], BEST, nodes=[0, 0])
    with pytest.raises(ValueError, match="node 1 has no thread"):
        _native.Pool([CPUS[0]] * 2, BEST, nodes=[0, 2])
    with pytest.raises(ValueError, match="node 16, but at most 16 nodes are supported"):
        _native.Pool([CPUS[0]], BEST, nodes=[16])


def test_calls_that_do_not_fit_are_refused() -> None:
    experts = Experts.random([Type.F32] * 3, 2, 32, 64, seed=1)
    x, ids, weights = draw(1, 32, 2, 1, seed=1)
    out = np.zeros((1, 64), np.float32)
    with open_nodes(2) as pool, open_pool(BEST) as other:
        gate, up, down = experts.matrices()
        with pytest.raises(ValueError, match="memory of 1 nodes, but the pool has 2"):
            pool.spread(gate, up, down, [MEMORY], False)
        pool.spread(gate, up, down, [MEMORY] * 2, False)
        with pytest.raises(ValueError, match="can be spread once, before it is packed"):
            pool.spread(gate, up, down, [MEMORY] * 2, False)
        pack(pool, [gate])
        with pytest.raises(ValueError, match="gate, up and down must all be packed after they were spread, or none"):
            results(pool, (gate, up, down), x, ids, weights)
        pack(pool, [up, down])
        with pytest.raises(ValueError, match="the experts are spread over 2 nodes, but the pool has 1"):
            results(other, (gate, up, down), x, ids, weights)
        with pytest.raises(ValueError, match="a matrix that is spread over nodes serves experts alone"):
            pool.linear([gate], address(x), 1, [address(out)], False)
