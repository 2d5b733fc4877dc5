"""Every family against transformers on the same (dequantised) weights; prefill at once, in chunks and token by token.

Tolerances, as ||a - b|| / ||b|| over all logits: 1e-4 for float weights (float32 sums over a few layers), 2e-2 with int8 activations (an
activation is rounded to 1/127 of its block's largest value, about 0.5 % a product, which some layers of random weights carry to the logits).
Models with experts run under the oracle's choices (see oracle.py); that our own are the same but for near-ties is a test of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.config import EngineConfig
from server.engine.gguf.reader import GGUFFile
from server.engine.kv_cache import PAGE_SIZE
from server.engine.layers.reference import ReferenceOps
from server.engine.loader import load_model
from server.engine.models.registry import FAMILIES
from server.engine.native import NativeOps, open_ops
from server.engine.ops import Routing
from server.engine.protocol import Step
from server.types import SamplingParams
from tests.engine.oracle import PAGES, TOKENS, Answer, ForcedOps, Runner, ask, relative, scores
from tests.engine.tiny_families import TINY
from tests.engine.tiny_models import write_tiny
from tests.native.blocks import FLOAT_TYPES, TYPES

GROUPED_QUERY = {
    "as drawn": {},
    "odd heads": {"heads": 3, "kv_heads": 1, "head_dim": 24, "hidden": 96, "ffn": 160},
    "one layer, tied": {"layers": 1, "heads": 4, "kv_heads": 4, "tie": True},
}
EXPERTS = {**GROUPED_QUERY, "5 of 6, width 352": {"num_experts": 6, "num_experts_per_tok": 5, "moe_intermediate_size": 352}}
LATENT = {
    "as drawn": {},
    "odd heads, no q_lora": {"heads": 3, "kv_heads": 3, "hidden": 96, "ffn": 160, "qk_nope_head_dim": 40, "v_head_dim": 24, "q_lora_rank": None},
    "one layer, one group, tied": {"layers": 1, "tie": True, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "5 of 6, width 352, no shared": {
        "n_routed_experts": 6, "num_experts_per_tok": 5, "moe_intermediate_size": 352, "n_group": 2, "topk_group": 2, "n_shared_experts": 0,
    },
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3"), GROUPED_QUERY),
    **dict.fromkeys(("qwen2moe", "qwen3moe"), EXPERTS),
    "mixtral": {**GROUPED_QUERY, "5 of 6, width 352": {"num_local_experts": 6, "num_experts_per_tok": 5, "ffn": 352}},
    "glm4moe": {
        **GROUPED_QUERY,
        "one layer, tied": {**GROUPED_QUERY["one layer, tied"], "first_k_dense_replace": 0},
        "no head norms, no shared": {"use_qk_norm": False, "n_shared_experts": 0},
        "groups": {"n_group": 4, "topk_group": 2},
    },
    **dict.fromkeys(("deepseek-v2", "deepseek-v3"), LATENT),
}
CASES = [pytest.param(name, fields, id=f"{name}-{shape}") for name in TINY for shape, fields in SHAPES[name].items()]
# Rows that K-quants fill, but for MLA's k_b, of 32, and the experts' down, of 352: these fall back to Q5_0, as in real files.
WIDE = {"hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 32, "ffn": 512}
WIDE_LATENT = {
    "layers": 2, "hidden": 256, "heads": 8, "kv_heads": 8, "ffn": 512, "kv_lora_rank": 256, "q_lora_rank": 256,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 352,
}  # fmt: skip


def wide(name: str) -> dict[str, Any]:
    return WIDE_LATENT if name.startswith("deepseek") else {**WIDE, "layers": 2}


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    ops = open_ops(2)
    yield ops
    ops.close()


def test_every_architecture_is_covered() -> None:
    assert {tiny.architecture for tiny in TINY.values()} == set(FAMILIES)


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_float32_logits_are_those_of_transformers(name: str, fields: dict[str, Any], ops: NativeOps, tmp_path: Path) -> None:
    answer = ask(write_tiny(tmp_path / "m.gguf", name, **fields))
    runner = Runner(tmp_path / "m.gguf", ForcedOps(ops, answer))
    for chunk in (512, 7):
        assert relative(runner.run(chunk), answer.logits) < 1e-4, chunk


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_the_plain_twin_is_exact(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    answer = ask(write_tiny(tmp_path / "m.gguf", name, **fields).double())
    runner = Runner(tmp_path / "m.gguf", ForcedOps(ReferenceOps(torch.float64), answer))
    assert relative(runner.run(), answer.logits) < 2e-6  # float32 between layers


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, kind, id=f"{name}-{kind.name}") for name in TINY for kind in (TYPES if name == "deepseek-v3" else (T.F32, T.BF16, T.Q4_K))],
)
def test_each_type_is_within_its_rounding(name: str, kind: T, ops: NativeOps, tmp_path: Path) -> None:
    def quant(tensor: str) -> int:
        return T.F32 if "attn_output" in tensor else kind

    answer = ask(write_tiny(tmp_path / "m.gguf", name, quant=quant, **wide(name)))
    runner = Runner(tmp_path / "m.gguf", ForcedOps(ops, answer))
    for chunk in (512, 1):
        assert relative(runner.run(chunk), answer.logits) < (1e-4 if kind in FLOAT_TYPES else 2e-2), chunk


@pytest.mark.parametrize("name", ["llama", "qwen2moe", "deepseek-v3"])
@pytest.mark.parametrize("kind", [T.F32, T.Q4_1, T.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_prefill_chunks_and_decode_agree(name: str, kind: T, cache_type: str, ops: NativeOps, tmp_path: Path) -> None:
    answer = ask(write_tiny(tmp_path / "m.gguf", name, quant=lambda _: kind, **wide(name)))
    runner = Runner(tmp_path / "m.gguf", ForcedOps(ops, answer), cache_type)
    at_once = runner.run()
    # Floats: sums in another order, and a half-float cache rounds those alike but for the last bit. With int8 activations a difference of 1e-7
    # tips a few roundings, those tip more in the next product, and after some layers the two differ as much as each differs from the truth.
    # That the products themselves agree to float32 rounding is held in tests/native.
    tolerance = 2e-2 if kind != T.F32 else 1e-5 if cache_type == "f32" else 1e-3
    for chunk in (1, 7, 64):
        assert relative(runner.run(chunk), at_once) < tolerance, chunk


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("llama", "qwen2", "qwen3")])
@pytest.mark.parametrize("kind", [T.F32, T.Q4_0], ids=lambda t: t.name)
def test_our_experts_are_the_oracles_but_for_near_ties(name: str, kind: T, ops: NativeOps, tmp_path: Path) -> None:
    """Under the oracle's choices the layers before are alike, so a router's scores differ by their rounding, and only what that decides may differ."""
    answer = ask(write_tiny(tmp_path / "m.gguf", name, quant=lambda _: kind, **wide(name)))
    forced = ForcedOps(ops, answer)
    Runner(tmp_path / "m.gguf", forced).run()
    assert len(forced.routings) == len(answer.ids) > 0
    for layer, routing in enumerate(forced.routings):
        assert len(set(forced.ids[layer].flatten().tolist())) > routing.top_k  # all tokens on the same experts would show nothing
        differ = (forced.ids[layer].sort(-1).values != answer.ids[layer].sort(-1).values).any(-1)
        theirs, ours = (scores(routing, logits[layer]) for logits in (answer.router_logits, forced.router_logits))
        error = (theirs - ours).abs().amax(-1)
        # A group's score is the sum of group_top scores; two neighbours can move towards each other by the error each.
        assert bool((margins(routing, theirs) < 2 * routing.group_top * error)[differ].all())
        assert int(differ.sum()) <= (0 if kind == T.F32 else len(TOKENS) // 4)


def margins(routing: Routing, unbiased: torch.Tensor) -> torch.Tensor:
    """How near each token's choice [n] is to another one: the least gap, between groups or between experts, across which it was decided."""
    biased = unbiased if routing.bias is None else unbiased + routing.bias.double()
    least = torch.full((len(biased),), torch.inf, dtype=torch.float64)
    if routing.groups > routing.groups_used:
        groups = biased.view(len(biased), routing.groups, -1)
        worth, order = groups.topk(routing.group_top).values.sum(-1).sort(-1, descending=True)
        least = worth[:, routing.groups_used - 1] - worth[:, routing.groups_used]
        biased = groups.gather(1, order[:, : routing.groups_used, None].expand(-1, -1, groups.shape[2])).flatten(1)
    if biased.shape[1] > routing.top_k:
        ranked = biased.sort(-1, descending=True).values
        least = torch.minimum(least, ranked[:, routing.top_k - 1] - ranked[:, routing.top_k])
    return least


