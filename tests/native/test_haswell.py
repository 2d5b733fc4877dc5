"""The native tests under qemu-user, as CPUs that are not at hand: one illegal instruction ends the process.

The same module runs everywhere, so an older CPU must meet nothing but its own instructions, in the kernels that were chosen and in all that
surrounds them. A Haswell has AVX2 and no AVX-512, a Nehalem not even AVX. Some tests of each kernel: the emulator is thirty times slower.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".venv" / "qemu" / "usr" / "bin"  # where `make test` puts it
QEMU = next((path for place in (None, str(FETCHED)) for name in ("qemu-x86_64", "qemu-x86_64-static") if (path := shutil.which(name, path=place))), None)

KERNELS = (
    "saturate or own_bytes or float_types_take and 17 or dequantize_rows_gives and 96 or every_format and -1] and (Q4_K or IQ3_S or F16) "
    "or rms_norm_is and 17 or rope_is and 3- or family and 5- or attention_is and 1-1-20 or only_its_slots or absorbed_is and 24"
)
FILES = [f"tests/native/test_{name}.py" for name in ("linear", "tiles", "experts", "norm_rope", "route", "attention", "latent")]

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="no qemu-user here (Debian's package is qemu-user-static)"),
    pytest.mark.parametrize(("cpu", "isas"), [("Haswell", ["avx2", "scalar"]), ("Nehalem", ["scalar"])]),
]


def emulated(cpu: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(QEMU), "-cpu", cpu, sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def test_the_older_cpu_has_what_it_has(cpu: str, isas: list[str]) -> None:
    done = emulated(cpu, "-c", "from server import _native; print(*_native.available_isas())")
    assert (done.returncode, done.stdout.split()) == (0, isas), done.stderr


def test_its_kernels_run_and_are_right(cpu: str, isas: list[str]) -> None:
    """Each test asserts that its pool runs the instruction set that it is named after; those of better ones would be skipped."""
    done = emulated(cpu, "-m", "pytest", "-p", "no:cacheprovider", *FILES, "-k", f"{isas[0]} and ({KERNELS})")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 80
