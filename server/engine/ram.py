"""What a model takes of RAM, told before its gigabytes are read: without that, the kernel would end the process somewhere on the way, and say nothing."""

from __future__ import annotations

from collections.abc import Mapping

from server.engine.gguf.header import TensorInfo
from server.engine.gguf.names import OUTPUT, TOKEN_EMBD
from server.engine.kernels.formats import FORMATS
from server.engine.limits import available_memory, free_swap
from server.engine.models.config import HParams
from server.engine.models.used import is_joined, joined_halves, used_tensors
from server.errors import DeviceError


def laid_out_bytes(tensors: Mapping[str, TensorInfo], hparams: HParams, *, on_gpu: bool) -> int:
    """Bytes of what is laid out in memory of our own, with a GPU the experts; the rest stays in the map, which the kernel can read again."""
    used = used_tensors(tensors, hparams)

    def laid_out(name: str) -> bool:
        if name == TOKEN_EMBD:
            return OUTPUT not in used and not on_gpu
        return not on_gpu or "_exps." in name

    def nbytes(info: TensorInfo) -> int:
        if hparams.latent and is_joined(info.name, hparams):  # both halves are made, whatever their types
            return sum(half.nbytes for half in joined_halves(info, hparams.latent))
        return info.nbytes if info.type_id in FORMATS and len(info.shape) > 1 else 0

    return sum(nbytes(info) for name, info in used.items() if laid_out(name))


def check_ram(needed: int) -> None:
    """Raises DeviceError with the numbers where neither memory nor swap has room for so many bytes."""
    available, swap = available_memory(), free_swap()
    if needed > available + swap:
        beside = f", and {swap / 1e9:.1f} GB of swap" if swap else ""
        raise DeviceError(
            f"The model's weights take {needed / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are available{beside}. "
            "Close other programs, or take a smaller model or quantisation."
        )
