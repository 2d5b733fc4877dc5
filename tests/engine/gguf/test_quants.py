"""The numpy reference: round trips within what each format allows, packing against gguf's own unpacking, random blocks of the asked spread."""

from __future__ import annotations

import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from server.engine.gguf.quants import dequantize, quantize, random_blocks, row_bytes

T = GGMLQuantizationType
# ||x - y|| / ||x|| of a Gaussian: for a grid of step s it is s / sqrt(12) and some for rounding the scales; s is the range of a sub-block
# (3.9 to 4.1 sigma of 32 values, twice 1.9 of 16) over the number of steps.
ERROR = {T.F32: 0.0, T.F16: 2.1e-4, T.BF16: 1.7e-3, T.Q4_0: 0.088, T.Q4_1: 0.080, T.Q5_0: 0.044, T.Q5_1: 0.039, T.Q8_0: 0.0055}
ERROR |= {T.Q4_K: 0.075, T.Q5_K: 0.0375, T.Q6_K: 0.0172}
ERROR |= {T.Q2_K: 0.275, T.Q3_K: 0.147, T.IQ4_NL: 0.075, T.IQ4_XS: 0.076, T.MXFP4: 0.12}  # the last two have steps of unequal size
K_QUANTS = [T.Q4_K, T.Q5_K, T.Q6_K]
OURS = [*K_QUANTS, T.Q2_K, T.Q3_K, T.IQ4_NL, T.IQ4_XS]
FIELD_NOTES = [(0, 1, 4), (1, 1, 2), (30, 1, 2), (2, 32, 18), (3, 32, 20), (6, 32, 22), (7, 32, 24), (8, 32, 34)]
FIELD_NOTES += [(12, 256, 144), (13, 256, 176), (14, 256, 210)]
FIELD_NOTES += [(10, 256, 84), (11, 256, 110), (16, 256, 66), (17, 256, 74), (18, 256, 98), (19, 256, 50), (20, 32, 18), (21, 256, 110), (22, 256, 82)]
FIELD_NOTES += [(23, 256, 136), (29, 256, 56), (39, 32, 17)]
RANDOM = [T(number) for number, _, _ in FIELD_NOTES]  # every type that the kernels run


def error(x: np.ndarray, kind: GGMLQuantizationType) -> float:
    blocks = quantize(x, kind)
    assert blocks.dtype == np.uint8
    assert blocks.shape == (*x.shape[:-1], row_bytes(kind, x.shape[-1]))
    y = dequantize(blocks, kind, x.shape)
    assert (y.dtype, y.shape) == (np.float32, x.shape)
    return float(np.linalg.norm(x - y) / np.linalg.norm(x))


@pytest.mark.parametrize(("type_id", "block", "nbytes"), FIELD_NOTES)
def test_row_bytes(type_id: int, block: int, nbytes: int) -> None:
    assert row_bytes(type_id, 3 * block) == 3 * nbytes
    if block > 1:
        with pytest.raises(ValueError, match=f"a row of {block + 1} values .*blocks of {block}"):
            row_bytes(type_id, block + 1)


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("std", [1e-2, 1.0, 100.0])
def test_round_trip_of_a_gaussian(kind: GGMLQuantizationType, std: float) -> None:
    x = np.random.default_rng(2).normal(0, std, (3, 7, 512)).astype(np.float32)
    assert error(x, kind) <= ERROR[kind]


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_of_awkward_values(kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(3)
    sparse = np.where(rng.random((4, 256)) < 0.02, rng.normal(size=(4, 256)), 0).astype(np.float32)
    for x, bound in [(sparse, 0.1), (rng.random((4, 256), np.float32) + 1, 0.05), (-rng.random((4, 256), np.float32), 0.05), (np.full((1, 256), 3.5), 0.02)]:
        assert error(x, kind) < bound


@pytest.mark.parametrize("kind", OURS)
def test_our_quantisers_treat_each_block_alone(kind: GGMLQuantizationType) -> None:
    """One block between others, scaled by powers of two, has the very same integers: nothing leaks between blocks or sub-batches."""
    x = np.random.default_rng(4).normal(size=(1, 256)).astype(np.float32)
    scales = np.array([[1], [4], [1 / 8], [64]], np.float32)
    together = dequantize(quantize(x * scales, kind), kind, (4, 256))
    np.testing.assert_array_equal(together, dequantize(quantize(x, kind), kind, (1, 256)) * scales)
    assert not dequantize(quantize(np.zeros((2, 256)), kind), kind, (2, 256)).any()


def test_k_quants_go_beyond_one_batch() -> None:
    x = np.random.default_rng(5).normal(size=(4097, 256)).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, T.Q4_K)[-1], quantize(x[-1:], T.Q4_K)[0])


