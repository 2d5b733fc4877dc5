"""What a model takes of the GPU's memory, told before anything is loaded: weights, KV cache, and the scratch of the largest chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from gguf.constants import GGMLQuantizationType

from server.engine.gguf.header import TensorInfo
from server.engine.gguf.names import OUTPUT, TOKEN_EMBD
from server.engine.kernels import attention_plan
from server.engine.kernels.formats import FORMATS
from server.engine.models.config import HParams
from server.engine.models.used import is_joined, joined_halves, used_tensors
from server.errors import DeviceError

OPENED_BYTES = 64 << 20  # of bfloat16 weights that are opened at a time
RING_BYTES = 1 << 30  # of experts on their way to the GPU, and opened there
KEPT = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, *FORMATS})  # types that are on the GPU as they are in RAM
KERNELS_BYTES = 256 << 20  # what compiled kernels, cuBLAS and the allocator's roundings take beside


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of the GPU's memory by what they are for."""

    weights: int
    cache: int
    scratch: int
    ring: int  # of experts on their way, where prefill streams them

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.ring

    def check(self, free: int) -> None:
        """Raises DeviceError with the numbers where there is less than that."""
        if self.total > free:
            raise DeviceError(
                f"The model needs {self} of the GPU's memory, but {_gb(free)} are free. "
                "Lower --cache_lens or --prefill_chunk, close what else uses the GPU, or use --device cpu."
            )

    def __str__(self) -> str:
        return f"{_gb(self.total)} ({_gb(self.weights)} of weights, {_gb(self.cache)} of KV cache, {_gb(self.scratch + self.ring)} to work in)"


def no_memory_left(use: str, error: torch.OutOfMemoryError) -> DeviceError:
    """What to say where it ran out before anything was served, as when another program takes what was free when the plan was made."""
    return DeviceError(
        f"The GPU has no memory left {use} ({str(error).split('. ')[0]}). "
        "Lower --cache_lens or --prefill_chunk, close what else uses the GPU, or use --device cpu."
    )


def dense_bytes(tensors: Mapping[str, TensorInfo], hparams: HParams) -> int:
    """Bytes of the tensors that go to the GPU: all but routed experts, the embedding (unless it is the head as well), and what no layer takes."""
    used = used_tensors(tensors, hparams)
    tied = OUTPUT not in used
    return sum(_device_bytes(info, hparams) for name, info in used.items() if _is_dense(name, tied))


def _is_dense(name: str, tied: bool) -> bool:
    return tied if name == TOKEN_EMBD else "_exps." not in name


def _device_bytes(info: TensorInfo, hparams: HParams) -> int:
    """As in the file, or as what is made of it, but for types that have rows only, which are opened to bfloat16."""
    parts = joined_halves(info, hparams.latent) if hparams.latent and is_joined(info.name, hparams) else (info,)
    return sum(part.nbytes if part.type_id in KEPT else 2 * math.prod(part.shape) for part in parts)


def scratch_bytes(hparams: HParams, vocab_size: int, chunk: int) -> int:
    """The most that is alive at a time in a chunk of so many tokens: its hidden states and what the widest block makes of them."""
    h = hparams
    feed_forward = chunk * (4 + 4 + 2) * max(h.ffn, h.moe.shared_ffn if h.moe else 0)
    return 4 * chunk * 4 * h.hidden + max(_attention_bytes(h, chunk), feed_forward) + 2 * 4 * vocab_size + OPENED_BYTES + KERNELS_BYTES


def _attention_bytes(h: HParams, chunk: int) -> int:
    """Queries, keys and values, what they mix, and what the kernels take beside."""
    if h.latent is None:
        return 4 * chunk * (2 * h.heads + 2 * h.kv_heads) * h.head_dim + attention_plan.scratch_bytes(h.heads, h.head_dim, chunk, 2)
    latent = h.latent
    shape = attention_plan.LatentShape(h.heads, latent.kv_lora, latent.rope_dim, latent.nope_dim, latent.v_dim)
    activations = 4 * chunk * (h.heads * (h.head_dim + latent.v_dim) + latent.kv_lora + latent.rope_dim + (latent.q_lora or 0))
    return activations + attention_plan.latent_scratch_bytes(shape, chunk, h.context, 2)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
