"""The bench feeds the engine what a chat would: the prompt in chunks, then the tokens it drew, in order, on pages that cover them."""

from __future__ import annotations

import pytest

from server.bench.offline import Spread, measure
from tests.fakes import FakeEngine


@pytest.mark.parametrize(("prompt", "chunks"), [(1, [1]), (31, [31]), (32, [32]), (33, [32, 1]), (100, [32, 32, 32, 4])])
def test_a_run_is_the_prompt_in_chunks_and_then_one_token_at_a_time(prompt, chunks):
    engine = FakeEngine(prefill_chunk=32)
    measure(engine, 256, prompt=prompt, gen=5, repeat=1)
    run = engine.steps[-(len(chunks) + 5) :]
    assert [len(step.token_ids) for step in run] == [*chunks, 1, 1, 1, 1, 1]
    assert [step.start for step in run] == [sum(chunks[:i]) for i in range(len(chunks))] + [prompt + i for i in range(5)]
    assert [step.sampler is not None for step in run] == [False] * (len(chunks) - 1) + [True] * 6


def test_every_run_does_the_same_and_the_warm_up_is_not_counted():
    engine = FakeEngine()
    speed = measure(engine, 256, prompt=40, gen=8, repeat=3)
    assert len(speed.prefill.runs) == len(speed.decode.runs) == 3
    assert [len(sampler.prompt_ids) for sampler in engine.samplers] == [40] * 4
    assert len({sampler.prompt_ids for sampler in engine.samplers}) == 1


def test_speeds_are_tokens_over_the_time_of_their_phase():
    speed = measure(FakeEngine(step_s=0.01), 256, prompt=64, gen=4, repeat=1)  # 2 steps of prefill, 4 of decode
    assert 64 / 0.06 < speed.prefill.median <= 64 / 0.02
    assert 4 / 0.12 < speed.decode.median <= 4 / 0.04


def test_a_spread_knows_its_middle_and_its_ends():
    assert (Spread((3.0, 1.0, 2.0)).median, Spread((3.0, 1.0, 2.0)).low, Spread((3.0, 1.0, 2.0)).high) == (2.0, 1.0, 3.0)


def test_progress_counts_the_timed_runs():
    done: list[int] = []
    measure(FakeEngine(), 256, prompt=8, gen=2, repeat=3, progress=done.append)
    assert done == [1, 2, 3]
