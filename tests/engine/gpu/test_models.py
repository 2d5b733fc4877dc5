"""Every family on the GPU stage, against transformers on the same (dequantised) weights: prefill at once, in chunks, and token by token.

Tolerances, as ||a - b|| / ||b|| over all logits: 1e-4 where weights and cache are float32, since nothing is rounded then; 2e-2 for quantised weights, whose
prompts are rounded to bfloat16 (2^-9 an operand) or, in the experts on the CPU, to int8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGMLQuantizationType as T

from server.engine.gpu.ops import GpuOps
from tests.engine.gpu.conftest import DEVICE
from tests.engine.oracle import TOKENS, ForcedOps, Runner, ask, relative
from tests.engine.test_models import CASES, wide
from tests.engine.tiny_families import TINY
from tests.engine.tiny_models import write_tiny


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_float32_logits_are_those_of_transformers(name: str, fields: dict[str, Any], ops: GpuOps, tmp_path: Path) -> None:
    answer = ask(write_tiny(tmp_path / "m.gguf", name, **fields))
    runner = Runner(tmp_path / "m.gguf", ForcedOps(ops, answer), laid_out=True)
    for chunk in (512, 13, 7):
        assert relative(runner.run(chunk), answer.logits) < 1e-4, chunk
    assert relative(runner.run(1, TOKENS[:BEGINNING]), answer.logits[:BEGINNING]) < 1e-4


KINDS = (T.BF16, T.F16, T.Q4_K, T.Q6_K, T.Q5_K, T.Q8_0, T.Q5_0, T.IQ4_XS, T.IQ2_XS)
FEWER = (T.F16, T.Q4_K, T.IQ2_XS)  # on a CPU, where the twins take their time
BEGINNING = 8  # tokens that are run one by one


@pytest.mark.parametrize("kind", KINDS if DEVICE.type == "cuda" else FEWER, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["qwen3moe", "deepseek-v2", "deepseek-v3"])
def test_each_type_is_within_its_rounding(name: str, kind: T, ops: GpuOps, tmp_path: Path) -> None:
    def quant(tensor: str) -> int:
        return T.F32 if "attn_output" in tensor else kind

    answer = ask(write_tiny(tmp_path / "m.gguf", name, quant=quant, **wide(name)))
    runner = Runner(tmp_path / "m.gguf", ForcedOps(ops, answer), cache_type="bf16", laid_out=True)
    assert relative(runner.run(), answer.logits) < 2e-2
    assert relative(runner.run(1, TOKENS[:BEGINNING]), answer.logits[:BEGINNING]) < 2e-2


def test_every_family_has_a_case() -> None:
    assert {name for name, *_ in (case.values for case in CASES)} == set(TINY)
