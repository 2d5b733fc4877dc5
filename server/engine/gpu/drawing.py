"""What drawing a token on the GPU works on: memory that keeps its place, so that a CUDA graph can hold the kernels, and which of them a request needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024  # logits of one program
WORD = 32  # tokens of one word of a constraint's mask
WAY_BITS = 4
WAYS = 1 << WAY_BITS  # cutoffs that one pass of a search tries
PASSES = 8  # ceil(32 / WAY_BITS): a cutoff is one of 2^32 float32 values
MOST_LEADERS = 20  # likeliest tokens that a request may ask for
LEADER_SLOTS = 32
IN_PROMPT = 1 << 30  # a token's history: how often it was drawn, and this if it is in the prompt
NOT_FINITE = -1  # in the place of a token

# Where each of a step's scalars stands
UNIFORM, TEMPERATURE, REPETITION, PRESENCE, FREQUENCY, TOP_K, TOP_P, LEAST_WEIGHT, LEADERS = range(9)
SCALARS = 16


@dataclass(frozen=True, slots=True)
class Way:
    """Which parts of the drawing run; one graph each."""

    greedy: bool
    adjust: bool = False  # constraint, bias or penalties
    top_k: bool = False
    top_p: bool = False
    leaders: bool = False  # log probabilities


@dataclass(frozen=True, slots=True)
class DrawBuffers:
    """Pinned host memory is read and written by kernels in place; all else is on the device. `blocks` is ceil(vocab / BLOCK)."""

    scalars: Tensor  # pinned float64 [SCALARS], written by the host before each step
    token: Tensor  # pinned int32 [1], the answer: an id or NOT_FINITE
    leader_ids: Tensor  # pinned int32 [MOST_LEADERS], likeliest first
    logprobs: Tensor  # pinned float32 [1 + MOST_LEADERS]: the drawn token's, then the leaders'
    history: Tensor  # int32 [vocab], written by the host for a new request, then by the kernels
    bias: Tensor  # float32 [vocab], written by the host for a new request
    allowed: Tensor  # int32 [ceil(vocab / 32)], a bit a token, written by the host for a new request and for each step of a constrained one
    settings: Tensor  # float64 [SCALARS], the scalars as the step's first kernel has fetched them
    values: Tensor  # float32 [vocab], logits after constraint, bias and penalties
    weights: Tensor  # int64 [vocab]
    peaks: Tensor  # int64 [blocks], the key of each block's best
    sums: Tensor  # int64 [blocks], the weight of what stays of each block
    tallies: Tensor  # int64 [2, blocks, WAYS], what each block has at or above each cutoff tried; passes take turns
    floors: Tensor  # int64 [2 * PASSES + 1], what each pass of the searches knew when it began, and at last the cutoff
    drawn: Tensor  # int32 [1], the token again, for later kernels
    leaders: Tensor  # int64 [blocks, LEADER_SLOTS], keys of each block's likeliest
    block_max: Tensor  # float32 [blocks]
    block_sum: Tensor  # float32 [blocks], of exp(logit - block_max)


def draw_buffers(vocab: int, device: torch.device) -> DrawBuffers:
    """Memory for a vocabulary, about 21 bytes a token."""
    blocks, pin = -(-vocab // BLOCK), device.type != "cpu"

    def host(count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, pin_memory=pin)

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return DrawBuffers(
        scalars=host(SCALARS, torch.float64),
        token=host(1, torch.int32),
        leader_ids=host(MOST_LEADERS, torch.int32),
        logprobs=host(1 + MOST_LEADERS, torch.float32),
        history=room(vocab, dtype=torch.int32),
        bias=room(vocab, dtype=torch.float32),
        allowed=room(-(-vocab // WORD), dtype=torch.int32).fill_(-1),
        settings=room(SCALARS, dtype=torch.float64),
        values=room(vocab, dtype=torch.float32),
        weights=room(vocab, dtype=torch.int64),
        peaks=room(blocks, dtype=torch.int64),
        sums=room(blocks, dtype=torch.int64),
        tallies=room(2, blocks, WAYS, dtype=torch.int64),
        floors=room(2 * PASSES + 1, dtype=torch.int64),
        drawn=room(1, dtype=torch.int32),
        leaders=room(blocks, LEADER_SLOTS, dtype=torch.int64),
        block_max=room(blocks, dtype=torch.float32),
        block_sum=room(blocks, dtype=torch.float32),
    )
