"""GGUF files: found, mapped into memory, and handed out as read-only slices of the map. Nothing of a tensor is ever copied here.

`find_gguf` names the file, `GGUFFile.open` maps it with all of its parts and checks their headers, `file.data("blk.0.attn_q.weight")` is a tensor,
and `page_in` and `give_back` say which parts of it will be read and were (for speed and memory alone).
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from server.engine.gguf.header import Header, TensorInfo, parse_header
from server.engine.gguf.sniff import describe_bytes
from server.engine.gguf.split import PartName, check_parts, model_name, part_name, part_paths
from server.errors import GGUFError, ModelError, ModelNotFound

PREFETCH_CHUNK = 32 << 20  # bytes that are mapped in one go
MADV_POPULATE_READ = 22  # Linux 5.14 and later: map the pages now; Python's mmap does not name it yet
NO_MODELS = frozenset({"mmproj", "imatrix", "adapter"})  # values of general.type that stand beside a model


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of a model and its map."""

    path: Path
    header: Header
    map: mmap.mmap


class GGUFFile:
    """A model's metadata and tensors, from one file or from all the parts of a split one. The maps live as long as this object or any slice of them does."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        first = parts[0]
        self.paths = tuple(part.path for part in parts)
        self.path = first.path  # the first part's, where there are several
        self.name = model_name(first.path)
        self.alignment = first.header.alignment
        self.maps = tuple(part.map for part in parts)  # beside `paths`
        self.metadata: Mapping[str, object] = MappingProxyType(first.header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({name: info for part in parts for name, info in part.header.tensors.items()})
        self._data = {info.name: memoryview(part.map)[info.offset : info.offset + info.nbytes] for part in parts for info in part.header.tensors.values()}
        self._part_of = {name: i for i, part in enumerate(parts) for name in part.header.tensors}

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map the file at `path`, and the other parts where it is one of a split model; check all headers.

        Raises ModelNotFound, GGUFError, UnsupportedModel.
        """
        parts = [_open_part(part) for part in part_paths(Path(path))]
        check_parts({part.path: part.header for part in parts})
        return cls(parts)

    @property
    def nbytes(self) -> int:
        """Size of the file, or of all parts together."""
        return sum(map(len, self.maps))

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as "llama"."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise GGUFError(f"{self.path} does not name its architecture (general.architecture): it is no language model, or its conversion went wrong.")
        return name

    def data(self, name: str) -> memoryview:
        """A tensor's bytes, read-only, format "B", in the blocks of its type_id. Raises GGUFError where there is no such tensor."""
        if name not in self._data:
            raise GGUFError(f"{self.path} has no tensor {name!r}, which its model needs: the file is incomplete, get another conversion of the model.")
        return self._data[name]

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor stands: the part that holds it, and its offset there."""
        return self._part_of[name], self.tensors[name].offset

    def page_in(self, name: str, begin: int, end: int) -> None:
        """Read the tensor's bytes begin .. end - 1 from the disk into the map, many times faster than by faults, and let the disk go on with what follows.

        Raises GGUFError where the disk fails.
        """
        part, offset = self.place(name)
        mapped = self.maps[part]
        for start, length in _page_ranges(offset + begin, offset + end):
            _read_ahead(mapped, start + length)
            _populate(mapped, start, min(length, len(mapped) - start), self.paths[part])

    def give_back(self, name: str, begin: int, end: int) -> None:
        """The tensor's bytes begin .. end - 1 need not stay in the map. They can still be read, at the price of faults."""
        part, offset = self.place(name)
        if begin < end:
            start = (offset + begin) // mmap.PAGESIZE * mmap.PAGESIZE
            self.maps[part].madvise(mmap.MADV_DONTNEED, start, offset + end - start)


def find_gguf(path: str | Path) -> Path:
    """A file as it is, or the one model in a directory (not in those below it), by its first part. Raises ModelNotFound, ModelError."""
    path = Path(path)
    if not _is_directory(path):
        return path
    files: dict[PartName | str, Path] = {}
    for file in sorted(_gguf_files(path)):
        files.setdefault(_model_key(file), file)
    if not files:
        raise ModelNotFound(f"Directory {path} holds no .gguf file. Give --gguf_path the file or the directory that holds it.")
    models = [file for file in files.values() if len(files) == 1 or _is_model(file)]
    if len(models) == 1:
        return models[0]
    names = ", ".join(file.name for file in models or files.values())
    if not models:
        raise ModelNotFound(f"Directory {path} holds no language model, only what belongs beside one: {names}. Download the model itself.")
    raise ModelError(f"Directory {path} holds {len(models)} models: {names}. Give --gguf_path one of these files.")


def _open_part(path: Path) -> _Part:
    mapped = _map(path)
    return _Part(path, parse_header(memoryview(mapped), path), mapped)


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelNotFound(f"{path} is not a regular file. Give --gguf_path a .gguf file.")
            if status.st_size == 0:
                raise GGUFError(f"{path} is not a GGUF file: {describe_bytes(b'')}. Download it again.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFound(f"There is no file {path}. Check --gguf_path for a typing error.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}. Check that it is a file, its permissions, and the disk.") from None


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO must not hang us; regular files do not care


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"There is no file or directory {path}. Check --gguf_path for a typing error.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Check its name and permissions.") from None


def _gguf_files(directory: Path) -> list[Path]:
    try:
        entries = list(directory.iterdir())
        return [file for file in entries if file.suffix.lower() == ".gguf" and not file.name.startswith(".") and file.is_file()]
    except OSError as error:
        raise ModelError(f"Directory {directory} cannot be read: {error.strerror}. Check its permissions.") from None


def _model_key(file: Path) -> PartName | str:
    """The same for all parts of one split model."""
    name = part_name(file)
    return file.name if name is None else replace(name, part=1)


def _is_model(file: Path) -> bool:
    """Not a vision projector, importance matrix or adapter, which people keep beside their model. A file that cannot be read counts: its name helps."""
    try:
        metadata = _open_part(file).header.metadata
    except ModelError:
        return True
    return metadata.get("general.type") not in NO_MODELS and metadata.get("general.architecture") != "clip"


def _page_ranges(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pages that hold begin .. end - 1, a chunk at a time."""
    for start in range(begin // mmap.PAGESIZE * mmap.PAGESIZE, end, PREFETCH_CHUNK):
        yield start, min(PREFETCH_CHUNK, end - start)


def _read_ahead(mapped: mmap.mmap, start: int) -> None:
    """Let the disk work on the chunk behind `start` while the one before it is mapped."""
    start = start // mmap.PAGESIZE * mmap.PAGESIZE
    if start < len(mapped):
        mapped.madvise(mmap.MADV_WILLNEED, start, min(PREFETCH_CHUNK, len(mapped) - start))


def _populate(mapped: mmap.mmap, start: int, length: int, path: Path) -> None:
    try:
        mapped.madvise(MADV_POPULATE_READ, start, length)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EPERM):  # EFAULT, EIO: the disk failed
            raise GGUFError(f"{path} cannot be read from the disk at byte {start}: {error.strerror}. Check the disk, or download the file again.") from None
        bytes(memoryview(mapped)[start : start + length : mmap.PAGESIZE])  # an older kernel: touch a byte of each page
