"""Kernels compiled before they are needed, many at a time: one takes some seconds, a model uses some dozens, and a request should wait for none of them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from triton.runtime.jit import JITFunction


@contextmanager
def compile_only(executor: Executor) -> Iterator[None]:
    """Within, a launch does nothing but have its kernel compiled, by the executor, which is ended; at the end, all are there.

    Raises ImportError where this Triton (before 3.4) cannot compile so.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    launch = JITFunction.run

    def compile_it(kernel, *args, **kwargs):
        return launch(kernel, *args, **{**kwargs, "warmup": True})

    JITFunction.run = compile_it
    try:
        with executor, AsyncCompileMode(executor):
            yield
    finally:
        JITFunction.run = launch
