"""How evenly a model's routers spread a prompt over the experts: a prefill is as fast as the experts that it touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from server.config import EngineConfig
from server.engine.gguf.reader import GGUFFile
from server.engine.kv_cache import PAGE_SIZE
from server.engine.loader import load_model
from server.engine.ops import Matrix, Ops, Routing
from server.engine.protocol import Step

PROMPT = 512  # tokens


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """One layer's experts after a prompt."""

    layer: int
    experts: int
    touched: int  # experts that some token chose
    busiest: float  # the tokens of the most chosen expert, over the mean of all


class RouteCounter:
    """An Ops maker that hands everything on to another one, and keeps which experts `route` chose: one entry a call, in the order of the layers."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.chosen: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, router: Matrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        self._ops.route(router, routing, x, ids, weights)
        self.chosen.append(ids.clone())


def expert_loads(file: GGUFFile, engine: EngineConfig, seed: int = 0) -> list[ExpertLoad]:
    """Run a prompt of 512 random tokens as one step and count, for each layer with experts. Of `engine`, the threads count."""
    counters: list[RouteCounter] = []

    def counted(ops: Ops) -> Ops:
        counters.append(RouteCounter(ops))
        return cast(Ops, counters[0])  # mypy cannot see what __getattr__ hands on

    loaded = load_model(file, EngineConfig(cpu_infer=engine.cpu_infer, cache_lens=PROMPT, prefill_chunk=PROMPT, device="cpu"), wrap=counted)
    try:
        tokens = np.random.default_rng(seed).integers(0, loaded.engine.vocab_size, PROMPT)
        loaded.engine.step(Step(tuple(tokens.tolist()), 0, tuple(range(PROMPT // PAGE_SIZE)), None))
    finally:
        loaded.engine.close()
    return _loads(file, counters[0].chosen)


def _loads(file: GGUFFile, chosen: list[Tensor]) -> list[ExpertLoad]:
    experts, layers = (int(cast(int, file.metadata.get(f"{file.architecture}.{key}", 0))) for key in ("expert_count", "block_count"))
    first = layers - len(chosen)  # those before it are dense
    return [_load(layer, experts, ids) for layer, ids in enumerate(chosen, first)]


def _load(layer: int, experts: int, ids: Tensor) -> ExpertLoad:
    tokens = torch.bincount(ids.flatten(), minlength=experts)
    return ExpertLoad(layer, experts, int((tokens > 0).sum()), float(tokens.max() * experts / tokens.sum()))
