"""The engine with the GPU stage: whole requests, as the CPU's engine answers them; on a GPU, decode as a captured graph with the pool inside."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.config import EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile
from server.engine.gpu.devices import kernels_for
from server.engine.gpu.engine import GpuEngine
from server.engine.gpu.ops import GpuOps
from server.engine.kv_cache import PAGE_SIZE, KVCache
from server.engine.loader import load_model
from server.engine.models.config import HParams
from server.engine.models.registry import family
from server.engine.native import open_ops
from server.engine.protocol import Step
from server.engine.weights import Weights
from server.errors import EngineFailure, RequestError
from server.metrics import Metrics
from server.types import SamplingParams, TokenMask
from tests.engine.gpu.conftest import DEVICE
from tests.engine.oracle import relative
from tests.engine.tiny_models import write_tiny
from tests.fakes import FakeMask

CACHE = 4 * PAGE_SIZE
PAGES = (2, 0, 3, 1)
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=7)
NAMES = ["llama", "qwen3moe", "deepseek-v3"]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU: graphs need one")


def open_engine(path: Path, cache_type: str = "f32", chunk: int = 64) -> GpuEngine:
    """As the loader makes one, on the device that there is."""
    file = GGUFFile.open(path)
    hparams = HParams.from_metadata(file.metadata)
    native = open_ops(2)
    ops = GpuOps(native, DEVICE, kernels_for(DEVICE), CACHE // PAGE_SIZE, "auto")
    weights = Weights(file, ops)
    model = family(hparams.architecture)(weights, hparams, file.tensors["token_embd.weight"].shape[0], ops)
    cache = KVCache.allocate(hparams, CACHE, cache_type, DEVICE)  # type: ignore[arg-type]
    weights.lay_out(lambda *_: None)
    engine = GpuEngine(model, cache, ops, chunk)
    cpus = os.sched_getaffinity(0)
    engine.start()
    os.sched_setaffinity(0, cpus)  # this thread is that of other tests too, which want the CPUs that there are
    return engine


def generate(engine: LocalEngine, prompt: tuple[int, ...], count: int, params: SamplingParams = GREEDY, constraint: TokenMask | None = None) -> list[int]:
    """The request's tokens: prefill in chunks, then one by one."""
    sampler = engine.new_sampler(params, prompt, constraint)
    last = (len(prompt) - 1) // engine.prefill_chunk * engine.prefill_chunk
    for start in range(0, last, engine.prefill_chunk):
        engine.step(Step(prompt[start : start + engine.prefill_chunk], start, PAGES, None))
    step = Step(prompt[last:], last, PAGES, sampler)
    tokens: list[int] = []
    for position in range(len(prompt), len(prompt) + count):
        drawn = engine.step(step)
        assert drawn is not None
        tokens.append(drawn.token_id)
        step = Step((drawn.token_id,), position, PAGES, sampler)
    return tokens


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalEngine, GpuEngine]]:
    """The same float32 model on the CPU and on the GPU stage."""
    path = tmp_path_factory.mktemp("gpu") / "m.gguf"
    write_tiny(path, request.param)
    local = load_model(GGUFFile.open(path), EngineConfig(cpu_infer=2, cache_lens=CACHE, cache_type="f32", device="cpu")).engine
    gpu = open_engine(path)
    yield local, gpu
    gpu.close()
    local.close()


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("length", [1, 9, 150])
def test_the_same_tokens_as_on_the_cpu(pair: tuple[LocalEngine, GpuEngine], length: int, params: SamplingParams) -> None:
    prompt = tuple(random.Random(length).randrange(96) for _ in range(length))
    local, gpu = pair
    assert generate(gpu, prompt, 24, params) == generate(local, prompt, 24, params)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_constraint_holds_on_the_gpu_as_on_the_cpu(pair: tuple[LocalEngine, GpuEngine], params: SamplingParams) -> None:
    allowed = (set(range(0, 96, 5)), {95}, None, {3, 4})
    tokens = [generate(engine, (1, 2, 3), 12, params, FakeMask(*allowed, words=3)) for engine in pair]
    assert tokens[0] == tokens[1]
    assert all((now := allowed[i % 4]) is None or token in now for i, token in enumerate(tokens[0]))


