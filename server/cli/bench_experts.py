"""`moespan bench experts`: one layer of experts at the shape of a real model, timed beside what the machine can read and multiply at most."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf.constants import GGMLQuantizationType

from server.cli.contents import size
from server.cli.flags import config_of
from server.cli.machine import cpu_name, version
from server.engine.limits import available_memory
from server.engine.models.shapes import SHAPES
from server.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from server.bench.experts import Limits, Point
    from server.bench.random_experts import LayerSize

FULL_SWEEP = 8 << 30  # bytes: far beyond every cache
LEAST_SWEEP = 256 << 20
SPARE = 1 << 30  # bytes of memory that are left to others
VOID_BELOW = 0.9  # of the sweep that was expected
PEAK_WORDS = {"bf16_loaded": "bf16 with its operands loaded from L1"}


@dataclass(frozen=True, slots=True)
class Setting:
    """Under what conditions the points were measured: without them they mean nothing."""

    version: str
    cpu: str
    threads: int
    isa: str
    numa: str
    shape: str
    experts: int
    top_k: int
    hidden: int
    ffn: int


def run(arguments: Namespace) -> int:
    """Make the experts, time them, print; 1 where the machine is not what --expect_gbs says."""
    from server.bench.experts import Bench
    from server.engine.native import open_ops

    shape, layer = layer_size(arguments.shape, arguments.experts)
    kinds = tuple(_kind(name) for name in arguments.format)
    sweep_bytes = _sweep_bytes(layer, kinds)
    _check_writable(arguments.plot)
    engine = config_of(arguments).engine
    ops = open_ops(engine.cpu_infer, engine.numa, precision=engine.prefill_precision)
    try:
        sizes = (getattr(layer, name) for name in ("experts", "top_k", "hidden", "ffn"))
        setting = Setting(version(), cpu_name(), ops.threads, ops.isa, ops.numa, shape, *sizes)
        bench = Bench(ops, layer, arguments.q, sweep_bytes, arguments.repeat)
        points = list(_told(bench.run(kinds), len(kinds) * len(arguments.q)))
    finally:
        ops.close()
    void = arguments.expect_gbs is not None and bench.limits.gbps < VOID_BELOW * arguments.expect_gbs
    if arguments.json:
        print(json.dumps(as_json(setting, bench.limits, points, arguments.expect_gbs, void), indent=2))
    else:
        _print_table(setting, bench.limits, points)
    if arguments.plot:
        _write_plot(arguments.plot, setting, bench.limits, points)
    if void:
        print(_void_words(bench.limits, arguments.expect_gbs), file=sys.stderr)
    return 1 if void else 0


def layer_size(wanted: str, experts: int) -> tuple[str, LayerSize]:
    """The shape that the name means, which may be the beginning of one, and its layer with so many experts. Raises ConfigError."""
    from server.bench.random_experts import LayerSize

    shapes = {name: shape for name, shape in SHAPES.items() if shape["expert_count"]}
    names = [wanted] if wanted in shapes else [name for name in shapes if name.startswith(wanted)]
    if len(names) != 1:
        raise ConfigError(f"--shape {wanted}: there is {'no' if not names else 'more than one'} such model with experts; there is {', '.join(shapes)}.")
    shape = shapes[names[0]]
    if experts < shape["expert_used_count"]:
        raise ConfigError(f"--experts {experts}: a token of {names[0]} uses {shape['expert_used_count']} of them.")
    return names[0], LayerSize(experts, shape["expert_used_count"], shape["embedding_length"], shape.expert_ffn)


def _kind(name: str) -> GGMLQuantizationType:
    from server.engine.native import supported_types

    known = {kind.name.lower(): kind for kind in GGMLQuantizationType if kind in supported_types()}
    if name.lower() not in known:
        raise ConfigError(f"--format {name}: there are no kernels for such a type; there are for {', '.join(known)}.")
    return known[name.lower()]


def _sweep_bytes(layer: LayerSize, kinds: tuple[GGMLQuantizationType, ...]) -> int:
    """Of memory that is swept: FULL_SWEEP, or what the largest layers leave. Raises DeviceError where that is too little."""
    from server.bench.random_experts import Kinds

    free = available_memory()
    chosen = [Kinds.of(kind, layer) for kind in kinds]
    layers = ((kinds.layers(layer) + 1) * layer.experts * kinds.expert_bytes(layer) for kinds in chosen)  # one of them is in memory twice: made, and laid out
    needed = SPARE + max(layers)
    left = min(FULL_SWEEP, (free - needed) >> 20 << 20)
    if left < LEAST_SWEEP:
        raise DeviceError(f"The experts take {size(needed)} of memory, and {size(free)} are free. Take fewer with --experts, or a smaller --format.")
    return left


def _check_writable(plot: Path | None) -> None:
    """Before minutes of measuring."""
    if plot is not None and not plot.parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no directory {plot.parent}. Make it first.")


def _told(points: Iterator[Point], count: int) -> Iterator[Point]:
    """Overwrite one line on a terminal; say nothing elsewhere."""
    for done, point in enumerate(points, 1):
        if sys.stderr.isatty():
            print(f"\r{done} of {count}: {point.format}, q={point.q}   ", end="\n" if done == count else "", file=sys.stderr, flush=True)
        yield point


def as_json(setting: Setting, limits: Limits, points: list[Point], expect_gbs: float | None, void: bool) -> dict[str, object]:
    """What --json prints."""
    return {
        **asdict(setting),
        "sweep": {"gbps": limits.gbps, "bytes": limits.sweep_bytes, "passes": list(limits.sweeps), "expected_gbps": expect_gbs, "void": void},
        "peak_tflops": {name: rate / 1e12 for name, rate in limits.peaks.items()},
        "points": [{**asdict(point), "of_sweep": point.gbps / limits.gbps, "of_peak": point.tflops / limits.peak(point.kind)} for point in points],
    }


def _void_words(limits: Limits, expect_gbs: float) -> str:
    return (
        f"void: the sweep read {limits.gbps:.1f} GB/s, less than {VOID_BELOW:.0%} of the {expect_gbs:g} that were expected. Something else uses this machine."
    )


def _title(setting: Setting) -> str:
    return f"{setting.shape}: {setting.experts} experts of {setting.hidden} x {setting.ffn}, {setting.top_k} a token"


def _machine(setting: Setting) -> str:
    numa = "" if setting.numa == "off" else f", NUMA: {setting.numa}"
    return f"{setting.threads} threads, {setting.isa}{numa}, on {setting.cpu}"


def _print_table(setting: Setting, limits: Limits, points: list[Point]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{_title(setting)}; {_machine(setting)}", markup=False)
    console.print(_limits_words(limits), markup=False)
    names = ("format", "q", "ms", "min", "max", "calls", "GB/s", "of sweep", "TFLOPS", "of peak", "error", "outliers")
    table = Table(*names, box=None, pad_edge=False, collapse_padding=True)
    for column in table.columns[1:]:
        column.justify = "right"
    for p in points:
        times = (*(_digits(ms) for ms in (p.ms, p.ms_min, p.ms_max)), str(p.calls))
        shares = (f"{p.gbps:.1f}", f"{p.gbps / limits.gbps:.0%}", _digits(p.tflops), f"{p.tflops / limits.peak(p.kind):.0%}")
        table.add_row(p.format, str(p.q), *times, *shares, f"{p.error:.2%}", f"{p.outliers:.2%}")
    console.print(table)
    for name, down in dict.fromkeys((p.format, p.down_format) for p in points if p.down_format != p.format):
        console.print(f"{name}: down is {down}, since rows of {setting.ffn} are no whole number of blocks.", markup=False)


def _digits(value: float) -> str:
    """Three digits that count, all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def _limits_words(limits: Limits) -> str:
    less = f", not {size(FULL_SWEEP)}, for want of memory" if limits.sweep_bytes < FULL_SWEEP else ""
    peaks = ", ".join(f"{_digits(rate / 1e12)} T of {PEAK_WORDS.get(name, name)}" for name, rate in limits.peaks.items())
    return f"The same threads read {limits.gbps:.1f} GB/s (best of {len(limits.sweeps)} sweeps over {size(limits.sweep_bytes)}{less}) and reach {peaks}."


def _write_plot(path: Path, setting: Setting, limits: Limits, points: list[Point]) -> None:
    from server.bench.roofline import roofline

    try:
        path.write_text(roofline(_title(setting), _machine(setting), limits, points), encoding="utf-8")
    except OSError as error:
        raise DeviceError(f"--plot {path} cannot be written: {error.strerror}. Choose another place.") from None
