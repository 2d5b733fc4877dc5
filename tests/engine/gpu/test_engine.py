"""The engine with the GPU stage: whole requests, as the CPU's engine answers them; on a GPU, decode as a captured graph with the pool inside."""

from __future__ import annotations

import gc
import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T

from server.config import CacheType, EngineConfig
from server.engine.engine import LocalEngine
from server.engine.gguf.reader import GGUFFile
from server.engine.gpu.devices import kernels_for
from server.engine.gpu.engine import GpuEngine
from server.engine.gpu.flags import KernelFlags
from server.engine.gpu.ops import GpuOps
from server.engine.kernels import Kernels, plain_kernels
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

PAGES = (2, 0, 3, 1, 5, 4)
CACHE = len(PAGES) * PAGE_SIZE
GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=7)
NAMES = ["llama", "qwen3moe", "deepseek-v3"]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU: graphs need one")


def open_engine(
    path: Path,
    cache_type: CacheType = "f32",
    chunk: int = 64,
    pages: int = len(PAGES),
    kernels: Kernels | None = None,
    wrap: Callable[[GpuOps], Any] | None = None,
) -> GpuEngine:
    """As the loader makes one, on the device that there is; `wrap` may put another maker of operations around the GPU stage."""
    file = GGUFFile.open(path)
    hparams = HParams.from_metadata(file.metadata)
    native = open_ops(2)
    ops = GpuOps(native, DEVICE, kernels or kernels_for(DEVICE), pages, "auto")
    model_ops = ops if wrap is None else wrap(ops)
    weights = Weights(file, model_ops)
    model = family(hparams.architecture)(weights, hparams, file.tensors["token_embd.weight"].shape[0], model_ops)
    cache = KVCache.allocate(hparams, pages * PAGE_SIZE, cache_type, DEVICE)
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


def test_256_greedy_tokens_are_those_of_the_cpu(pair: tuple[LocalEngine, GpuEngine]) -> None:
    """Each side takes its own experts; with float32 throughout no choice is as near a tie as the order of sums can tip."""
    local, gpu = pair
    count = 256 if DEVICE.type == "cuda" else 48
    assert generate(gpu, (11, 5, 80), count) == generate(local, (11, 5, 80), count)


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


@pytest.mark.parametrize("draws", [False, True])
def test_the_gpu_is_at_rest_behind_whatever_failed(pair: tuple[LocalEngine, GpuEngine], monkeypatch: pytest.MonkeyPatch, draws: bool) -> None:
    """Copies that were on their way would meet what the next step writes."""

    def fail(*_: object) -> None:
        raise RuntimeError("a thread of the pool has died")

    gpu, waits = pair[1], []
    step = Step((1, 2, 3), 0, PAGES, gpu.new_sampler(GREEDY, ()) if draws else None)
    monkeypatch.setattr(gpu, "_hidden", fail)
    monkeypatch.setattr(gpu, "_wait", lambda: waits.append(step))
    with pytest.raises(RuntimeError, match="has died"):
        gpu.step(step)
    assert waits == [step]


@pytest.fixture(params=["driver", "kernels"])
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which a captured step raises flags and waits for them."""
    if request.param == "kernels":
        monkeypatch.setattr("server.engine.gpu.engine.open_flags", KernelFlags)


@on_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("kind", [T.F32, T.Q4_K])
def test_the_captured_step_is_the_models_own(kind: T, tmp_path: Path) -> None:
    write_tiny(tmp_path / "m.gguf", "deepseek-v3", quant=lambda _: kind, hidden=256, heads=8, kv_heads=8, ffn=512)
    engine = open_engine(tmp_path / "m.gguf", "bf16")
    check_captured(engine, 1e-4 if kind is T.F32 else 2e-2)
    engine.close()


@torch.inference_mode()
def check_captured(engine: GpuEngine, tolerance: float) -> None:
    """The context is cut otherwise, so sums differ in their last bits; where the pool rounds to int8 that may tip a rounding."""
    assert engine._graph is not None
    for position in (0, 1, 63, 64, 130):
        for start in range(0, position, engine.prefill_chunk):
            ids = tuple(i % 96 for i in range(start, min(start + engine.prefill_chunk, position)))
            engine.logits(Step(ids, start, PAGES, None))
        eager = engine.logits(Step((5,), position, PAGES, None))[0]
        captured = engine._graph.launch(5, position, PAGES)
        engine._graph.finish()
        assert relative(captured.cpu(), eager) < tolerance, position


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_flags_of_kernels_carry_whole_requests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a driver has no operations on values in stream order, or cuda-bindings is not there."""
    write_tiny(tmp_path / "m.gguf", name)
    before = open_engine(tmp_path / "m.gguf")
    monkeypatch.setattr("server.engine.gpu.engine.open_flags", KernelFlags)
    engine = open_engine(tmp_path / "m.gguf")
    assert engine._graph is not None
    assert isinstance(engine._graph._capture._flags, KernelFlags)
    for prompt in ((1, 2, 3), tuple(range(90))):
        assert generate(engine, prompt, 40) == generate(before, prompt, 40)
    engine.close()
    before.close()


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_plain_torch_on_a_gpu_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    """What GPUs of a compute capability below 8.0 run."""
    write_tiny(tmp_path / "m.gguf", name)
    local = load_model(GGUFFile.open(tmp_path / "m.gguf"), EngineConfig(cpu_infer=2, cache_lens=CACHE, cache_type="f32", device="cpu")).engine
    engine = open_engine(tmp_path / "m.gguf", kernels=plain_kernels())
    assert engine._graph is None
    for prompt, params in (((1, 2, 3), GREEDY), (tuple(range(90)), DRAWN)):
        assert generate(engine, prompt, 30, params) == generate(local, prompt, 30, params)
    engine.close()
    local.close()


