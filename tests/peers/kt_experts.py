"""kt-kernel's layer of experts (KTransformers' CPU part), timed as `moespan bench experts` times ours: the same shapes, routes, tokens and fields.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_35_x86_64 kt-kernel==0.7.2
    unzip kt_kernel-0.7.2-*.whl 'kt_kernel/*' 'kt_kernel.libs/*' -d kt
    moespan bench experts --shape v3 --format q4_k --json > ours.json
    PYTHONPATH=kt:. python3.12 tests/peers/kt_experts.py --shape v3 --format int4,int8 --threads 14 [--beside ours.json] [--json]

Unpacked and not installed, the wheel brings nothing else along; its Python needs torch, numpy, safetensors and gguf. Formats are kt-kernel's own int4,
int8 and bf16, of which a machine without AMX (or AVX-512 with bf16) has bf16 alone, and the GGUF types that its llamafile part takes, q4_k among them.
Weights are random bf16, or blocks of the type. Leave it two CPUs: with as many workers as there are CPUs its calls take multiples of 8 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from server.bench.experts import SETS, Point, layer_errors, time_calls
from server.bench.random_experts import COLD_BYTES, Kinds, LayerSize, RandomExperts, Router, Routes
from server.cli.bench_experts import layer_size
from server.cli.flags import EXPERTS_Q

# Bits a weight, and kt-kernel's class; its build for AVX2 has another one for bf16, and none for the integers.
OWN_FORMATS = {"int4": (4, ("AMXInt4_MOE",)), "int8": (8, ("AMXInt8_MOE",)), "bf16": (16, ("AMXBF16_MOE", "AVX2BF16_MOE"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Time every format at every q, and print."""
    args = _parse(argv)
    shape, size = layer_size(args.shape, args.experts)
    out = _own_stdout()
    cpu = open_cpu(args.threads)
    points = []
    with torch.inference_mode():
        for name in args.format.split(","):
            for point in time_format(cpu, name, size, [int(q) for q in args.q.split(",")], args.repeat):
                print(f"{name}, q={point.q}: {point.ms:.3g} ms", file=sys.stderr)
                points.append(point)
    if args.json:
        setting = {"engine": "kt-kernel", "threads": args.threads, "shape": shape, **asdict(size)}
        print(json.dumps({**setting, "points": [asdict(point) for point in points]}, indent=2), file=out)
    else:
        print(table([asdict(point) for point in points], json.loads(args.beside.read_text())["points"] if args.beside else []), file=out)
    return 0


def _own_stdout() -> TextIO:
    """Standard output for us alone: kt-kernel's library talks on it, and goes to standard error from here on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="v3")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--format", default="int4,int8", help=f"{', '.join(OWN_FORMATS)} or GGUF types")
    parser.add_argument("--q", default=",".join(map(str, EXPERTS_Q)))
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    parser.add_argument("--repeat", type=int, help="timed calls of each point (default: as `moespan bench experts`)")
    parser.add_argument("--beside", type=Path, metavar="OURS.json", help="what `moespan bench experts --json` printed, for one table of both")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def open_cpu(threads: int) -> Any:
    """kt-kernel's pool, on one NUMA node."""
    import kt_kernel

    ext = kt_kernel.kt_kernel_ext
    config = ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
    return ext.CPUInfer(config)


def time_format(cpu: Any, name: str, size: LayerSize, qs: Sequence[int], repeat: int | None) -> Iterator[Point]:
    """The points of one format."""
    if name in OWN_FORMATS:
        kinds = Kinds(GGMLQuantizationType.BF16, GGMLQuantizationType.BF16)
        expert_bytes = 3 * size.hidden * size.ffn * OWN_FORMATS[name][0] / 8
        names = (name, name)
    else:
        kinds = Kinds.of(GGMLQuantizationType[name.upper()], size)
        expert_bytes = kinds.expert_bytes(size)
        names = (name, kinds.down.name.lower())
    experts = RandomExperts(size, kinds, math.ceil(COLD_BYTES / (size.experts * expert_bytes)))
    layers, router = KtLayers(cpu, name, experts, max(qs)), Router(size, experts.layers)
    for q in qs:
        times = time_calls(layers, router, q, repeat)
        yield Point.of(size, names, expert_bytes, q, times, layer_errors(experts, layers, router, q))


