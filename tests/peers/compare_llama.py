"""moespan and llama.cpp side by side: the same file, threads and machine, A B A B, so that a machine that drifts drifts for both.

    .venv/bin/python tests/peers/compare_llama.py LLAMA_BENCH MODEL.gguf --threads 2 --rounds 7 [--json]

A round is one process of each engine for prefill and decode; each warms up first. Both decode after the same prompt (llama-bench's `-d`),
with a KV cache in float16. docs/performance.md says how to build llama-bench.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Speeds:
    """One round of one engine, in tokens per second."""

    prefill: float
    decode: float


def main(argv: Sequence[str] | None = None) -> int:
    """Time both, print the comparison."""
    args = _parse(argv)
    ours: list[Speeds] = []
    theirs: list[Speeds] = []
    for done in range(1, args.rounds + 1):
        ours.append(time_moespan(args))
        theirs.append(time_llama(args))
        print(f"round {done} of {args.rounds}: moespan {_words(ours[-1])}; llama.cpp {_words(theirs[-1])}", file=sys.stderr)
    result = compare(ours, theirs)
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_bench", type=Path, help="llama.cpp's llama-bench")
    parser.add_argument("model", type=Path, help="the GGUF file that both run")
    parser.add_argument("--moespan", type=Path, default=Path(sys.executable).with_name("moespan"), help="default: the one beside this Python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def time_moespan(args: argparse.Namespace) -> Speeds:
    """One run of `moespan bench`."""
    counts = ["--prompt", args.prompt, "--gen", args.gen, "--repeat", 1, "--cpu_infer", args.threads]
    result = _output([args.moespan, "bench", "--gguf_path", args.model, *counts, "--json"])
    return Speeds(result["prefill"]["median"], result["decode"]["median"])


def time_llama(args: argparse.Namespace) -> Speeds:
    """One run of llama-bench for each phase: its depth counts for all tests of a run."""
    common = [args.llama_bench, "-m", args.model, "-t", args.threads, "-ngl", 0, "-r", 1, "-o", "json"]
    prefill = _output([*common, "-p", args.prompt, "-n", 0])
    decode = _output([*common, "-p", 0, "-n", args.gen, "-d", args.prompt])
    return Speeds(prefill[0]["avg_ts"], decode[0]["avg_ts"])


def _output(command: Sequence[object]) -> Any:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{command[0]} failed with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def compare(ours: Sequence[Speeds], theirs: Sequence[Speeds]) -> dict[str, dict[str, Any]]:
    """For each phase the medians, the ranges, and the ratio of ours to theirs: of the medians, and its range over the rounds."""
    return {phase: _phase([getattr(speeds, phase) for speeds in ours], [getattr(speeds, phase) for speeds in theirs]) for phase in ("prefill", "decode")}


def _phase(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = {"median": statistics.median(ours) / statistics.median(theirs), "min": min(ratios), "max": max(ratios)}
    return {"moespan": _spread(ours), "llama.cpp": _spread(theirs), "ratio": ratio}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def table(result: dict[str, dict[str, Any]]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| | moespan tok/s | llama.cpp tok/s | ratio |", "|---|---|---|---|"]
    for phase, row in result.items():
        lines.append(f"| {phase} | {_range(row['moespan'], 1)} | {_range(row['llama.cpp'], 1)} | {_range(row['ratio'], 2)} |")
    return "\n".join(lines)


def _range(spread: dict[str, Any], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f} - {spread['max']:.{digits}f})"


def _words(speeds: Speeds) -> str:
    return f"prefill {speeds.prefill:.1f}, decode {speeds.decode:.1f} tok/s"


if __name__ == "__main__":
    sys.exit(main())
