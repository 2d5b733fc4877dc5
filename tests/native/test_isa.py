"""Which instruction set is used: the best by default, a forced one if the CPU has it, and a refusal otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from server import _native
from server.engine import native
from server.engine.limits import cpus_allowed
from server.errors import DeviceError
from tests.native.blocks import TYPES, random_weights
from tests.native.test_pool_native import COMPILER, ROOT


def cpu_flags() -> set[str]:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return set(line.split(":")[1].split())


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = {*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"}
VNNI = {*AVX512, "avx512_vnni"}
AMX = {*VNNI, "avx512_fp16", "amx_tile", "amx_bf16"}
NEEDS = {"scalar": set(), "avx2": AVX2, "avx512": AVX512, "avx512_vnni": VNNI, "avx512_bf16": {*VNNI, "avx512_bf16"}, "amx": AMX}


def test_available_isas_are_those_of_proc_cpuinfo() -> None:
    """The kernel lists a flag only if it also saves the registers."""
    flags = cpu_flags()
    able = [isa for isa in _native.compiled_isas() if NEEDS[isa] <= flags]
    assert _native.available_isas() == [isa for isa in able if isa not in _native.refused_isas()]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_the_choice_on_other_cpus(tmp_path: Path) -> None:
    """Every word of the features counts, XCR0 too; the kernel is asked once, and only where the CPU has what is asked for."""
    program, sources = tmp_path / "isa_choice", [f"{ROOT}/native/isa/cpu.cpp", f"{ROOT}/tests/native/isa_choice.cpp"]
    subprocess.run([str(COMPILER), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-I", f"{ROOT}/native", *sources, "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines() == [
        "bare: plain, asked 0",
        "half: plain, asked 0",
        "not saved: plain, asked 0",
        "wide and more: wide plain, asked 0",
        *["no tiles: wide plain, asked 0"] * 4,
        "refused: wide plain -tiles, asked 1",
        "granted: tiles wide plain, asked 1",
    ]


def test_a_refusal_is_told_and_the_next_best_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("MOESPAN_ISA", raising=False)
    monkeypatch.setattr(_native, "refused_isas", lambda: ["amx"])
    ops = native.open_ops(1)
    ops.close()
    assert ops.isa == _native.available_isas()[0]
    assert f"This CPU has amx, but the operating system refuses its use to this process: {ops.isa} runs instead." in caplog.text


@pytest.mark.parametrize("name", ["", "auto"])
def test_the_best_is_the_default(name: str) -> None:
    pool = _native.Pool([0], name)
    assert pool.isa == _native.available_isas()[0]
    pool.close()


@pytest.mark.parametrize("isa", _native.available_isas())
def test_a_forced_isa_is_the_one_that_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESPAN_ISA", isa)
    ops = native.open_ops(1)
    assert ops.isa == isa
    ops.close()


@pytest.mark.parametrize("isa", ["sse9", "AVX2", *(isa for isa in _native.compiled_isas() if isa not in _native.available_isas())])
def test_an_isa_that_the_cpu_lacks_is_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"'{isa}' cannot run on this CPU. Available: .*scalar"):
        _native.Pool([0], isa)
    monkeypatch.setenv("MOESPAN_ISA", isa)
    why = "this CPU cannot run" if isa in _native.compiled_isas() else "is no instruction set"
    with pytest.raises(DeviceError, match=f"MOESPAN_ISA asks for '{isa}', which {why}. Available here: .*scalar"):
        native.open_ops(1)


def test_int8_prefill_takes_the_best_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESPAN_ISA", raising=False)
    ops = native.open_ops(1, precision="int8")
    assert ops.isa == next(isa for isa in _native.available_isas() if isa not in ("amx", "avx512_bf16"))
    ops.close()


def test_bf16_prefill_needs_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESPAN_ISA", raising=False)
    monkeypatch.setattr(_native, "available_isas", lambda: ["avx512_vnni", "avx2", "scalar"])
    with pytest.raises(DeviceError, match=r"--prefill_precision bf16 needs a CPU with AMX or AVX512_BF16, and this one has neither"):
        native.open_ops(1, precision="bf16")


def test_an_isa_and_a_precision_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESPAN_ISA", "scalar")
    with pytest.raises(DeviceError, match="MOESPAN_ISA asks for 'scalar', which has no prefill in bf16 as --prefill_precision asks"):
        native.open_ops(1, precision="bf16")
    ops = native.open_ops(1, precision="int8")
    assert ops.isa == "scalar"
    ops.close()


def test_supported_types() -> None:
    assert sorted(_native.supported_types()) == sorted(int(t) for t in TYPES)


# --- NativeOps ---------------------------------------------------------------


def test_native_ops_runs_on_tensors() -> None:
    ops = native.open_ops(2)
    weights = random_weights(Type.F16, 6, 32, np.random.default_rng(0))
    matrix = ops.matrix(int(Type.F16), 6, 32, memoryview(weights.data))
    rows, product = torch.empty(6, 32), torch.empty(6, 6)
    ops.dequantize_rows(matrix, torch.arange(6), rows)
    np.testing.assert_array_equal(rows.numpy(), weights.values.astype(np.float32))
    ops.linear([matrix], rows, [product])
    np.testing.assert_allclose(product, rows @ rows.T, rtol=1e-5, atol=1e-5)
    for x, out in [(rows.double(), product), (rows.T, product), (rows, product[:5]), (rows, product.half())]:
        with pytest.raises(AssertionError):
            ops.linear([matrix], x, [out])
    ops.close()


def test_threads_are_capped_at_the_cpus_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cpus = len(cpus_allowed())
    ops = native.open_ops(cpus + 1)
    assert ops.threads == cpus
    assert f"cpu_infer is {cpus + 1}, but only {cpus} CPUs" in caplog.text
    ops.close()


def test_a_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> object:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(native.importlib, "import_module", fail)
    with pytest.raises(DeviceError, match=r"No module named 'server._native'.*pip install"):
        native.open_ops()
