"""Measures a `Pace` at start, with a real layer: the pool and the GPU compute a few chunks of tokens that choose at random.

It takes as long as some twenty layers of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from server.engine.gpu.roads import Line, Pace, Sample, fit
from server.engine.gpu.stream import Chunk, CpuExperts, ExpertWeights, StreamedExperts
from server.engine.kernels.plain_grouped import TILE_MEANS

_TURNS = 2  # of which the shortest counts: the first one compiles, and grows buffers
_BESIDE = 3  # layers that both sides compute together, to learn how they slow each other down


def measure_pace(
    streamed: StreamedExperts, layer: ExpertWeights, cpu: CpuExperts, top_k: int, most: int, device: torch.device, unlocked: ExpertWeights | None = None
) -> Pace:
    """The pace of this layer, up to `most` tokens; `unlocked` is another one that could not be page-locked, if there is one.

    `cpu` computes the layer on the pool, as for StreamedExperts.run, and is called on this thread. The pace is set as the stream's own.
    """
    sizes = sorted({min(16, most), min(128, most), most})
    pool = fit([_time_pool(layer, cpu, n, top_k) for n in sizes])
    link = _cost_of_bytes(streamed, layer, sizes[0], top_k, device)
    products = fit([_best(streamed, _chunk(layer, n, top_k, device), copies=False) for n in sizes])
    pace = Pace(pool, link, products, None if unlocked is None else _cost_of_bytes(streamed, unlocked, sizes[0], top_k, device))
    streamed.pace = pace
    for _ in range(_BESIDE):
        chunk = _chunk(layer, most, top_k, device)
        streamed.run(layer, chunk.y, chunk.ids, chunk.weights, chunk.out, cpu)
    return pace


def warm_up(streamed: StreamedExperts, layers: Iterable[ExpertWeights], top_k: int, most: int, device: torch.device) -> None:
    """Have every kernel compiled that chunks of up to `most` tokens can ask for, however they crowd on experts: one layer of each kind is enough."""
    kinds = {tuple((m.type_id, m.rows, m.cols) for m in (layer.gate, layer.up, layer.down)): layer for layer in layers}
    for layer in kinds.values():
        for n in (*TILE_MEANS, TILE_MEANS[-1] + 1):  # which all tokens' experts have
            if n <= most:
                streamed.time(_chunk(layer, n, top_k, device, top_k), copies=False)


def _cost_of_bytes(streamed: StreamedExperts, layer: ExpertWeights, n: int, top_k: int, device: torch.device) -> Line:
    sample = _best(streamed, _chunk(layer, n, top_k, device))
    return Line(sample.seconds / sample.load.nbytes, 0)


def _best(streamed: StreamedExperts, chunk: Chunk, copies: bool = True) -> Sample:
    return _shortest([streamed.time(chunk, copies) for _ in range(_TURNS)])


def _time_pool(layer: ExpertWeights, cpu: CpuExperts, n: int, top_k: int) -> Sample:
    chunk, samples = _chunk(layer, n, top_k, torch.device("cpu")), []
    load = layer.shape(top_k).load(len(set(chunk.ids.flatten().tolist())), n * top_k)
    for _ in range(_TURNS):
        start = time.perf_counter()
        cpu(chunk.y, chunk.ids, chunk.weights, chunk.out)
        samples.append(Sample(load, time.perf_counter() - start))
    return _shortest(samples)


def _shortest(samples: Sequence[Sample]) -> Sample:
    return min(samples, key=lambda sample: sample.seconds)


def _chunk(layer: ExpertWeights, n: int, top_k: int, device: torch.device, among: int | None = None) -> Chunk:
    """Random tokens, each with top_k of the first `among` experts, or of all. As uneven as chance has it: equal numbers would be too good for tiles."""
    random, hidden = torch.Generator().manual_seed(n), layer.gate.cols
    ids: Tensor = torch.rand(n, among or layer.gate.count, generator=random).topk(top_k).indices.int().contiguous()
    y, weights, out = torch.randn(n, hidden, generator=random), torch.full((n, top_k), 1 / top_k), torch.zeros(n, hidden)
    return Chunk(layer, y.to(device), ids.to(device), weights.to(device), out.to(device))
