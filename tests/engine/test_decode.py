"""Decode as a recorded program: the same bits as the layers called one by one, for every family; and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from torch import Tensor

from server.config import EngineConfig
from server.engine.decode import DecodeProgram
from server.engine.expert_load import RouteCounter
from server.engine.gguf.reader import GGUFFile
from server.engine.kv_cache import PAGE_SIZE
from server.engine.loader import load_model
from server.engine.native import NativeOps, open_ops
from server.engine.ops import Norm, Ops
from server.engine.protocol import Step
from server.types import SamplingParams
from tests.engine.oracle import PAGES, TOKENS, Runner, relative
from tests.engine.test_models import wide
from tests.engine.tiny_families import TINY
from tests.engine.tiny_models import write_tiny

FIRST = 50  # tokens before those that are decoded one by one, up to the third page


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    ops = open_ops(2)
    yield ops
    ops.close()


def program_of(runner: Runner, ops: NativeOps) -> DecodeProgram:
    return DecodeProgram(runner.model, runner.cache, ops)


@pytest.mark.parametrize("kind", [T.F32, T.Q4_0], ids=lambda t: t.name)
@pytest.mark.parametrize("name", list(TINY))
def test_a_replayed_token_is_a_called_one_to_the_bit(name: str, kind: T, ops: NativeOps, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", name, quant=lambda _: kind, **wide(name))
    called, replayed = (Runner(tmp_path / "m.gguf", ops, "f16") for _ in range(2))
    program = program_of(replayed, ops)
    for runner in (called, replayed):
        runner.step(TOKENS[:FIRST], 0)
    for position in range(FIRST, len(TOKENS)):
        expected = called.step(TOKENS[position : position + 1], position)[0]
        assert torch.equal(program.run(TOKENS[position], position, PAGES), expected), position


def test_two_sequences_take_turns(ops: NativeOps, tmp_path: Path) -> None:
    """A program belongs to no sequence: the pages are those of each run."""
    write_tiny(tmp_path / "m.gguf", "llama")
    runner = Runner(tmp_path / "m.gguf", ops)
    program, alone = program_of(runner, ops), program_of(Runner(tmp_path / "m.gguf", ops), ops)
    for position, (one, other) in enumerate(zip(TOKENS[:20], TOKENS[20:40], strict=True)):
        first = program.run(one, position, (2,)).clone()
        assert not torch.equal(program.run(other, position, (1,)), first)
        assert torch.equal(alone.run(one, position, (0,)), first)


@pytest.mark.parametrize(
    ("token", "start", "pages", "sentence"),
    [
        (1 << 40, 0, (0,), "row 1099511627776 of a matrix"),
        (-1, 0, (0,), "row -1 of a matrix"),
        (1, PAGE_SIZE, (0,), "1 pages of 64 tokens cannot hold 65 tokens"),
        (1, 1 << 20, tuple(range(1 << 15)), "the rotary table has"),
        (1, -1, (0,), "must not be negative"),
        (1, 0, (-1,), "must not be negative"),
    ],
)
def test_what_does_not_fit_is_refused(token: int, start: int, pages: tuple[int, ...], sentence: str, ops: NativeOps, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "llama")
    program = program_of(Runner(tmp_path / "m.gguf", ops), ops)
    with pytest.raises(ValueError, match=sentence):
        program.run(token, start, pages)
    assert program.run(1, 0, (0,)).isfinite().all()  # and nothing is broken by it


def test_nothing_is_computed_while_recording_and_what_is_recorded_lives(ops: NativeOps) -> None:
    def temporary(out: Tensor) -> None:
        ops.rms_norm(source.clone(), Norm(torch.full((512,), 2.0), 0.0), out)

    source, out = torch.ones(1, 512), torch.zeros(1, 512)
    with ops.record() as program:
        temporary(out)
    assert not out.any()
    gc.collect()
    overwritten = [torch.full((1, 512), 7.0) for _ in range(64)]  # would take the memory of what was let go
    program.run(0, ())
    assert torch.equal(out, torch.full((1, 512), 2.0))
    del overwritten
    ops.rms_norm(source, Norm(torch.full((512,), 3.0), 0.0), out)
    assert torch.equal(out, torch.full((1, 512), 3.0))  # and afterwards operations run again


def test_a_recording_that_fails_ends(ops: NativeOps) -> None:
    with pytest.raises(ZeroDivisionError), ops.record():
        _ = 1 / 0
    x = torch.full((1, 4), 2.0)
    ops.rms_norm(x, Norm(torch.ones(4), 0.0))
    assert torch.equal(x, torch.ones(1, 4))


def drawn_ids(path: Path, **options: Any) -> list[int]:
    """The ids of a greedy reply of 20 tokens through the engine."""
    loaded = load_model(GGUFFile.open(path), EngineConfig(cpu_infer=2, cache_lens=3 * PAGE_SIZE), **options)
    engine = loaded.engine
    try:
        sampler = engine.new_sampler(SamplingParams(temperature=0.0), TOKENS)
        drawn = engine.step(Step(TOKENS, 0, PAGES, sampler))
        ids = []
        for position in range(len(TOKENS), len(TOKENS) + 20):
            assert drawn is not None
            ids.append(drawn.token_id)
            drawn = engine.step(Step((drawn.token_id,), position, PAGES, sampler))
        return ids
    finally:
        engine.close()


def test_another_maker_sees_every_token_of_decode(tmp_path: Path) -> None:
    """An Ops maker around the model's own is not recorded past: it is called, token by token, and the reply is the same."""
    write_tiny(tmp_path / "m.gguf", "qwen3moe", quant=lambda _: T.Q8_0, **wide("qwen3moe"))
    counters: list[RouteCounter] = []

    def counted(ops: Ops) -> Ops:
        counters.append(RouteCounter(ops))
        return cast(Ops, counters[0])

    assert drawn_ids(tmp_path / "m.gguf", wrap=counted) == drawn_ids(tmp_path / "m.gguf")
    assert len(counters[0].chosen) == 2 * 21  # layers and steps


def test_a_tied_head_is_laid_out_and_its_rows_are_still_looked_up(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "llama", quant=lambda _: T.Q8_0, **wide("llama"), tie=True)
    loaded = load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=2, cache_lens=3 * PAGE_SIZE, cache_type="f32"))
    try:
        got = loaded.engine.logits(Step(TOKENS, 0, PAGES, None))
    finally:
        loaded.engine.close()
    ops = open_ops(2)
    expected = Runner(tmp_path / "m.gguf", ops).run()  # where nothing is laid out
    ops.close()
    assert relative(got, expected) < 2e-2
