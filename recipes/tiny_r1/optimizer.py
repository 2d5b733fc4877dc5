"""Muon for the matrices of the layers, AdamW for the rest, and V3's rule for the routers' biases.

Muon: momentum, made orthogonal by a Newton-Schulz iteration (Jordan et al. 2024), scaled so that an update is about as large as AdamW's
(Liu et al. 2025, arXiv:2502.16982, section 2.2): both take the same learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from recipes.tiny_r1.model import Gate, Load, TinyR1

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at 0, values end near 1


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions, or three: a stack of matrices. Matrices of one shape are updated together."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients; `closure` is not used."""
        for group in self.param_groups:
            for params in _by_shape(group["params"]):
                momenta = [self._momentum(param, group["momentum"]) for param in params]
                stack = torch.stack(momenta).view(-1, *params[0].shape[-2:])
                update = orthogonal(stack).view(len(params), *params[0].shape)
                scale = 0.2 * max(params[0].shape[-2:]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list((update * (-group["lr"] * scale)).unbind()))

    def _momentum(self, param: Tensor, momentum: float) -> Tensor:
        """Nesterov's."""
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        average: Tensor = state["momentum"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(average, momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, cols] -> the nearest orthogonal matrices, roughly: singular values between 0.7 and 1.2. In bfloat16 on a GPU."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    update: Tensor = x.mT if tall else x
    return update.to(matrices.dtype)


def optimizers(model: TinyR1, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside the layers; AdamW for embedding, head, routers and norms, without decay."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, param in model.named_parameters():
        inside = param.ndim > 1 and not any(part in name for part in ("embed_tokens", "lm_head", "gate.weight"))
        (matrices if inside else rest).append(param)
    fused = rest[0].is_cuda
    return [Muon(matrices, lr, 0.95, weight_decay), torch.optim.AdamW(rest, lr, (0.9, 0.95), 1e-10, 0.0, fused=fused)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, stable, and a linear decay over the last third (WSD). It depends on the step alone, never on the clock."""
    warmup, decay = min(200, steps // 10), steps // 3
    return peak * min((step + 1) / max(warmup, 1), 1.0, (steps - step) / max(decay, 1))


@torch.no_grad()
def balance(gates: list[Gate], loads: list[Load], speed: float) -> None:
    """Experts with more than the mean load become less attractive, the others more (V3, section 2.1.2, without an auxiliary loss)."""
    for gate, load in zip(gates, loads, strict=True):
        gate.e_score_correction_bias += speed * (load.counts.mean() - load.counts).sign()


def _by_shape(params: Iterable[Tensor]) -> list[list[Tensor]]:
    shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for param in params:
        if param.grad is not None:
            shapes[param.shape].append(param)
    return list(shapes.values())
