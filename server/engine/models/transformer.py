"""The decoder-only transformer that every family fills in: embedding, pre-norm layers, final norm, head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from server.engine.layers.linear import Embedding, Linear
from server.engine.models.block import Block
from server.engine.models.config import HParams
from server.engine.models.used import predicts, used_tensors
from server.engine.ops import Cache, Norm, Ops, Span
from server.engine.weights import Weights

_log = logging.getLogger(__name__)


class Attention(Protocol):
    """x [n, hidden] += what the span's tokens attend to; reads and fills the layer's cache, whose kind the attention knows."""

    def __call__(self, x: Tensor, cache: Any, span: Span) -> None: ...


class FeedForward(Protocol):
    """x [n, hidden] += the layer's feed-forward block, dense or of experts."""

    def __call__(self, x: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """x += attention(norm(x)); x += feed_forward(norm(x)). Each part holds its norm."""

    attention: Attention
    ffn: FeedForward

    def __call__(self, x: Tensor, cache: Cache, span: Span) -> None:
        """x [n, hidden] float32, in place."""
        self.attention(x, cache, span)
        self.ffn(x)


@dataclass(frozen=True, slots=True)
class Transformer:
    """A whole model."""

    hparams: HParams
    vocab_size: int
    embedding: Embedding
    layers: Sequence[DecoderLayer]
    head: Linear  # with the final norm

    def forward(self, token_ids: Tensor, cache: Sequence[Cache], span: Span) -> Tensor:
        """token_ids [n] int64 at the span's positions -> hidden states [n, hidden] before the final norm; fills the cache."""
        x = self.embedding(token_ids)
        for layer, pages in zip(self.layers, cache, strict=True):
            layer(x, pages, span)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab] float32."""
        return self.head(hidden)[0]


class Family(Protocol):
    """How one architecture's tensors become a Transformer; one file a family, named in registry.py."""

    def __call__(self, weights: Weights, hparams: HParams, vocab_size: int, ops: Ops) -> Transformer: ...


def assemble(weights: Weights, hparams: HParams, vocab_size: int, ops: Ops, layer: Callable[[Block], DecoderLayer]) -> Transformer:
    """The family's layers between the embedding, final norm and head that all share; without output.weight the head is tied.

    A tied head is laid out for products as any matrix, and the embedding's rows are looked up where they lie in the file.
    """
    embedding = weights.table("token_embd.weight", vocab_size, hparams.hidden)
    head = weights.matrix("output.weight" if weights.has("output.weight") else "token_embd.weight", vocab_size, hparams.hidden)
    _leave_unused(weights, hparams)
    return Transformer(
        hparams=hparams,
        vocab_size=vocab_size,
        embedding=Embedding(ops, embedding, hparams.hidden),
        layers=[layer(Block(weights, hparams, ops, i)) for i in range(hparams.layers)],
        head=Linear(ops, (head,), (vocab_size,), Norm(weights.vector("output_norm.weight", hparams.hidden), hparams.norm_eps)),
    )


def _leave_unused(weights: Weights, hparams: HParams) -> None:
    left = weights.tensors.keys() - used_tensors(weights.tensors, hparams).keys()
    weights.leave(left)
    if predicting := sum(predicts(name, hparams) for name in left):
        _log.info("%d tensors for multi-token prediction are in the file and not used: this version generates without them.", predicting)
