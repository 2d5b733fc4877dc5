"""Rules of the house that the import contracts in pyproject.toml cannot say: `lint-imports` does not see compiled modules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SERVER = Path(__file__).parent.parent / "server"
ISA_UNITS = Path(__file__).parent.parent / "native" / "isa"
BUILDS = Path(__file__).parent.parent / "build"
KERNELS = Path(__file__).parent.parent / "native" / "kernels"


def test_only_engine_native_knows_the_native_module() -> None:
    knowing = {file.relative_to(SERVER).as_posix() for file in SERVER.rglob("*.py") if "server._native" in file.read_text(encoding="utf-8")}
    assert knowing == {"engine/native.py"}


def test_the_server_stands_without_the_recipes() -> None:
    sources = [file.read_text(encoding="utf-8") for file in SERVER.rglob("*.py")]
    assert not any(line.startswith(("import recipes", "from recipes")) for source in sources for line in map(str.strip, source.splitlines()))


def test_isa_units_see_no_standard_cpp_header() -> None:
    """A weak inline symbol compiled with AVX-512 flags could be the one that the linker keeps for every CPU."""
    allowed = {"<emmintrin.h>", "<immintrin.h>", "<stddef.h>", "<stdint.h>", "<string.h>"}
    files = [*ISA_UNITS.glob("kernels*"), *KERNELS.iterdir()]
    included = {line.split()[1] for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#include <")}
    assert files
    assert included
    assert included <= allowed


def test_isa_units_give_away_their_tables_alone() -> None:
    """The same of what was compiled: whatever a linker could take from such a unit, weak symbols too, is constant data that kernels.h declares."""
    objects = [path for unit in ISA_UNITS.glob("kernels_*.cpp") for path in BUILDS.glob(f"*/CMakeFiles/_native.dir/native/isa/{unit.name}.o")]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of the native module lie in build/, or there is no nm to read them")
    for path in objects:
        listed = subprocess.run(["nm", "--demangle", "--defined-only", "--extern-only", path], capture_output=True, text=True, check=True).stdout
        symbols = [line.split(maxsplit=2)[1:] for line in listed.splitlines()]
        assert symbols
        assert all(kind in "DR" and re.fullmatch(r"moespan::k\w+(Kernels|PeakLoops?)", name) for kind, name in symbols), (path, symbols)
