"""YaRN's frequencies against transformers' own, and whole models beyond the context that they were trained for at first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.engine.layers.rope import rotation
from server.engine.models.config import Yarn, yarn_mscale
from server.engine.native import NativeOps, open_ops
from tests.engine.oracle import TOKENS, ForcedOps, Runner, ask, relative
from tests.engine.tiny_models import write_tiny

DEEPSEEK = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
QWEN = {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
KIMI = {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0, "rope_theta": 5e4, "mscale": 1.0, "mscale_all_dim": 1.0}

TURNS_LITTLE = {"factor": 4.0, "original_max_position_embeddings": 131072}  # each pair more than once: the ramp ends behind the last one


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    ops = open_ops(2)
    yield ops
    ops.close()


@pytest.mark.parametrize("rope", [DEEPSEEK, QWEN, KIMI, TURNS_LITTLE, {"factor": 8.0, "original_max_position_embeddings": 32}])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_yarn_turns_as_in_transformers(rope: dict[str, float], dim: int) -> None:
    base, factor = rope.get("rope_theta", 1e4), rope["factor"]
    config = LlamaConfig(head_dim=dim, max_position_embeddings=163840, rope_parameters={"rope_type": "yarn", "rope_theta": base, **rope})
    inverse, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    yarn = Yarn(
        factor=factor,
        original_context=int(rope["original_max_position_embeddings"]),
        beta_fast=rope.get("beta_fast", 32.0),
        beta_slow=rope.get("beta_slow", 1.0),
        attention_factor=1.0 if "mscale" in rope else yarn_mscale(factor),
    )
    table = rotation(dim, base, 4, interleaved=False, yarn=yarn).table[3]
    angles = 3 * inverse.double()
    assert attention_factor == pytest.approx(yarn.attention_factor)
    # float32 frequencies there: 2^-24 of an angle of up to 3
    torch.testing.assert_close(table.double(), attention_factor * torch.stack((angles.cos(), angles.sin()), -1), atol=4e-7, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_far_out_are_exact(interleaved: bool) -> None:
    """To the rounding of cos and sin themselves: in float32 an angle of 130,000 is off by 0.004."""
    positions, dim, base = 131072, 8, 1e4
    table = rotation(dim, base, positions, interleaved=interleaved).table
    for position in (1, 4095, 99_999, 131_071):
        expected = [(math.cos(position * base ** (-2 * i / dim)), math.sin(position * base ** (-2 * i / dim))) for i in range(dim // 2)]
        torch.testing.assert_close(table[position].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


SHORT = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("deepseek-v2", {**SHORT, "mscale": 0.707, "mscale_all_dim": 0.707}),
        ("deepseek-v3", {**SHORT, "mscale": 1.0, "mscale_all_dim": 1.0}),
        ("deepseek-v3", SHORT),  # nothing said of mscale: cos and sin are scaled as in the paper
        ("qwen2", SHORT),
        ("qwen3moe", {**SHORT, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}),
        ("glm4moe", SHORT),
    ],
)
def test_positions_beyond_the_original_context(name: str, rope: dict[str, Any], ops: NativeOps, tmp_path: Path) -> None:
    answer = ask(write_tiny(tmp_path / "m.gguf", name, rope=rope))
    assert len(TOKENS) > 4 * rope["original_max_position_embeddings"]
    assert relative(Runner(tmp_path / "m.gguf", ForcedOps(ops, answer)).run(64), answer.logits) < 1e-4
    plain = ask(write_tiny(tmp_path / "p.gguf", name))
    assert relative(answer.logits, plain.logits) > 0.05  # the same weights without yarn answer something else
