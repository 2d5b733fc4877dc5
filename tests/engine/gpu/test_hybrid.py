"""GPU and CPU together against the CPU alone and against transformers in float32, on each family that has experts: logits, and 256 greedy tokens.

All take the same experts (tests/engine/oracle.py says why); a captured step is told which by a table on the device. The reply is transformers' own greedy
continuation, and at each of its places every engine names its best token: so all 256 are compared, those behind a near-tie too.

A near-tie is a gap that errors explain. How two engines' logits differ is known at each place: the gap between two logits carries the errors of both, sqrt(2)
times a single one's, and four times that is what normal errors exceed once in 16,000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType as T
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.gpu.engine import GpuEngine
from server.engine.gpu.ops import GpuOps, HybridMatrix
from server.engine.ops import Routing
from server.engine.protocol import Step
from tests.engine.gpu.conftest import DEVICE
from tests.engine.gpu.test_engine import open_engine
from tests.engine.oracle import Answer, ForcedOps, Runner, ask, relative, routed_weights
from tests.engine.test_models import wide
from tests.engine.tiny_families import TINY
from tests.engine.tiny_models import write_tiny

DENSE = {"llama", "qwen2", "qwen3"}
ON_GPU = DEVICE.type == "cuda"  # elsewhere the twins take their time
NAMES = [name for name in TINY if name not in DENSE] if ON_GPU else ["deepseek-v3"]
REPLY = 256 if ON_GPU else 8
PROMPT = tuple(torch.randint(0, 96, (70,), generator=torch.Generator().manual_seed(2)).tolist())  # a chunk and a bit
PAGES = (5, 2, 0, 3, 1, 4)
CHUNK = 64
TOLERANCE = 2e-2
NEAR = 4 * math.sqrt(2)


class GivenExperts:
    """A GPU stage whose router takes the oracle's experts, of the position that lies on the device: so a graph can hold it."""

    def __init__(self, ops: GpuOps, answer: Answer) -> None:
        self._ops = ops
        self._ids = [ids.to(ops.device, torch.int32) for ids in answer.ids]
        self._routers: list[HybridMatrix] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, router: HybridMatrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if not any(router is known for known in self._routers):
            self._routers.append(router)
        table = self._ids[next(i for i, known in enumerate(self._routers) if known is router)]
        assert router.device is not None
        logits = x.new_empty(len(x), router.device.rows)
        self._ops.linear((router,), x, (logits,))
        place = self._ops._place if self._ops._capture is None else self._ops._capture.place
        ids.copy_(table[place.start.long() + torch.arange(len(x), device=x.device)])
        weights.copy_(routed_weights(routing, logits, ids))


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits [tokens, vocab] of each, after each token of the prompt and of the reply."""

    name: str
    transformers: Tensor
    cpu: Tensor
    hybrid: Tensor


@pytest.fixture(scope="module", params=NAMES)
def logits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logits]:
    path = tmp_path_factory.mktemp("hybrid") / "m.gguf"
    model = write_tiny(path, request.param, quant=lambda _: T.Q4_K, **wide(request.param))
    tokens = (*PROMPT, *continued(model, REPLY - 1))
    answer = ask(model, tokens)
    hybrid = open_engine(path, "bf16", CHUNK, pages=len(PAGES), wrap=lambda ops: GivenExperts(ops, answer))
    cpu = Runner(path, ForcedOps(hybrid._gpu.native, answer), "f16", len(PAGES) * 64, laid_out=True)
    yield Logits(
        request.param, answer.logits, along(lambda ids, start: cpu.step(ids, start, PAGES), tokens), along(lambda ids, start: after(hybrid, ids, start), tokens)
    )
    hybrid.close()


def continued(model: PreTrainedModel, count: int) -> list[int]:
    """transformers' greedy reply to PROMPT."""
    reply: list[int] = []
    fed, cache = list(PROMPT), None
    with torch.inference_mode():
        for _ in range(count):
            out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            fed, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            reply += fed
    return reply


def along(step: Callable[[tuple[int, ...], int], Tensor], tokens: Sequence[int]) -> Tensor:
    """Prefill of the prompt, chunk by chunk, then token by token."""
    chunks = [tokens[start : min(start + CHUNK, len(PROMPT))] for start in range(0, len(PROMPT), CHUNK)]
    pieces = [*chunks, *((token,) for token in tokens[len(PROMPT) :])]
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    return torch.cat([step(tuple(piece), start) for piece, start in zip(pieces, starts, strict=True)])


@torch.inference_mode()
def after(engine: GpuEngine, ids: tuple[int, ...], start: int) -> Tensor:
    """Logits [n, vocab]; of one token as decode runs it: captured, on a GPU."""
    if len(ids) > 1 or engine._graph is None:
        return engine.logits(Step(ids, start, PAGES, None))
    captured = engine._graph.launch(ids[0], start, PAGES)
    engine._graph.finish()
    return captured[None].cpu()


def test_logits_are_those_of_the_cpu_and_of_transformers(logits: Logits) -> None:
    prompt, reply = slice(0, len(PROMPT)), slice(len(PROMPT), None)
    pairs = {"hybrid, CPU": (logits.hybrid, logits.cpu), "hybrid, transformers": (logits.hybrid, logits.transformers)}
    pairs["CPU, transformers"] = (logits.cpu, logits.transformers)
    for words, (got, expected) in pairs.items():
        print(
            f"{logits.name}, {words}: ||a - b|| / ||b|| {relative(got[prompt], expected[prompt]):.2e} prompt, {relative(got[reply], expected[reply]):.2e} reply"
        )
        assert relative(got[prompt], expected[prompt]) <= TOLERANCE, words
        assert relative(got[reply], expected[reply]) <= TOLERANCE, words


@pytest.mark.parametrize("other", ["cpu", "transformers"])
def test_greedy_tokens_are_the_others_but_for_near_ties(logits: Logits, other: str) -> None:
    """A wrong token would be further off than errors reach; and ties are few."""
    ours, theirs = (each[len(PROMPT) - 1 :] for each in (logits.hybrid, getattr(logits, other)))
    gaps = theirs.amax(-1) - theirs.gather(1, ours.argmax(-1)[:, None])[:, 0]
    widest, count = float((gaps / (ours - theirs).square().mean(-1).sqrt()).max()), int((gaps > 0).sum())
    print(f"{logits.name}: {count} of {len(ours)} greedy tokens are not those of {other}, over {widest:.2f} errors at most; {NEAR:.1f} are a near-tie")
    assert len(ours) == REPLY
    assert widest < NEAR
    assert count <= max(1, REPLY // 8)
