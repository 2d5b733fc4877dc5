"""Tensor names: GGUF's own, and how the tensors of a transformers model become GGUF's.

A tensor of block N is `blk.N.<part>.weight`; the rest has fixed names. The engine asks for `block(n, "attn_q")`; a part that a family has
not is simply never asked for. Writers go through `hf_to_gguf`, which renames and, for llama, reorders the rows of q and k.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from numpy.typing import NDArray

TOKEN_EMBD = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"  # absent where the head is tied to token_embd

LLAMA_PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
QWEN3_PARTS = (*LLAMA_PARTS, "attn_q_norm", "attn_k_norm")
INTERLEAVED_ROPE = frozenset({"llama"})  # architectures whose GGUF rows of q and k are in the order of interleaved rope

_BLOCK = re.compile(r"blk\.(\d+)\.")
_LAYER = re.compile(r"(?<=layers\.)\d+")


def block(layer: int, part: str) -> str:
    """The name of a block's weight: block(3, "attn_q") is "blk.3.attn_q.weight"."""
    return f"blk.{layer}.{part}.weight"


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to; None for those of no block."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


def hf_to_gguf(arch: str, name: str, rows: NDArray[np.generic], heads: int, kv_heads: int) -> tuple[str, NDArray[np.generic]]:
    """A tensor of a transformers state dict -> its GGUF name and its rows in GGUF's order.

    rows: [out, ...], float values or quantised blocks: only whole rows move. heads, kv_heads: of the attention.
    Raises ValueError where the architecture has no such tensor.
    """
    target = gguf_name(arch, name)
    if arch in INTERLEAVED_ROPE and target.endswith((".attn_q.weight", ".attn_k.weight")):
        rows = interleave_rope_rows(rows, heads if "attn_q" in target else kv_heads)
    return target, rows


def gguf_name(arch: str, name: str) -> str:
    """The GGUF name of a tensor of a transformers state dict. Raises ValueError where there is none."""
    layer = _LAYER.search(name)
    mapped = _name_map(arch).get_name(_LAYER.sub("0", name), try_suffixes=(".weight", ".bias"))
    if mapped is None:
        raise ValueError(f"{arch} has no GGUF name for the tensor {name!r}")
    return mapped.replace("blk.0.", f"blk.{layer[0]}.") if layer else mapped


def interleave_rope_rows(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Reorder the rows [heads * dim, ...] of a q or k projection for rope on neighbouring values.

    transformers rotates row i of a head together with row i + dim / 2 (rotate-half); llama's GGUF files have such a pair side by side, at
    2i and 2i + 1. Both give the same attention, since q and k are reordered alike.
    """
    dim = rows.shape[0] // heads
    pairs = rows.reshape(heads, 2, dim // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@cache
def _name_map(arch: str) -> TensorNameMap:
    """gguf's map for one layer; other layers differ by the number alone."""
    for member, member_name in MODEL_ARCH_NAMES.items():
        if member_name == arch:
            return get_tensor_name_map(MODEL_ARCH(member), 1)
    raise ValueError(f"gguf knows no architecture {arch!r}")
