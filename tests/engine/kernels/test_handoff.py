"""The kernels of the hand-over: what is sent arrives, what arrives is added; flags hold the stream until they are raised."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from server.engine.kernels import handoff, plain_small


def host(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


@pytest.mark.parametrize(("n", "hidden", "top_k"), [(1, 7, 2), (1, 2048, 8), (3, 513, 6), (1, 4, 300)])
@pytest.mark.parametrize("send", [handoff.send, plain_small.send])
def test_what_is_sent_arrives(device: str, n: int, hidden: int, top_k: int, send: Callable[..., None]) -> None:
    y, ids = torch.randn(n + 1, hidden, device=device)[:n], torch.randint(1, 256, (n + 1, top_k), dtype=torch.int32, device=device)[:n]
    weights = torch.rand(n + 1, top_k, device=device)[:n]
    to = (host(n + 1, hidden).fill_(-7), host(n + 1, top_k, dtype=torch.int32).fill_(-7), host(n + 1, top_k).fill_(-7))
    send(y, ids, weights, *(t[:n] for t in to))
    if device == "cuda":
        torch.cuda.synchronize()
    for sent, arrived in zip((y, ids, weights), to, strict=True):
        assert torch.equal(sent.cpu(), arrived[:n])
        assert (arrived[n:] == -7).all()  # nothing beyond the end


@pytest.mark.parametrize("size", [1, 511, 512, 7168])
@pytest.mark.parametrize("receive", [handoff.receive, plain_small.receive])
def test_what_arrives_is_added(device: str, size: int, receive: Callable[..., None]) -> None:
    out, pinned = torch.randn(1, size, device=device), host(1, size).normal_()
    expected = out.cpu() + pinned
    receive(out, pinned)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.int32), (129, torch.int32), (511, torch.float32), (7168, torch.float32)])
@pytest.mark.parametrize("fetch", [handoff.fetch, plain_small.fetch])
def test_what_is_fetched_is_there(device: str, size: int, dtype: torch.dtype, fetch: Callable[..., None]) -> None:
    out, pinned = torch.full((size + 1,), -7, dtype=dtype, device=device), host(size, dtype=dtype)
    pinned.copy_(torch.randint(0, 1000, (size,)))
    fetch(out[:size], pinned)
    assert torch.equal(out[:size].cpu(), pinned)
    assert out[size] == -7  # nothing beyond the end


def test_a_raised_flag_is_passed(device: str) -> None:
    flag = host(1, dtype=torch.int32)
    handoff.raise_flag(flag, 3)
    handoff.await_flag(flag)
    handoff.await_flag(flag, 3)
    if device == "cuda":
        torch.cuda.synchronize()
    assert flag.item() == 3


@pytest.mark.gpu
def test_the_stream_waits_for_the_host() -> None:
    flag, out, pinned = host(1, dtype=torch.int32), torch.zeros(1, 4000, device="cuda"), host(1, 4000)
    flag.fill_(1)
    handoff.await_flag(flag)  # compiled before the clock runs
    flag.zero_()
    torch.cuda.synchronize()

    def answer() -> None:
        pinned.fill_(5.0)
        flag.fill_(1)

    handoff.await_flag(flag)
    handoff.receive(out, pinned)
    timer = threading.Timer(0.05, answer)
    timer.start()
    torch.cuda.synchronize()
    timer.join()
    assert (out == 5.0).all()
