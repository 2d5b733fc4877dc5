"""Training for Q4_K: the forward pass sees weights as Q4_K will store them, the gradients go to the exact ones (straight through).

Blocks of 256 along the rows, each of 8 sub-blocks of 32 values d * sc * q - dmin * m, with q of 4 bits and sc, m of 6 bits; see kquants.py
of the server for the format. The scales here are the plain ones of each sub-block's range, where the exporter searches for better.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recipes.tiny_r1.model import TinyR1

# These are exported in finer types, or not at all as blocks.
_FINER = ("embed_tokens", "lm_head", "gate.weight", "kv_b_proj")


@contextmanager
def q4_k_weights(model: TinyR1, active: bool) -> Iterator[None]:
    """Inside, the weights that the GGUF has in Q4_K hold what Q4_K keeps of them; the exact ones return at the end."""
    params = _quantised(model) if active else []
    with torch.no_grad():
        exact = [param.detach().clone() for param in params]
        for param in params:
            param.copy_(round_q4_k(param))
    yield
    with torch.no_grad():
        for param, value in zip(params, exact, strict=True):
            param.copy_(value)


def round_q4_k(weights: Tensor) -> Tensor:
    """[..., multiple of 256] -> the same after a round trip through Q4_K."""
    values = weights.reshape(-1, 8, 32)
    low = values.amin(-1).clamp(max=0)
    scale, minimum = _six_bits((values.amax(-1).clamp(min=0) - low) / 15), _six_bits(-low)
    step = torch.where(scale > 0, scale, torch.inf)[..., None]
    q = ((values + minimum[..., None]) / step).round().clamp(0, 15)
    return (q * scale[..., None] - minimum[..., None]).view_as(weights)


def _six_bits(scales: Tensor) -> Tensor:
    """Each block's 8 scales as multiples of a common half float."""
    unit = (scales.amax(-1, keepdim=True) / 63).half().float()
    return (scales / torch.where(unit > 0, unit, torch.inf)).round().clamp(0, 63) * unit


def _quantised(model: TinyR1) -> list[nn.Parameter]:
    return [param for name, param in model.named_parameters() if param.ndim > 1 and not any(part in name for part in _FINER)]
