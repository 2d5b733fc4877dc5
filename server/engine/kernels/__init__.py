"""What the GPU stage computes with: Triton kernels, and a plain torch twin of each, which the tests hold them to and which runs on any device.

The kernels need a GPU of compute capability 8.0; older ones, and a CPU in the tests, get the twins.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One maker's functions. Where each is defined says what it computes; activations are float32, and `out` is always the caller's."""

    name: str
    matvec: Kernel  # matvec.py
    dequantize: Kernel  # dequantize.py
    rms_norm: Kernel  # norm.py
    swiglu: Kernel  # swiglu.py
    route: Kernel  # route.py
    attend: Kernel  # attention.py
    attend_latent: Kernel  # latent.py
    gated: Kernel  # grouped.py
    grouped: Kernel  # grouped.py
    combine: Kernel  # grouped.py
    send: Kernel  # handoff.py
    receive: Kernel  # handoff.py
    fetch: Kernel  # handoff.py
    draw: Kernel  # sample.py
    compile_only: Callable[[Executor], AbstractContextManager[None]] | None = None  # ahead.py; None where nothing is compiled


def plain_kernels() -> Kernels:
    """The twins."""
    from server.engine.kernels import plain_attention, plain_grouped, plain_small, plain_tiles

    return Kernels(
        "plain",
        plain_tiles.matvec,
        plain_tiles.dequantize,
        plain_small.rms_norm,
        plain_small.swiglu,
        plain_small.route,
        plain_attention.attend,
        plain_attention.attend_latent,
        plain_grouped.gated,
        plain_grouped.grouped,
        plain_grouped.combine,
        plain_small.send,
        plain_small.receive,
        plain_small.fetch,
        plain_small.draw,
    )


def triton_kernels() -> Kernels:
    """Raises ImportError where Triton is not installed."""
    from server.engine.kernels import ahead, attention, dequantize, grouped, handoff, latent, matvec, norm, route, sample, swiglu

    return Kernels(
        "triton",
        matvec.matvec,
        dequantize.dequantize,
        norm.rms_norm,
        swiglu.swiglu,
        route.route,
        attention.attend,
        latent.attend_latent,
        grouped.gated,
        grouped.grouped,
        grouped.combine,
        handoff.send,
        handoff.receive,
        handoff.fetch,
        sample.draw,
        ahead.compile_only,
    )
