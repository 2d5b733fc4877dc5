"""The comparison's arithmetic, and the two commands that it runs, with scripts in the place of the engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.peers.compare_llama import Speeds, compare, main, table

OURS = '{"prefill": {"median": 300.0}, "decode": {"median": 80.0}}'
MOESPAN = f"""#!/bin/sh
case "$*" in
  "bench --gguf_path m.gguf --prompt 512 --gen 64 --repeat 1 --cpu_infer 2 --json") echo '{OURS}';;
  *) echo "asked for $*" >&2; exit 1;;
esac
"""
LLAMA = """#!/bin/sh
case "$*" in
  "-m m.gguf -t 2 -ngl 0 -r 1 -o json -p 512 -n 0") echo '[{"avg_ts": 400.0}]';;
  "-m m.gguf -t 2 -ngl 0 -r 1 -o json -p 0 -n 64 -d 512") echo '[{"avg_ts": 100.0}]';;
  *) echo "asked for $*" >&2; exit 1;;
esac
"""


@pytest.fixture
def engines(tmp_path: Path) -> list[str]:
    for name, script in (("moespan", MOESPAN), ("llama-bench", LLAMA)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return [str(tmp_path / "llama-bench"), "m.gguf", "--moespan", str(tmp_path / "moespan")]


def test_both_engines_run_the_same_work(engines, capsys):
    assert main([*engines, "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prefill"]["ratio"]["median"] == 0.75
    assert result["decode"]["ratio"]["median"] == 0.8
    assert result["decode"]["llama.cpp"]["runs"] == [100.0, 100.0]


def test_an_engine_that_fails_ends_the_comparison_with_its_words(engines):
    with pytest.raises(SystemExit, match="asked for"):
        main([*engines, "--threads", "3"])


def test_medians_ranges_and_ratios():
    result = compare([Speeds(10, 1), Speeds(30, 1), Speeds(20, 1)], [Speeds(10, 2), Speeds(10, 2), Speeds(40, 2)])
    assert result["prefill"]["ratio"] == {"median": 2.0, "min": 0.5, "max": 3.0}
    assert "| prefill | 20.0 (10.0 - 30.0) | 10.0 (10.0 - 40.0) | 2.00 (0.50 - 3.00) |" in table(result)
    assert "| decode | 1.0 (1.0 - 1.0) | 2.0 (2.0 - 2.0) | 0.50 (0.50 - 0.50) |" in table(result)
