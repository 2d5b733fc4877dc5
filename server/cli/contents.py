"""What a GGUF file holds, counted: the basis of `moespan inspect` and of the line that `serve` prints before it loads."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the reader brings numpy along, which `--help` need not wait for
    from server.engine.gguf.header import TensorInfo
    from server.engine.gguf.reader import GGUFFile

SHORT_LIST, SHORT_TEXT = 8, 160  # items of an array and characters of a string that a person wants to see


@dataclass(frozen=True, slots=True)
class TypeTotal:
    """All tensors of one type."""

    type: str
    tensors: int
    values: int
    nbytes: int


def type_totals(file: GGUFFile) -> list[TypeTotal]:
    """Tensors by type, the largest share first."""
    by_type: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in file.tensors.values():
        by_type[info.type_id.name].append(info)
    totals = [TypeTotal(name, len(infos), sum(map(values, infos)), sum(info.nbytes for info in infos)) for name, infos in by_type.items()]
    return sorted(totals, key=lambda total: -total.nbytes)


def values(info: TensorInfo) -> int:
    """How many numbers a tensor holds."""
    return math.prod(info.shape)


def mix(file: GGUFFile) -> str:
    """The quantisation mix by bytes: "Q4_1 70 %, Q8_0 29 %, F32 0.1 %"."""
    totals = type_totals(file)
    whole = sum(total.nbytes for total in totals)
    return ", ".join(f"{total.type} {_percent(total.nbytes / whole)}" for total in totals)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def size(nbytes: int) -> str:
    """Bytes for people, in powers of 1000 as disks are sold: "98.4 MB"."""
    amount, units = float(nbytes), ["bytes", "kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "bytes" or amount >= 100 else f"{amount:.1f} {units[0]}"


def shortened(value: object) -> object:
    """A metadata value fit for a screen: long arrays and strings are cut, and say how long they are."""
    if isinstance(value, list) and len(value) > SHORT_LIST:
        return [*value[:SHORT_LIST], f"... {len(value)} in all"]
    if isinstance(value, str) and len(value) > SHORT_TEXT:
        return f"{value[:SHORT_TEXT]}... {len(value)} characters in all"
    return value
