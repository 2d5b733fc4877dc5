"""transformers as the oracle of a whole model, and our model under the oracle's choice of experts.

A router's near-tie flips on rounding, and then two right models differ by an expert. So logits are compared under forced choices: each layer takes
the experts that transformers took for that token, with weights from our own scores. What our own choice would have been is kept beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.engine.gguf.reader import GGUFFile
from server.engine.kv_cache import PAGE_SIZE, KVCache
from server.engine.models.config import HParams
from server.engine.models.registry import family
from server.engine.models.transformer import Transformer
from server.engine.ops import Matrix, Ops, Routing, Span
from server.engine.weights import Weights

TOKENS = tuple(torch.randint(0, 96, (150,), generator=torch.Generator().manual_seed(1)).tolist())
PAGES = (2, 0, 1)  # out of order: a page table that is ignored shows


def relative(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@dataclass
class Answer:
    """What transformers says: logits [tokens, vocab], and for each layer with experts the router's logits [tokens, experts] and ids [tokens, top_k]."""

    logits: Tensor
    router_logits: list[Tensor]
    ids: list[Tensor]


def ask(model: torch.nn.Module, tokens: Sequence[int] = TOKENS) -> Answer:
    """Run all tokens at once."""
    answer = Answer(torch.empty(0), [], [])

    def keep(module: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        answer.router_logits.append(output[0])
        answer.ids.append(output[2])

    hooks = [module.register_forward_hook(keep) for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    with torch.inference_mode():
        answer.logits = model(torch.tensor([list(tokens)])).logits[0]
    for hook in hooks:
        hook.remove()
    return answer


class ForcedOps:
    """An Ops whose router takes the oracle's experts. Which layer and which tokens it is asked for shows from the router and the span before it."""

    def __init__(self, ops: Ops, answer: Answer) -> None:
        self._ops, self._answer = ops, answer
        self._routers: list[Matrix] = []
        self._span = Span(0, 0, ())
        self.routings: list[Routing] = []
        self.ids = [torch.zeros_like(ids) for ids in answer.ids]  # our own choice
        self.router_logits = [torch.zeros(logits.shape) for logits in answer.router_logits]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attend(self, *args: Any) -> None:
        self._note_span(args)
        self._ops.attend(*args)

    def attend_latent(self, *args: Any) -> None:
        self._note_span(args)
        self._ops.attend_latent(*args)

    def route(self, router: Matrix, routing: Routing, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if not any(router is known for known in self._routers):
            self._routers.append(router)
            self.routings.append(routing)
        layer = next(i for i, known in enumerate(self._routers) if known is router)
        rows = slice(self._span.start, self._span.start + self._span.n)
        self._ops.route(router, routing, x, ids, weights)
        self.ids[layer][rows] = ids.cpu().to(torch.int64)
        logits = x.new_empty(x.shape[0], self.router_logits[layer].shape[1])
        self._ops.linear((router,), x, (logits,))
        self.router_logits[layer][rows] = logits.cpu()
        ids.copy_(self._answer.ids[layer][rows])
        weights.copy_(routed_weights(routing, logits, ids))

    def _note_span(self, args: Sequence[Any]) -> None:
        self._span = next(arg for arg in args if isinstance(arg, Span))


def scores(routing: Routing, logits: Tensor) -> Tensor:
    """A router's scores [n, experts] in float64, unbiased."""
    return logits.double().softmax(-1) if routing.gating == "softmax" else logits.double().sigmoid()


def routed_weights(routing: Routing, logits: Tensor, ids: Tensor) -> Tensor:
    """What the experts `ids` [n, top_k] weigh by a router's logits [n, experts], in float64."""
    chosen = scores(routing, logits).gather(1, ids.long())
    return (chosen / chosen.sum(-1, keepdim=True) if routing.normalize else chosen) * routing.scale


class Runner:
    """A model over an open file, with a cache of three pages, on ops of the test's choice; its matrices are as in the file unless `laid_out`."""

    def __init__(self, path: Path, ops: Any, cache_type: str = "f32", tokens: int = 3 * PAGE_SIZE, laid_out: bool = False) -> None:
        file = GGUFFile.open(path)
        hparams = HParams.from_metadata(file.metadata)
        weights = Weights(file, ops)
        vocab = file.tensors["token_embd.weight"].shape[0]
        self.model: Transformer = family(hparams.architecture)(weights, hparams, vocab, ops)
        weights.check_all_used()
        self.cache = KVCache.allocate(hparams, tokens, cache_type, ops.device)  # type: ignore[arg-type]
        if laid_out:
            weights.lay_out(lambda *_: None)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], start: int, pages: tuple[int, ...] = PAGES) -> Tensor:
        """Logits after each of the tokens."""
        hidden = self.model.forward(torch.tensor(tokens), self.cache.layers, Span(start, len(tokens), pages))
        return self.model.logits(hidden).cpu()

    def run(self, chunk: int = 512, tokens: Sequence[int] = TOKENS) -> Tensor:
        """Logits after each token, fed `chunk` at a time."""
        return torch.cat([self.step(tokens[i : i + chunk], i) for i in range(0, len(tokens), chunk)])