@pytest.mark.parametrize("name", list(TINY))
def test_a_file_loads_and_runs_end_to_end(name: str, tmp_path: Path) -> None:
    """Through load_model, with our own choice of experts; a step draws from its last position."""
    answer: Answer = ask(write_tiny(tmp_path / "m.gguf", name))
    loaded = load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=2, cache_lens=3 * PAGE_SIZE, cache_type="f32"))
    engine = loaded.engine
    try:
        engine.start()
        assert relative(engine.logits(Step(TOKENS, 0, PAGES, None)), answer.logits) < 1e-4
        sampler = engine.new_sampler(SamplingParams(temperature=0.0), TOKENS)
        assert engine.step(Step(TOKENS[:20], 0, PAGES, None)) is None
        drawn = engine.step(Step(TOKENS[20:], 20, PAGES, sampler))
        assert drawn is not None
        assert drawn.token_id == int(answer.logits[-1].argmax())
    finally:
        engine.close()


def test_f16_cache_is_near_the_f32_cache(ops: NativeOps, tmp_path: Path) -> None:
    for name in ("llama", "deepseek-v3"):
        answer = ask(write_tiny(tmp_path / "m.gguf", name))
        half, full = (Runner(tmp_path / "m.gguf", ForcedOps(ops, answer), cache_type).run(64) for cache_type in ("f16", "f32"))
        assert 0 < relative(half, full) < 2e-3  # half floats keep 11 bits: 2^-11 a value