def test_q6_k_puts_each_value_where_gguf_looks_for_it() -> None:
    """Integers -32 .. 31 times a scale of 1 survive exactly, whatever their place: a shuffled packing would not."""
    q = np.tile(np.random.default_rng(6).permutation(np.arange(-32, 32)), 4).astype(np.float32).reshape(16, 16)
    q[:, 0] = -32  # each sub-block spans the grid, so its scale is 1
    np.testing.assert_allclose(dequantize(quantize(q.reshape(1, 256), T.Q6_K), T.Q6_K, (1, 256)), q.reshape(1, 256), atol=1e-6)


def test_q3_k_puts_each_value_where_gguf_looks_for_it() -> None:
    """Integers -4 .. 3 times another scale for each 16, all within 6 bits, survive exactly."""
    rng = np.random.default_rng(6)
    q = np.stack([rng.permutation(np.tile(np.arange(-4, 4), 2)) for _ in range(16)]).astype(np.float32)
    x = (q * rng.permutation(np.arange(2, 34, 2))[:, None]).reshape(1, 256)
    np.testing.assert_allclose(dequantize(quantize(x, T.Q3_K), T.Q3_K, (1, 256)), x, atol=1e-4)


def test_q2_k_puts_each_value_where_gguf_looks_for_it() -> None:
    rng = np.random.default_rng(7)
    q = np.stack([rng.permutation(np.tile(np.arange(4), 4)) for _ in range(16)]).astype(np.float32)
    x = (q * rng.permutation(np.r_[1:16, 7])[:, None] - rng.permutation(16)[:, None]).reshape(1, 256)
    np.testing.assert_allclose(dequantize(quantize(x, T.Q2_K), T.Q2_K, (1, 256)), x, atol=1e-4)


@pytest.mark.parametrize("kind", [T.IQ4_NL, T.IQ4_XS])
def test_iq4_puts_each_value_where_gguf_looks_for_it(kind: GGMLQuantizationType) -> None:
    """All 16 values twice in each 32, times another scale for each, survive."""
    rng = np.random.default_rng(8)
    table = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    x = (np.stack([rng.permutation(np.tile(table, 2)) for _ in range(8)]) * rng.permutation(np.arange(4, 36, 4))[:, None]).reshape(1, 256)
    np.testing.assert_allclose(dequantize(quantize(x, kind), kind, (1, 256)), x, rtol=1e-3)


@pytest.mark.parametrize(("kind", "codes"), [(T.Q4_K, 16), (T.Q5_K, 32)])
def test_affine_k_quants_put_each_value_where_gguf_looks_for_it(kind: GGMLQuantizationType, codes: int) -> None:
    """Values n * (q - m) with a different n and m for each sub-block, all within 6 bits, survive exactly."""
    rng = np.random.default_rng(7)
    scale = np.array([63, 1, 17, 33, 40, 62, 5, 48], np.float32)[:, None]
    minimum = np.array([0, 5, 63, 31, 32, 1, 50, 16], np.float32)[:, None]
    q = np.stack([rng.permutation(np.resize(np.arange(codes), 32)) for _ in range(8)]).astype(np.float32)
    x = (scale * q - minimum).reshape(1, 256)
    np.testing.assert_allclose(dequantize(quantize(x, kind), kind, (1, 256)), x, atol=1e-3)


def test_types_without_a_quantiser_are_refused() -> None:
    with pytest.raises(ValueError, match="no quantiser for IQ2_XXS"):
        quantize(np.zeros((1, 256)), T.IQ2_XXS)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("std", [0.1, 1.0])
def test_random_blocks_have_mean_zero_and_the_asked_spread(kind: GGMLQuantizationType, std: float) -> None:
    rows, cols = 256, 1024
    blocks = random_blocks(kind, rows, cols, std, np.random.default_rng(8))
    assert (blocks.dtype, blocks.shape) == (np.uint8, (rows, row_bytes(kind, cols)))
    values = dequantize(blocks, kind, (rows, cols))
    assert np.isfinite(values).all()
    # The values of a block share its random scales, so the deviation of the spread is that of the number of blocks, not of values.
    blocks_in_all = rows * cols / GGML_QUANT_SIZES[kind][0]
    assert abs(values.mean()) < 5 * std / np.sqrt(blocks_in_all)
    assert abs(values.std() / std - 1) < 5 / np.sqrt(blocks_in_all)


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q5_K])
def test_random_k_quants_are_centred_in_each_sub_block(kind: GGMLQuantizationType) -> None:
    blocks = random_blocks(kind, 64, 256, 1.0, np.random.default_rng(9))
    scale_index, min_index = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16].copy())  # Q5_K packs them alike
    np.testing.assert_array_equal(scale_index, min_index)