@on_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("flags")
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


class Request:
    """A prompt that is run a step at a time, in pages of its own, and whose answer is known."""

    def __init__(self, engine: GpuEngine, prompt: tuple[int, ...], answer: list[int], pages: tuple[int, ...]) -> None:
        self._engine, self._prompt, self._answer, self._pages = engine, prompt, answer, pages
        self._sampler = engine.new_sampler(GREEDY, prompt)
        self._at = 0  # tokens in the cache
        self.tokens: list[int] = []

    def step(self) -> bool:
        """A chunk of the prompt, or a token, which is the answer's; False once that is complete."""
        chunk = self._prompt[self._at : self._at + self._engine.prefill_chunk] or (self.tokens[-1],)
        draws = self._at + len(chunk) >= len(self._prompt)
        drawn = self._engine.step(Step(chunk, self._at, self._pages, self._sampler if draws else None))
        self._at += len(chunk)
        if drawn is not None:
            self.tokens.append(drawn.token_id)
            assert self.tokens == self._answer[: len(self.tokens)]
        return len(self.tokens) < len(self._answer)


@on_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_steps_without_a_hang_a_leak_or_a_changed_answer(steps: int, tmp_path: Path) -> None:
    """Two requests at a time, each with a random prompt in random pages, cancelled in its prompt, in its reply, or not at all. Half way the engine is closed
    and another opened."""
    write_tiny(tmp_path / "m.gguf", "deepseek-v3")
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(96) for _ in range(draw.randint(1, 170))) for _ in range(8)]
    answers: list[list[int]] = []
    left: list[int] = []  # bytes on the GPU
    for _ in range(2):
        engine = open_engine(tmp_path / "m.gguf")
        again = [generate(engine, prompt, 20) for prompt in prompts]
        answers = answers or again
        assert again == answers
        memory, resident = torch.cuda.memory_allocated(), resident_bytes()
        ends = interrupted(engine, dict(zip(prompts, answers, strict=True)), steps // 2, draw)
        left.append(torch.cuda.memory_allocated())
        print(f"{steps // 2} steps of decode; requests: {dict(ends)}; the process grew by {(resident_bytes() - resident) / 1e6:.1f} MB")
        assert set(ends) == {"finished", "cut in its reply", "cut in its prompt"}
        assert left[-1] <= memory
        assert resident_bytes() - resident < 64e6
        engine.close()
        del engine
        gc.collect()
    assert left[1] < left[0] + 1e6


def interrupted(engine: GpuEngine, answers: dict[tuple[int, ...], list[int]], steps: int, draw: random.Random) -> Counter[str]:
    """Run so many steps of decode, of two requests in random turns; how they ended."""

    def begun(pages: tuple[int, ...]) -> tuple[Request, int]:
        """A request, and after how many steps it is cancelled."""
        prompt = draw.choice(list(answers))
        return Request(engine, prompt, answers[prompt], tuple(draw.sample(pages, len(pages)))), draw.choice((1, 2, 9, 16, 40))

    ends, places = Counter[str](), (PAGES[:3], PAGES[3:])
    requests = [begun(pages) for pages in places]
    while steps > 0:
        slot = draw.randrange(len(places))
        request, most = requests[slot]
        more = request.step()
        steps -= len(request.tokens) > 1
        requests[slot] = request, most - 1
        if not more or most == 1:
            ends["finished" if not more else "cut in its reply" if request.tokens else "cut in its prompt"] += 1
            requests[slot] = begun(places[slot])
    return ends


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
