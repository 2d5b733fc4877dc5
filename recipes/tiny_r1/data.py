"""Training batches: texts are drawn, tokenised and packed into rows. A batch depends on the seed and its number alone, so training resumes anywhere.

A batch is uint16 [rows, length]. The lower 15 bits are the token; bit 15 says that the token is to be learnt: the last reply of each text, from
<think> to EOS. Every text starts with BOS, which is how the trainer keeps texts of a row apart.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from recipes.tiny_r1.documents import document
from recipes.tiny_r1.tokenizer import ASSISTANT_ID, PAD_ID, Encoder

Batch = NDArray[np.uint16]
LEARNT = 0x8000
_MISSES = 24  # texts in a row that fit nowhere, after which a batch counts as full
_AHEAD = 8  # batches that each worker may be ahead


@dataclass(frozen=True, slots=True)
class Packing:
    """What batches are made of; goes to the worker processes."""

    tokenizer: str  # as JSON
    seed: int
    rows: int
    length: int


def corpus(seed: int, texts: int) -> list[str]:
    """Texts to train the tokenizer on."""
    rng = random.Random(f"corpus {seed}")
    return [document(rng) for _ in range(texts)]


def batches(packing: Packing, start: int, workers: int) -> Iterator[Batch]:
    """Batches from number `start` on, for ever, made by `workers` processes; by this one for 0."""
    if not workers:
        _start_worker(packing)
        yield from map(make_batch, itertools.count(start))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork
    with multiprocessing.get_context("fork").Pool(workers, _start_worker, (packing,)) as pool:
        numbers = itertools.count(start)
        waiting = deque(pool.apply_async(make_batch, (number,)) for number in itertools.islice(numbers, workers * _AHEAD))
        for number in numbers:
            waiting.append(pool.apply_async(make_batch, (number,)))
            yield waiting.popleft().get()


def make_batch(number: int) -> Batch:
    """Draw texts and put each into the fullest row that has room, until few fit any more."""
    packing, encode = _worker
    rng = random.Random(f"batch {packing.seed} {number}")
    batch = np.full((packing.rows, packing.length), PAD_ID, np.uint16)
    room = np.full(packing.rows, packing.length)
    misses = 0
    while misses < _MISSES:
        ids = tokens(encode, document(rng))
        fitting = np.where(room >= len(ids), room, packing.length + 1)
        row = int(fitting.argmin())
        if fitting[row] > packing.length:
            misses += 1
            continue
        start = packing.length - room[row]
        batch[row, start : start + len(ids)] = ids
        room[row] -= len(ids)
    return batch


def tokens(encode: Encoder, text: str) -> Batch:
    """A text's tokens, those of the last reply marked as learnt."""
    ids = np.array(encode(text), np.uint16)
    reply = int(np.flatnonzero(ids == ASSISTANT_ID)[-1]) + 1
    ids[reply:] |= LEARNT
    return ids


_worker: tuple[Packing, Encoder]  # set once in each process that makes batches


def _start_worker(packing: Packing) -> None:
    global _worker
    _worker = packing, Encoder(Tokenizer.from_str(packing.tokenizer))