def test_a_constraint_that_fails_costs_its_request_alone(pair: tuple[LocalEngine, GpuEngine]) -> None:
    class Stuck(FakeMask):
        def mask(self) -> memoryview | None:
            if len(self.accepted) == 2:
                raise RequestError("The grammar allows nothing.")
            return super().mask()

    for engine in pair:
        before = generate(engine, (1, 2, 3), 5)
        with pytest.raises(RequestError, match="allows nothing"):
            generate(engine, (1, 2, 3), 5, GREEDY, Stuck({7}, words=3))
        assert generate(engine, (1, 2, 3), 5) == before


def test_the_roads_that_experts_took_are_counted(pair: tuple[LocalEngine, GpuEngine]) -> None:
    metrics, (_, gpu) = Metrics(), pair
    metrics.watch_engine(gpu.use)
    before = sum(gpu.roads.values())
    gpu.step(Step(tuple(range(20)), 0, PAGES, None))
    moe = gpu._model.hparams.moe
    assert sum(gpu.roads.values()) - before == (gpu._model.hparams.layers - moe.leading_dense if moe else 0)
    for road in ("cpu", "stream", "split"):
        assert f'moespan_prefill_expert_chunks_total{{road="{road}"}} {float(gpu.roads.get(road, 0))}' in metrics.exposition()[0].decode()


def test_logits_are_those_of_the_cpu(pair: tuple[LocalEngine, GpuEngine]) -> None:
    local, gpu = pair
    for start, n in ((0, 40), (40, 1), (41, 7), (48, 64)):
        step = Step(tuple(range(n)), start, PAGES, None)
        torch.testing.assert_close(gpu.logits(step), local.logits(step), rtol=1e-3, atol=1e-4)


def test_a_gpu_without_memory_costs_one_step(pair: tuple[LocalEngine, GpuEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 24 GiB.")

    gpu, step = pair[1], Step((1, 2, 3), 0, PAGES, None)
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_hidden", fail)
        with pytest.raises(EngineFailure, match=r"no memory left for a step of 3 tokens \(CUDA out of memory\). Lower --prefill_chunk"):
            gpu.step(step)
    gpu.step(step)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", [T.F32, T.Q4_K])
def test_the_captured_step_is_the_models_own(kind: T, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3", quant=lambda _: kind, hidden=256, heads=8, kv_heads=8, ffn=512)
    engine = open_engine(tmp_path / "m.gguf", "bf16")
    assert engine._graph is not None
    with torch.inference_mode():
        for position in (0, 1, 63, 64, 130):
            for start in range(0, position, engine.prefill_chunk):
                ids = tuple(i % 96 for i in range(start, min(start + engine.prefill_chunk, position)))
                engine.logits(Step(ids, start, PAGES, None))
            eager = engine.logits(Step((5,), position, PAGES, None))[0]
            captured = engine._graph.launch(5, position, PAGES)
            engine._graph.finish()
            # The context is cut otherwise, so sums differ in their last bits; where the pool rounds to int8 that may tip a rounding.
            assert relative(captured.cpu(), eager) < (1e-4 if kind is T.F32 else 2e-2), position
    engine.close()


@on_gpu
@pytest.mark.gpu
def test_a_failure_of_the_pool_costs_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    engine = open_engine(tmp_path / "m.gguf")
    before = generate(engine, (1, 2, 3), 5)
    handover = engine._graph._handover  # type: ignore[union-attr]
    assert handover is not None

    def fail() -> None:
        handover._flags.fail()
        raise RuntimeError("a thread of the pool has died")

    step = Step((1,), 3, PAGES, engine.new_sampler(GREEDY, ()))
    with monkeypatch.context() as patch:
        patch.setattr(handover, "serve", fail)
        with pytest.raises(EngineFailure, match="a thread of the pool has died"):
            engine.step(step)
    assert generate(engine, (1, 2, 3), 5) == before
    engine.close()


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_steps_without_a_hang_a_leak_or_a_changed_answer(steps: int, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    engine, draw = open_engine(tmp_path / "m.gguf"), random.Random(0)
    prompts = [tuple(draw.randrange(96) for _ in range(draw.randint(1, 130))) for _ in range(6)]
    answers = [generate(engine, prompt, 20) for prompt in prompts]
    memory = torch.cuda.memory_allocated()
    done = 0
    while done < steps:
        which, count = draw.randrange(len(prompts)), draw.randint(1, 20)  # as cancels do, it ends anywhere
        assert generate(engine, prompts[which], count) == answers[which][:count]
        done += count
    assert torch.cuda.memory_allocated() <= memory
    engine.close()
