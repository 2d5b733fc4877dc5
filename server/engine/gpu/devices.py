"""Which GPU a model runs on, if any, and what it can do."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

import torch

from server.engine.kernels import Kernels, plain_kernels, triton_kernels
from server.errors import DeviceError

if TYPE_CHECKING:
    from server.config import Device

_log = logging.getLogger(__name__)

TRITON_CAPABILITY = (8, 0)  # from which on the kernels run


def find_gpu(wanted: Device) -> torch.device | None:
    """The GPU to use, None for the CPU. Raises DeviceError where one is asked for and there is none that torch can use."""
    if wanted == "cpu":
        return None
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "cuda":
        raise DeviceError(f"--device cuda: {_why_none()}, or use --device cpu.")
    return None


def _why_none() -> str:
    if torch.version.cuda is None:
        return "this torch is a build for CPUs alone. Install one for CUDA (pip install --force-reinstall torch, without a CPU index)"
    return "torch finds no GPU. Check that nvidia-smi shows it, and that CUDA_VISIBLE_DEVICES does not hide it"


def kernels_for(device: torch.device) -> Kernels:
    """Triton's kernels where the GPU and the install have what they need, their plain twins elsewhere."""
    if device.type != "cuda":
        return plain_kernels()
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        _log.warning("This GPU has compute capability %d.%d, and the fast kernels need 8.0: plain torch runs instead, slower.", *capability)
        return plain_kernels()
    if importlib.util.find_spec("triton") is None:
        _log.warning("Triton is not installed, so plain torch runs on the GPU, slower. Install it with: pip install triton")
        return plain_kernels()
    return triton_kernels()
