"""Random models at the shapes of real ones, to measure speed with: every tensor that such a file has, in the types that it would have.

The bytes are fresh random blocks, no two alike, so that caches and compression gain nothing. What a random model must take care of is its routing:
a prefill is as fast as the experts that its tokens touch. Embeddings have standard deviation 1 and everything that is added to the residual stream is
small beside them, so that a token's hidden state stays mostly its own and the routers, whose logits then have deviation 1, spread tokens evenly.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from server.engine.gguf.mix import Mix, Model, TypeChooser
from server.engine.gguf.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD, block
from server.engine.gguf.quants import random_blocks, row_bytes
from server.engine.gguf.writer import TensorData, write_gguf, write_split_gguf
from server.engine.models.shapes import SIGMOID, Shape

CHUNK = 4 << 20  # bytes made at once; some chunks wait to be written, so that memory stays below 200 MB
TO_RESIDUAL = 0.0005  # standard deviation of what writes to the residual stream
BIAS = 0.01  # of biases: small beside what they are added to

Progress = Callable[[int], None]  # bytes written so far


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor: its name, shape (numpy order), and the distribution of its values."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0  # other than 0 in norms alone, which are F32


def plan(shape: Shape, mix: Mix, seed: int = 0) -> list[TensorData]:
    """The model's tensors, to be written; nothing is made yet. The same seed gives the same bytes."""
    queries_per_value = shape["attention.head_count"] // shape["attention.head_count_kv"]
    kind_of = TypeChooser(mix, Model(shape.layers, shape["expert_count"], shape.tied, queries_per_value))
    return [_tensor(weight, kind_of(weight.name, weight.shape), (seed, index)) for index, weight in enumerate(weights(shape))]


def write_synthetic(path: Path, name: str, shape: Shape, mix: Mix, *, seed: int = 0, parts: int = 1, progress: Progress | None = None) -> list[Path]:
    """Write the model to `path`, or to `parts` files beside it; return what was written. `name` goes into general.name."""
    tensors = plan(shape, mix, seed)
    if progress is not None:
        tensors = _counted(tensors, progress)
    metadata = synthetic_metadata(name, shape, mix)
    if parts > 1:
        return write_split_gguf(path, metadata, tensors, parts)
    write_gguf(path, metadata, tensors)
    return [path]


def synthetic_metadata(name: str, shape: Shape, mix: Mix) -> dict[str, object]:
    """What a converter would write, without a tokenizer: llama.cpp and this server then take token ids as they are."""
    metadata: dict[str, object] = {
        "general.architecture": shape.architecture,
        "general.type": "model",
        "general.name": f"synthetic {name}",
        "general.file_type": int(mix.file_type),
        "general.quantization_version": 2,
        **shape.metadata(),
        "tokenizer.ggml.model": "none",
    }
    if shape["attention.kv_lora_rank"] and not shape["attention.q_lora_rank"] and shape.layers not in (26, 27):
        metadata["deepseek2.attention.q_lora_rank"] = 0  # llama.cpp knows by 26 or 27 layers alone that it may be missing
    return metadata


# --- The tensors of each family ----------------------------------------------


def weights(shape: Shape) -> Iterator[Weight]:
    """Every tensor of the model, in the order of a converted file."""
    hidden, vocab = shape["embedding_length"], shape["vocab_size"]
    yield Weight(TOKEN_EMBD, (vocab, hidden), 1.0)
    for layer in range(shape.layers):
        yield _norm(block(layer, "attn_norm"), hidden)
        yield from _latent_attention(shape, layer) if shape["attention.kv_lora_rank"] else _grouped_attention(shape, layer)
        yield _norm(block(layer, "post_attention_norm" if shape.architecture == "glm4moe" else "ffn_norm"), hidden)
        if layer < shape.leading_dense:
            yield from _swiglu(layer, "", hidden, shape["feed_forward_length"])
        else:
            yield from _experts(shape, layer)
    yield _norm(OUTPUT_NORM, hidden)
    if not shape.tied:
        yield _projection(OUTPUT, vocab, hidden)


def _latent_attention(shape: Shape, layer: int) -> Iterator[Weight]:
    """Multi-head latent attention with kv_b split in two, as converters have written it since 2025."""
    hidden, heads = shape["embedding_length"], shape["attention.head_count"]
    q_lora, kv_lora = shape["attention.q_lora_rank"], shape["attention.kv_lora_rank"]
    rope, v_dim = shape["rope.dimension_count"], shape["attention.value_length_mla"]
    if q_lora:
        yield _projection(block(layer, "attn_q_a"), q_lora, hidden)
        yield _norm(block(layer, "attn_q_a_norm"), q_lora)
        yield _projection(block(layer, "attn_q_b"), heads * shape.head_dim, q_lora)
    else:
        yield _projection(block(layer, "attn_q"), heads * shape.head_dim, hidden)
    yield _projection(block(layer, "attn_kv_a_mqa"), kv_lora + rope, hidden)
    yield _norm(block(layer, "attn_kv_a_norm"), kv_lora)
    # attn_k_b is stored transposed, [kv_lora, nope], but it is kv_lora values that it sums over.
    yield Weight(block(layer, "attn_k_b"), (heads, kv_lora, shape.head_dim - rope), 1 / math.sqrt(kv_lora))
    yield Weight(block(layer, "attn_v_b"), (heads, v_dim, kv_lora), 1 / math.sqrt(kv_lora))
    yield Weight(block(layer, "attn_output"), (hidden, heads * v_dim), TO_RESIDUAL)


