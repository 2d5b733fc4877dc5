"""The Triton kernels run on the GPU where there is one, else on CPU tensors in Triton's interpreter, and are held to their twins in plain torch.

The interpreter is chosen by an environment variable that Triton reads when it is imported: tests/conftest.py sets it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class _WithoutTriton(pytest.Module):
    """A module of tests that cannot be imported here."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("Triton is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Tests of the twins alone, test_plain*.py, run without Triton."""
    if _HAS_TRITON or module_path.name.startswith("test_plain"):
        return None
    return _WithoutTriton.from_parent(parent, path=module_path)


def _let_loaded_numbers_bound_loops() -> None:
    """Triton's interpreter holds a scalar as an array of one value, which NumPy from 2.4 on does not take for an integer."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_further(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_further


def _let_bfloat16_multiply() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: dot(self, widened(a), widened(b), *others)


if _HAS_TRITON and not _HAS_GPU:
    _let_loaded_numbers_bound_loops()
    _let_bfloat16_multiply()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels and their tensors are: "cuda", or "cpu" for the interpreter."""
    return "cuda" if _HAS_GPU else "cpu"
