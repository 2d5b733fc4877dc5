"""Flags between a GPU's graph and the pool, with a thread in the GPU's place: every flag is answered, whatever goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from server import _native
from tests.native.isas import address

F32 = 0
STRIDE = 16
COUNT = 5
DONE, FAILED = 1, 2
HIDDEN, FFN, EXPERTS = 64, 32, 4


class Rig:
    """A pool, a program of `COUNT` calls of experts, and flags; `play` is the GPU's part."""

    def __init__(self, timeout_ms: int = 2000) -> None:
        self.pool = _native.Pool([0, 0], "auto")
        self.asked, self.answered = (np.zeros(COUNT * STRIDE, np.uint32) for _ in range(2))
        self.flags = _native.Handoff(address(self.asked), address(self.answered), COUNT, timeout_ms)
        self.program = _native.Program()
        shapes = ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
        rng = np.random.default_rng(1)
        self._matrices = [_native.Matrix(F32, *shape, rng.standard_normal((EXPERTS, *shape)).astype(np.float32), EXPERTS) for shape in shapes]
        self.x = rng.standard_normal((COUNT, HIDDEN)).astype(np.float32)
        self.ids, self.weights = np.zeros((COUNT, 1), np.int32), np.ones((COUNT, 1), np.float32)
        self.out = np.full((COUNT, HIDDEN), np.nan, np.float32)
        self.pool.record(self.program)
        for i in range(COUNT):
            at = [address(array[i : i + 1]) for array in (self.x, self.ids, self.weights, self.out)]
            self.pool.experts(*self._matrices, at[0], 1, at[1], at[2], 1, at[3], accumulate=False)
        self.pool.record(None)
        self.seen: list[int] = []

    def play(self, asks: int = COUNT) -> threading.Thread:
        def gpu() -> None:
            for i in range(asks):
                self.asked[i * STRIDE] = 1
                while not self.answered[i * STRIDE]:
                    time.sleep(0)
                self.seen.append(int(self.answered[i * STRIDE]))

        thread = threading.Thread(target=gpu)
        thread.start()
        return thread

    def step(self, asks: int = COUNT) -> None:
        self.flags.reset()
        self.seen.clear()
        gpu = self.play(asks)
        try:
            self.flags.serve(self.pool, self.program)
        finally:
            gpu.join(10)
            assert not gpu.is_alive(), "a flag without an answer"


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.pool.close()


def test_each_operation_runs_when_it_is_asked_for(rig: Rig) -> None:
    rig.ids[:, 0] = np.arange(COUNT) % EXPERTS
    expected = np.empty_like(rig.out)
    rig.pool.experts(*rig._matrices, address(rig.x), COUNT, address(rig.ids), address(rig.weights), 1, address(expected), accumulate=False)
    for _ in range(50):
        rig.out[:] = np.nan
        rig.step()
        assert rig.seen == [DONE] * COUNT
        np.testing.assert_allclose(rig.out, expected, rtol=1e-5, atol=1e-5)
        asked = [begin for begin, _ in rig.flags.turns]
        assert asked == sorted(asked)
        assert all(begin < end for begin, end in rig.flags.turns)


def test_an_operation_that_fails_answers_all_flags(rig: Rig) -> None:
    rig.ids[2] = EXPERTS  # one that is not there
    with pytest.raises(ValueError, match="expert 4 of 4"):
        rig.step()
    assert rig.seen == [DONE, DONE, FAILED, FAILED, FAILED]
    rig.ids[2] = 0
    rig.step()
    assert rig.seen == [DONE] * COUNT


def test_a_gpu_that_does_not_ask_is_given_up() -> None:
    rig = Rig(timeout_ms=50)
    with pytest.raises(RuntimeError, match="The GPU took more than 50 ms over hand-over 3"):
        rig.step(asks=3)
    assert list(rig.answered[::STRIDE]) == [DONE, DONE, DONE, FAILED, FAILED]
    rig.step()
    rig.pool.close()


def test_an_operation_that_takes_too_long_is_answered_meanwhile() -> None:
    rig = Rig(timeout_ms=1)
    n = 30_000  # tokens: some tens of milliseconds
    x, ids, weights, out = np.zeros((n, HIDDEN), np.float32), np.zeros((n, 1), np.int32), np.ones((n, 1), np.float32), np.empty((n, HIDDEN), np.float32)
    program = _native.Program()
    rig.pool.record(program)
    for _ in range(COUNT):
        rig.pool.experts(*rig._matrices, address(x), n, address(ids), address(weights), 1, address(out), accumulate=False)
    rig.pool.record(None)
    rig.program = program
    with pytest.raises(RuntimeError, match="The pool of CPU threads took more than 1 ms over hand-over 0"):
        rig.step()
    assert rig.seen == [FAILED] * COUNT
    rig.pool.close()


def test_a_program_of_another_length_is_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="the program has 0 operations, but there are 5 flags"):
        rig.flags.serve(rig.pool, _native.Program())