def _grouped_attention(shape: Shape, layer: int) -> Iterator[Weight]:
    hidden, head_dim = shape["embedding_length"], shape.head_dim
    for part, heads in (("q", "attention.head_count"), ("k", "attention.head_count_kv"), ("v", "attention.head_count_kv")):
        rows = shape[heads] * head_dim
        yield _projection(block(layer, f"attn_{part}"), rows, hidden)
        if shape.architecture in ("qwen2moe", "glm4moe"):
            yield Weight(f"blk.{layer}.attn_{part}.bias", (rows,), BIAS)
        if shape.architecture in ("qwen3", "qwen3moe") and part != "v":
            yield _norm(block(layer, f"attn_{part}_norm"), head_dim)
    yield Weight(block(layer, "attn_output"), (hidden, shape["attention.head_count"] * head_dim), TO_RESIDUAL)


def _experts(shape: Shape, layer: int) -> Iterator[Weight]:
    hidden, count = shape["embedding_length"], shape["expert_count"]
    yield _projection(block(layer, "ffn_gate_inp"), count, hidden)
    if shape["expert_gating_func"] == SIGMOID:
        yield Weight(f"blk.{layer}.exp_probs_b.bias", (count,), BIAS)
    yield from _swiglu(layer, "_exps", hidden, shape.expert_ffn, count)
    if shape.shared_ffn:
        yield from _swiglu(layer, "_shexp", hidden, shape.shared_ffn)
    if shape.architecture == "qwen2moe":
        yield Weight(block(layer, "ffn_gate_inp_shexp"), (hidden,), 1 / math.sqrt(hidden))


def _swiglu(layer: int, suffix: str, hidden: int, ffn: int, count: int | None = None) -> Iterator[Weight]:
    """Gate, up and down of one feed-forward block, or of `count` experts."""
    experts = () if count is None else (count,)
    for part in ("ffn_gate", "ffn_up"):
        yield Weight(block(layer, part + suffix), (*experts, ffn, hidden), 1 / math.sqrt(hidden))
    yield Weight(block(layer, "ffn_down" + suffix), (*experts, hidden, ffn), TO_RESIDUAL)


def _projection(name: str, rows: int, cols: int) -> Weight:
    """A matrix that keeps the size of what it multiplies."""
    return Weight(name, (rows, cols), 1 / math.sqrt(cols))


def _norm(name: str, length: int) -> Weight:
    return Weight(name, (length,), 0.1, mean=1.0)


# --- Their bytes -------------------------------------------------------------


def _tensor(weight: Weight, kind: GGMLQuantizationType, seed: tuple[int, int]) -> TensorData:
    return TensorData(weight.name, weight.shape, kind, lambda: _chunks(weight, kind, seed))


def _chunks(weight: Weight, kind: GGMLQuantizationType, seed: tuple[int, int]) -> Iterator[memoryview]:
    """The tensor's bytes in order, made by as many threads as there are CPUs; numpy draws without the GIL."""
    rows, cols = math.prod(weight.shape[:-1]), weight.shape[-1]
    step = max(1, CHUNK // row_bytes(kind, cols))

    def make(first: int) -> memoryview:
        rng = np.random.Generator(np.random.SFC64((*seed, first)))  # a stream of its own, whichever thread it is
        return _blocks(weight, kind, min(step, rows - first), cols, rng)

    starts = iter(range(0, rows, step))
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[memoryview]] = deque(pool.submit(make, first) for first in itertools.islice(starts, 2 * threads))
        while waiting:
            chunk = waiting.popleft().result()
            waiting.extend(pool.submit(make, first) for first in itertools.islice(starts, 1))
            yield chunk


def _blocks(weight: Weight, kind: GGMLQuantizationType, rows: int, cols: int, rng: np.random.Generator) -> memoryview:
    if kind is GGMLQuantizationType.F32:
        return (rng.standard_normal((rows, cols), np.float32) * np.float32(weight.std) + np.float32(weight.mean)).data
    return random_blocks(kind, rows, cols, weight.std, rng).data


def _counted(tensors: list[TensorData], progress: Progress) -> list[TensorData]:
    """The same tensors, which tell how many bytes they have yielded together."""
    done = 0

    def counted(tensor: TensorData) -> Iterator[bytes | memoryview]:
        nonlocal done
        for chunk in tensor.chunks():
            yield chunk
            done += memoryview(chunk).nbytes
            progress(done)

    def wrap(tensor: TensorData) -> TensorData:
        return TensorData(tensor.name, tensor.shape, tensor.type_id, lambda: counted(tensor))

    return [wrap(tensor) for tensor in tensors]
