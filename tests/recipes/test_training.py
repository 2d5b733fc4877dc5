"""Training at the smallest scale: it learns, it resumes exactly, and its parts compute what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from recipes.tiny_r1.data import LEARNT, Packing, batches
from recipes.tiny_r1.evaluate import generate
from recipes.tiny_r1.experts import dense, grouped
from recipes.tiny_r1.fake_quant import q4_k_weights, round_q4_k
from recipes.tiny_r1.model import TinyR1
from recipes.tiny_r1.optimizer import learning_rate, orthogonal
from recipes.tiny_r1.tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, PAD_ID
from recipes.tiny_r1.train import Run, Settings, next_loss, text_mask
from server.engine.gguf.quants import dequantize, quantize
from tests.recipes.conftest import SMALL

SETTINGS = Settings(steps=12, rows=4, length=384, lr=5e-3, kernel="dense", quantised_share=0.0)
WIDE = replace(SMALL, hidden=256, q_lora=256, kv_lora=256, v_dim=128, ffn=256, expert_ffn=256)  # rows that Q4_K takes


def start(tokenizer: Tokenizer) -> Run:
    return Run(SETTINGS, SMALL, tokenizer.to_str(), torch.device("cpu"))


def train(run: Run, steps: int) -> list[float]:
    data = batches(Packing(run.tokenizer, SETTINGS.seed, SETTINGS.rows, SETTINGS.length), run.step, workers=0)
    return [float(run.train_step(next(data))["loss"]) for _ in range(steps)]


def test_the_loss_falls_and_a_resumed_run_goes_on_bit_for_bit(tokenizer: Tokenizer) -> None:
    whole = start(tokenizer)
    losses = train(whole, SETTINGS.steps)
    assert losses[-1] < 0.8 * losses[0]
    first = start(tokenizer)
    train(first, 5)
    resumed = Run.restored(first.state(), torch.device("cpu"))
    assert train(resumed, SETTINGS.steps - 5) == losses[5:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_batches_depend_on_their_number_alone(tokenizer: Tokenizer) -> None:
    packing = Packing(tokenizer.to_str(), 1, 4, 384)
    alone, helped = batches(packing, 3, workers=0), batches(packing, 2, workers=2)
    next(helped)
    for _ in range(3):
        assert np.array_equal(next(alone), next(helped))


def test_only_replies_are_learnt(tokenizer: Tokenizer) -> None:
    batch = next(batches(Packing(tokenizer.to_str(), 0, 16, 384), 0, workers=0))
    tokens, learnt = batch & (LEARNT - 1), batch >= LEARNT
    assert (tokens != PAD_ID).mean() > 0.9
    assert learnt.mean() > 0.4
    assert not learnt[np.isin(tokens, (BOS_ID, PAD_ID, ASSISTANT_ID))].any()
    assert (tokens[:, 0] == BOS_ID).all()
    ends = tokens[learnt & (np.roll(learnt, -1, 1) == 0)]
    assert (ends == EOS_ID).all()


def test_texts_of_a_row_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = TinyR1(SMALL).eval()
    a, b = tokenizer.encode("12+34"), tokenizer.encode("Sort: 3, 2")
    row = torch.tensor([[BOS_ID, *a.ids, BOS_ID, *b.ids]])
    alone = torch.tensor([[BOS_ID, *b.ids]])
    together, _ = model(row, text_mask(row))
    apart, _ = model(alone, text_mask(alone))
    torch.testing.assert_close(together[:, -alone.shape[1] :], apart, rtol=1e-4, atol=1e-5)


def test_losses_look_one_and_two_ahead() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    learnt = torch.tensor([[False, False, True, True, True]])
    for ahead in (1, 2):
        right = torch.nn.functional.one_hot(tokens.roll(-ahead, 1), 8) * 100.0
        assert next_loss(right, tokens, learnt, ahead) < 1e-6
        assert next_loss(right, tokens, learnt, 3 - ahead) > 10


def test_generation_with_a_cache_is_generation_without(tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    model = TinyR1(SMALL).eval()
    prompts = [[BOS_ID, 30, 40], [BOS_ID, *range(50, 70)], [BOS_ID]]
    for prompt, reply in zip(prompts, generate(model, prompts, 8), strict=True):
        ids = list(prompt)
        for token in reply:
            row = torch.tensor([ids])
            assert token == model.logits(model(row, text_mask(row))[0][:, -1]).argmax()
            ids.append(token)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_grouped_experts_compute_what_dense_ones_do(tokens: int) -> None:
    """bfloat16 has 8 bits: sums of products differ by about 2^-8 of their norm."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((tokens, 16), (8, 64, 16), (8, 16, 32)))
    chosen = torch.rand(tokens, 7, generator=generator).topk(3).indices  # the last expert gets nothing
    weights = torch.rand(tokens, 3, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (x, gate_up, down, weights)]
    results = []
    for compute, dtype in ((dense, torch.float32), (grouped, torch.bfloat16)):
        out = compute(x.to(dtype), gate_up.to(dtype), down.to(dtype), chosen, weights)
        results.append([out.float(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    for expected, got in zip(*results, strict=True):
        assert (expected - got).norm() <= 0.03 * expected.norm()


def test_fake_quantisation_is_close_to_the_exporters() -> None:
    weights = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(dequantize(quantize(weights.numpy(), 12), 12, (4, 512)).copy())
    ours = round_q4_k(weights)
    assert (ours - weights).norm() < 1.4 * (theirs - weights).norm()
    model = TinyR1(WIDE)
    before = [param.clone() for param in model.parameters()]
    with q4_k_weights(model, True):
        changed = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert changed > 10
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_muon_makes_orthogonal_updates() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))))
    assert 0.5 < values.min() <= values.max() < 1.4


def test_the_schedule_warms_up_holds_and_decays() -> None:
    rates = [learning_rate(step, 3000, 1.0) for step in range(3000)]
    assert rates[0] < 0.01 < rates[100] < rates[199] == rates[1999] == 1.0
    assert rates[2500] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
