"""Writes grid_codes.inc, the codebooks of the IQ types, from those of the `gguf` Python package (gguf.quants): python make_grids.py > grid_codes.inc

An entry is 8 numbers, or 4 in the IQ3 types, and each of them one of a few levels. The file holds the levels' indices, of 2 (or 3) bits, the first
lowest, in a 16-bit integer an entry; grids.cpp has the levels.
"""

from __future__ import annotations

import numpy as np
from gguf import quants

GRIDS = (quants.IQ1_S, quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S, quants.IQ3_XXS, quants.IQ3_S)
PER_LINE = 16


def packed(kind: type[quants.IQ1_S]) -> list[int]:
    """The entries of a type's grid, each in one integer."""
    kind.init_grid()
    levels = np.searchsorted(kind.grid_map, kind.grid.reshape(kind.grid_shape))  # the maps ascend
    bits = (len(kind.grid_map) - 1).bit_length()
    return [int(entry) for entry in (levels << bits * np.arange(kind.grid_shape[1])).sum(axis=1)]


def main() -> None:
    print("// Written by make_grids.py; do not edit.")
    for kind in GRIDS:
        entries = [f"0x{entry:04x}," for entry in packed(kind)]
        print(f"constexpr uint16_t kCodes{kind.__name__}[{len(entries)}] = {{")
        for first in range(0, len(entries), PER_LINE):
            print("    " + " ".join(entries[first : first + PER_LINE]))
        print("};")


if __name__ == "__main__":
    main()