class KtLayers:
    """server.bench.experts.Layers in kt-kernel, whose tokens and sums are bf16."""

    def __init__(self, cpu: Any, name: str, experts: RandomExperts, most: int) -> None:
        self._cpu = cpu
        self._borrowed: list[Any] = []  # GGUF blocks, which kt-kernel reads where they are; its own formats are copies
        self._layers = [self._load(name, experts, layer, most) for layer in range(experts.layers)]
        draw = np.random.default_rng(1).standard_normal((most + SETS - 1, experts.size.hidden), np.float32)
        self._x = torch.from_numpy(draw).to(torch.bfloat16)
        self._out = torch.empty(most, experts.size.hidden, dtype=torch.bfloat16)

    def call(self, routes: Routes, number: int) -> None:
        self._run(routes, self._x[number % SETS :])

    def result(self, routes: Routes, x: NDArray[np.float32]) -> NDArray[np.float32]:
        self._run(routes, torch.from_numpy(x).to(torch.bfloat16))
        return self._out[: len(x)].float().numpy()

    def _run(self, routes: Routes, x: torch.Tensor) -> None:
        q, top_k = routes.ids.shape
        ids, batch = routes.ids.astype(np.int64), np.array([q], np.int32)
        addresses = (batch.ctypes.data, top_k, ids.ctypes.data, routes.weights.ctypes.data, x.data_ptr(), self._out.data_ptr())
        self._cpu.submit(self._layers[routes.layer].forward_task(*addresses, False))
        self._cpu.sync()

    def _load(self, name: str, experts: RandomExperts, layer: int, most: int) -> Any:
        import kt_kernel

        ext, size = kt_kernel.kt_kernel_ext, experts.size
        blocks = [np.frombuffer(experts.blocks(matrix, layer), np.uint8) for matrix in (experts.gate, experts.up, experts.down)]
        config = ext.moe.MOEConfig(size.experts, size.top_k, size.hidden, size.ffn, 0)
        config.max_len, config.pool = max(most, 16), self._cpu.backend_
        config.gate_proj, config.up_proj, config.down_proj = (part.ctypes.data for part in blocks)
        if name not in OWN_FORMATS:
            self._borrowed.append(blocks)
            config.m_block, config.group_min_len, config.group_max_len = 32, 10, max(most, 16)  # as kt-kernel's own llamafile wrapper sets them
            config.gate_type = config.up_type = int(experts.kinds.gate_up)
            config.down_type, config.hidden_type = int(experts.kinds.down), int(GGMLQuantizationType.BF16)
        made = _class(ext.moe, name)(config)
        self._cpu.submit(made.load_weights_task())
        self._cpu.sync()
        return made


def _class(moe: Any, name: str) -> Any:
    wanted = OWN_FORMATS[name][1] if name in OWN_FORMATS else ("MOE",)
    found = [getattr(moe, each) for each in wanted if hasattr(moe, each)]
    return found[0] if found else sys.exit(f"kt-kernel's build for this CPU has no {' or '.join(wanted)}, and so no {name}.")


def table(theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each q and each of their formats, beside the first of ours at that q; the ratio is of times, above 1 where ours is the faster."""
    lines = [
        "| q | kt-kernel | ms | GB/s | TFLOPS | error | moespan | ms | GB/s | TFLOPS | error | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in sorted(theirs, key=lambda p: int(p["q"])):
        ratios = [(own, point["ms"] / own["ms"]) for own in ours if own["q"] == point["q"]]
        right = [f"{_cells(own)} | {ratio:.2f}" for own, ratio in ratios] or ["| | | | | "]
        lines += [f"| {point['q']} | {_cells(point)} | {cells} |" for cells in right]
    return "\n".join(lines)


def _cells(point: dict[str, Any]) -> str:
    return f"{point['format']} | {point['ms']:.3g} | {point['gbps']:.1f} | {point['tflops']:.3g} | {point['error']:.2%}"


if __name__ == "__main__":
    sys.exit(main())
