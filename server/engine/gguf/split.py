"""Models in several files, NAME-00001-of-00003.gguf and so on: their names, and whether the parts belong together.

Every part is a GGUF file with its own tensors. It says which part it is (`split.no`, from 0), of how many (`split.count`), and how many tensors
the whole model has (`split.tensors.count`); all other metadata is in the first. Source: llama.cpp's gguf-split and its loader.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.engine.gguf.header import Header
from server.errors import GGUFError, ModelNotFound

NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
SHOWN = 40  # names in a sentence; real models have up to about thirty parts
_NAME = re.compile(r"(?P<model>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PartName:
    """A part's file name, taken apart."""

    model: str
    part: int  # from 1
    count: int
    suffix: str  # as the file spells it

    def numbered(self, part: int) -> str:
        """The file name of another part."""
        return f"{self.model}-{part:05d}-of-{self.count:05d}{self.suffix}"


def part_name(path: Path) -> PartName | None:
    """None where the name is not that of a part."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["part"]) <= int(match["count"]):
        return None
    return PartName(match["model"], int(match["part"]), int(match["count"]), match["suffix"])


def model_name(path: Path) -> str:
    """The file's name without its suffix, nor a part's numbers: what people call the model."""
    name = part_name(path)
    return path.stem if name is None else name.model


def part_paths(path: Path) -> list[Path]:
    """All parts of the model that `path` is a part of, in order; a file that is no part is the only one. Raises ModelNotFound with those missing.

    They stand beside the path as it was given. A link is not followed first: in a Hugging Face cache the links have the names, not the files.
    """
    name = part_name(path)
    if name is None:
        return [path]
    parts = [path.with_name(name.numbered(part)) for part in range(1, name.count + 1)]
    missing = [part.name for part in parts if not os.path.exists(part)]
    if len(missing) == len(parts):
        return [path]  # not one is there: whoever opens it will say that there is no such file
    if missing:
        raise ModelNotFound(f"Of the {name.count} files of {name.model} in {path.parent}, {_listed(missing)} missing. Download them again into that directory.")
    return parts


def split_paths(path: Path, parts: int) -> list[Path]:
    """What OUT.gguf becomes in `parts` files: OUT-00001-of-0000N.gguf and so on."""
    name = PartName(path.stem, 1, parts, ".gguf")
    return [path.with_name(name.numbered(part)) for part in range(1, parts + 1)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def split_metadata(part: int, count: int, tensors: int) -> dict[str, int]:
    """What part `part` (from 0) of `count` says of itself; `tensors` are the whole model's."""
    return {NO: part, COUNT: count, TENSORS: tensors}


def check_parts(parts: Mapping[Path, Header]) -> None:
    """The files, in the order of their names, are all parts of one model, each once. Raises GGUFError."""
    if len(parts) == 1:
        _check_whole(*next(iter(parts.items())))
        return
    numbers = [_number(path, header, NO) for path, header in parts.items()]
    for index, (path, header) in enumerate(parts.items()):
        _check_count(path, header, len(parts))
        _check_number(list(parts), numbers, index)
    _check_one_model(parts)
    _check_tensors(parts)


def _check_whole(path: Path, header: Header) -> None:
    count = _number(path, header, COUNT, 1)
    if count > 1:
        part = _number(path, header, NO) + 1
        raise GGUFError(
            f"{path} is part {part} of {count} of a split model, but not named as one, so that the others cannot be found: "
            f"name it NAME-{part:05d}-of-{count:05d}.gguf, and the others likewise."
        )


def _number(path: Path, header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, int) and value >= 0:
        return value
    if value is None:
        raise GGUFError(f"{path} is named as a part of a split model, but its metadata does not say so ({key} is missing). Download that part again.")
    raise GGUFError(f"{path}: {key} is {value!r}, not a count. The file is damaged: download it again.")


def _check_count(path: Path, header: Header, count: int) -> None:
    said = _number(path, header, COUNT)
    if said != count:
        raise GGUFError(f"{path} is named as one of {count} parts, but says that it is one of {said}: it is from another model. Download it again.")


def _check_number(paths: Sequence[Path], numbers: Sequence[int], index: int) -> None:
    if numbers[index] == index:
        return
    twin = next((other for other, number in enumerate(numbers) if number == numbers[index] and other != index), None)
    if twin is not None:
        first, second = sorted((twin, index))
        raise GGUFError(f"{paths[first].name} and {paths[second].name} both hold part {numbers[index] + 1} of the model. Download both again.")
    raise GGUFError(f"{paths[index]} holds part {numbers[index] + 1}, not the one that its name says: the parts' names were mixed up. Download them again.")


def _check_one_model(parts: Mapping[Path, Header]) -> None:
    first, *others = parts.items()
    for path, header in others:
        for key in (TENSORS, "general.architecture", "general.name"):
            mine, theirs = first[1].metadata.get(key), header.metadata.get(key)
            if mine != theirs and theirs is not None:
                raise GGUFError(
                    f"{first[0].name} and {path.name} are parts of different models ({key}: {mine!r} and {theirs!r}). "
                    f"Download the parts of one model into a directory of its own."
                )


def _check_tensors(parts: Mapping[Path, Header]) -> None:
    seen: dict[str, Path] = {}
    for path, header in parts.items():
        for name in header.tensors:
            if name in seen:
                raise GGUFError(f"Tensor {name!r} is in both {seen[name].name} and {path.name}: they are not parts of one model. Download them again.")
            seen[name] = path
    path, header = next(iter(parts.items()))
    said = _number(path, header, TENSORS)
    if len(seen) != said:
        raise GGUFError(
            f"{path} and its other parts hold {len(seen)} tensors, but the model has {said}. A part is damaged or from another model: download all again."
        )
