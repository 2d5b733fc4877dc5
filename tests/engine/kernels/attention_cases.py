"""What the attention tests share: sequences cut into steps, and how the reference, the plain twins and the kernels run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.gpu.matrix import DeviceMatrix
from server.engine.gpu.place import Place
from server.engine.kernels import plain_attention
from server.engine.kv_cache import PAGE_SIZE
from server.engine.layers.reference import ReferenceOps
from server.engine.layers.rope import rotation
from server.engine.ops import KVPages, LatentPages, Norm, Rotation, Span

PAGES = (5, 2, 6, 0, 3)  # as a sequence may hold them, of 7 in the cache
F32 = 0  # GGUF's id


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||."""
    return float((got.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


def place(start: int, n: int, device: str, captured: bool) -> Place:
    """captured: as in a recorded step, whose end is the capacity."""
    end = len(PAGES) * PAGE_SIZE if captured else start + n
    return Place(torch.tensor([start], dtype=torch.int32, device=device), torch.tensor(PAGES, dtype=torch.int32, device=device), n, end)


def blank(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Pages as fresh memory may be: no value in them may reach a result."""
    return torch.full((7, *shape), torch.nan, dtype=dtype, device=device)


def span(start: int, n: int) -> Span:
    return Span(start, n, PAGES[: -(-(start + n) // PAGE_SIZE)])


@dataclass(frozen=True)
class How:
    """Where a sequence runs: its steps' lengths, and types and device of activations and cache."""

    cuts: Sequence[int]
    dtype: torch.dtype = torch.float64
    cache: torch.dtype = torch.float64
    device: str = "cpu"
    captured: bool = False
    filled: int = 0  # tokens before them, which the twin puts into the cache

    def steps(self) -> list[tuple[int, int]]:
        """Each step's first position and its tokens; the one that fills the cache is not among them."""
        starts = [self.filled + sum(self.cuts[:i]) for i in range(len(self.cuts))]
        return list(zip(starts, self.cuts, strict=True))

    def tokens(self) -> int:
        return self.filled + sum(self.cuts)

    def put(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def rotation(self, dim: int, interleaved: bool) -> Rotation:
        turns = rotation(dim, 100.0, len(PAGES) * PAGE_SIZE, interleaved=interleaved)
        return Rotation(turns.table.to(self.device), interleaved)


@dataclass(frozen=True)
class Grouped:
    """A layer of grouped-query attention."""

    heads: int
    kv_heads: int
    dim: int
    rot: int
    interleaved: bool = False

    def run(self, attend: Callable[..., None] | None, how: How) -> Tensor:
        """The outputs of all tokens, [tokens, heads, dim], by a twin or kernel, or by the reference without one."""
        tokens = how.tokens()
        q, k, v = (3 * draw(tokens, self.heads, self.dim, seed=1), draw(tokens, self.kv_heads, self.dim, seed=2), draw(tokens, self.kv_heads, self.dim, seed=3))
        turns = how.rotation(self.rot, self.interleaved)
        cache = KVPages(
            blank(self.kv_heads, self.dim, PAGE_SIZE, dtype=how.cache, device=how.device),
            blank(self.kv_heads, PAGE_SIZE, self.dim, dtype=how.cache, device=how.device),
        )

        def step(attend: Callable[..., None] | None, start: int, n: int) -> Tensor:
            part = [how.put(t[start : start + n]) for t in (q, k, v)]
            out = torch.full_like(part[0], torch.nan)
            if attend is None:
                ReferenceOps().attend(*part, turns, cache, span(start, n), self.dim**-0.5, out)
            else:
                attend(*part, turns, cache, place(start, n, how.device, how.captured), self.dim**-0.5, out)
            return out

        if how.filled:
            step(plain_attention.attend, 0, how.filled)
        return torch.cat([step(attend, start, n) for start, n in how.steps()])


@dataclass(frozen=True)
class Latent:
    """A layer of multi-head latent attention."""

    heads: int
    kv_lora: int
    rope: int
    nope: int
    v_dim: int

    def run(self, attend_latent: Callable[..., None] | None, how: How) -> Tensor:
        """The outputs of all tokens, [tokens, heads, v_dim], by a twin or kernel, or by the reference without one."""
        tokens = how.tokens()
        q, latent = 2 * draw(tokens, self.heads, self.nope + self.rope, seed=1), 3 * draw(tokens, self.kv_lora + self.rope, seed=2)
        norm = Norm((1 + 0.2 * draw(self.kv_lora, seed=3)).to(how.device), 1e-6)
        k_b, v_b = (
            how.put(t) for t in (draw(self.heads, self.kv_lora, self.nope, seed=4) / self.nope**0.5, draw(self.heads, self.v_dim, self.kv_lora, seed=5))
        )
        turns = how.rotation(self.rope, interleaved=True)
        cache = LatentPages(blank(PAGE_SIZE, self.kv_lora + self.rope, dtype=how.cache, device=how.device))

        def step(attend_latent: Callable[..., None] | None, start: int, n: int) -> Tensor:
            part = [how.put(t[start : start + n]) for t in (q, latent)]
            out = torch.full((n, self.heads, self.v_dim), torch.nan, dtype=how.dtype, device=how.device)
            if attend_latent is None:
                ReferenceOps().attend_latent(*part, norm, turns, cache, span(start, n), k_b, v_b, 0.2, out)
            else:
                where = place(start, n, how.device, how.captured)
                attend_latent(*part, norm, turns, cache, where, _matrix(k_b), _matrix(v_b), 0.2, out, DenseHeads())
            return out

        if how.filled:
            step(plain_attention.attend_latent, 0, how.filled)
        return torch.cat([step(attend_latent, start, n) for start, n in how.steps()])


class DenseHeads:
    """The products of heads' matrices that are plain floats; the real kernels have tests of their own."""

    def matvec(self, m: DeviceMatrix, x: Tensor, out: Tensor) -> None:
        assert x.shape[0] <= 8
        out.copy_(torch.einsum("hrc,nhc->nhr", m.data, x))

    def dequantize(self, m: DeviceMatrix, out: Tensor, first_row: int = 0, matrices: Tensor | None = None) -> None:
        out.copy_(m.data if matrices is None else m.data[matrices.long()])


def _matrix(weights: Tensor) -> DeviceMatrix:
    return DeviceMatrix(F32, *weights.shape[1:], weights.shape[0], weights)
