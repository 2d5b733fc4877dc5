"""The pool alone, compiled into a small program: no data race that ThreadSanitizer sees, how fast a worker is there, and whether it knows what comes next."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPUS = sorted(os.sched_getaffinity(0))
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


def build(directory: Path, *flags: str) -> Path | None:
    """The program, or None where the compiler does not know the flags."""
    program, sources = directory / "pool_stress", [f"{ROOT}/native/pool/pool.cpp", f"{ROOT}/tests/native/pool_stress.cpp"]
    command = [str(COMPILER), "-std=c++20", "-g", *flags, "-Wall", "-Wextra", "-Werror", "-I", f"{ROOT}/native", *sources, "-o", str(program), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "sanitize" in done.stderr or "tsan" in done.stderr, done.stderr
    return program if done.returncode == 0 else None


@pytest.mark.parametrize("nodes", [(), ("nodes",)], ids=["anyone", "nodes"])
def test_no_data_race_in_many_short_runs(tmp_path: Path, nodes: tuple[str, ...]) -> None:
    """Four threads on two CPUs or fewer, so that some come late to most runs."""
    program = build(tmp_path, "-O1", "-fsanitize=thread")
    if program is None:
        pytest.skip("the compiler has no ThreadSanitizer")
    cpus = ",".join(str(CPUS[i % min(2, len(CPUS))]) for i in range(4))
    done = subprocess.run([program, cpus, "5000", *nodes], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not start with this kernel's address layout")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_thread_knows_its_next_piece(tmp_path: Path) -> None:
    """Where pieces take very different times, so that a guess is wrong every second time.

    The best of some tries: before a nap on a crowded core nothing is taken ahead.
    """
    program = build(tmp_path, "-O2")
    assert program is not None
    tries: list[float] = []
    while len(tries) < 10 and (not tries or max(tries) < 0.95):
        tries.append(float(subprocess.run([program, f"{CPUS[0]},{CPUS[1]}", "next"], capture_output=True, text=True, timeout=60, check=True).stdout))
    assert max(tries) >= 0.95, tries


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_spinning_worker_is_there_in_less_than_5_us(tmp_path: Path) -> None:
    """The median of 200 runs; the best of some tries, since whatever else runs here can only make it slower."""
    program = build(tmp_path, "-O2")
    assert program is not None
    tries: list[float] = []
    while len(tries) < 30 and (not tries or min(tries) >= 5):
        tries.append(float(subprocess.run([program, f"{CPUS[0]},{CPUS[1]}", "wake"], capture_output=True, text=True, timeout=60, check=True).stdout))
    assert min(tries) < 5, tries
