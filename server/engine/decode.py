"""Decode as one native call: the model's step for one token, recorded once from its own layers and replayed for each token.

No second description of a model is made for it. Whatever a family's layers ask of their Ops is written down, with the memory that it was asked for;
what changes from token to token is the token's id, its position and the pages of its sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.kv_cache import KVCache
from server.engine.models.transformer import Transformer
from server.engine.native import NativeOps
from server.engine.ops import Span


class DecodeProgram:
    """A model over a cache, one token at a time. The model's operations are those of `ops`, and its matrices are laid out."""

    def __init__(self, model: Transformer, cache: KVCache, ops: NativeOps) -> None:
        self._model = model  # the program reads its matrices
        token = torch.zeros(1, dtype=torch.int64)
        with torch.inference_mode(), ops.record() as self._program:
            self._logits = model.logits(model.forward(token, cache.layers, Span(0, 1, ())))[0]
        self._token = token.numpy()  # written to without a detour through torch

    def run(self, token_id: int, start: int, pages: tuple[int, ...]) -> Tensor:
        """Logits [vocab] after the token at position `start`: the same memory each time. Raises ValueError for a token that there is not."""
        self._token[0] = token_id
        self._program.run(start, pages)
        return self._logits
