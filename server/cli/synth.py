"""`moespan synth`: write a random model at the shape of a real one, to measure speed with, and tell how its experts are used."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.contents import mix, size
from server.cli.flags import config_of
from server.config import EngineConfig
from server.engine.limits import available_memory
from server.engine.models.shapes import Shape, shape_named
from server.errors import ConfigError, DeviceError, ModelNotFound

if TYPE_CHECKING:
    from server.engine.expert_load import ExpertLoad
    from server.engine.gguf.mix import Mix
    from server.engine.gguf.reader import GGUFFile


def run(arguments: Namespace) -> int:
    """Check, write, print."""
    from server.engine.gguf.mix import mix_named
    from server.engine.gguf.reader import GGUFFile
    from server.engine.gguf.split import split_paths
    from server.engine.gguf.synth import plan

    config, out = config_of(arguments), arguments.out
    shape, quant = _shape(arguments.shape, arguments.layers), mix_named(arguments.quant)
    tensors = plan(shape, quant)
    if arguments.split > len(tensors):
        raise ConfigError(f"--split {arguments.split} is more than the model's {len(tensors)} tensors.")
    nbytes = sum(tensor.nbytes for tensor in tensors)
    _check_place(out, split_paths(out, arguments.split) if arguments.split > 1 else [out], nbytes)
    start = time.monotonic()
    file = GGUFFile.open(_write(arguments, shape, quant, nbytes))
    _print_written(file, time.monotonic() - start)
    _print_experts(file, config.engine)
    return 0


def _shape(name: str, layers: int | None) -> Shape:
    """The named shape, or its first `layers` layers. Raises ConfigError where that is no such model."""
    shape = shape_named(name)
    if layers is None:
        return shape
    least = shape.leading_dense + 1 if shape["expert_count"] else 1
    if not least <= layers <= shape.layers:
        dense = f" ({shape.leading_dense} of them dense, then those with experts)" if least > 1 else ""
        raise ConfigError(f"--layers {layers}: {name} can have {least} to {shape.layers} layers{dense}.")
    return shape.cut(layers)


def _check_place(out: Path, paths: Sequence[Path], nbytes: int) -> None:
    """Nothing is overwritten, and the disk has room. Raises ConfigError, ModelNotFound or DeviceError."""
    if out.suffix != ".gguf":
        raise ConfigError(f"{out} is no name for a GGUF file: let it end in .gguf.")
    if not out.parent.is_dir():
        raise ModelNotFound(f"There is no directory {out.parent} to write {out.name} into. Make it first.")
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists already, and might be worth keeping: remove it, or choose another name.")
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise DeviceError(f"{out} will take {size(nbytes)}, but its disk has only {size(free)} free. Choose another disk, or fewer layers with --layers.")


def _write(arguments: Namespace, shape: Shape, quant: Mix, nbytes: int) -> Path:
    """Write the model; return its first file. Raises DeviceError where the disk does not take it, and leaves nothing then."""
    from server.engine.gguf.synth import write_synthetic

    out = arguments.out
    try:
        with _progress_bar(nbytes) as progress:
            return write_synthetic(out, out.stem, shape, quant, seed=arguments.seed, parts=arguments.split, progress=progress)[0]
    except OSError as error:
        raise DeviceError(f"{out} cannot be written: {error.strerror}. Check the directory's permissions and the disk's space.") from None


@contextmanager
def _progress_bar(nbytes: int) -> Iterator[Callable[[int], None] | None]:
    """A bar of the bytes written, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=nbytes)
        yield lambda done: bar.update(task, completed=done)


def _print_written(file: GGUFFile, seconds: float) -> None:
    parts = f" and {len(file.paths) - 1} more" if len(file.paths) > 1 else ""
    print(f"{file.path}{parts}: {size(file.nbytes)}, {len(file.tensors)} tensors ({mix(file)}), written in {seconds:.0f} s.")


def _print_experts(file: GGUFFile, engine: EngineConfig) -> None:
    """Prefill a prompt and tell what its routers did: without that, nobody knows what a speed on this file is worth."""
    if not file.metadata.get(f"{file.architecture}.expert_count"):
        return
    free = available_memory()
    if file.nbytes > free:
        print(f"How many experts a prompt touches was not counted: the file does not fit into the {size(free)} of free memory.")
        return
    from server.engine.expert_load import PROMPT, expert_loads

    loads = expert_loads(file, engine)
    print(f"Experts that a prompt of {PROMPT} random tokens touches: {summary(loads)}.")
    print(f"Layer by layer, from layer {loads[0].layer} on: {' '.join(str(load.touched) for load in loads)}")


def summary(loads: Sequence[ExpertLoad]) -> str:
    """The spread over all layers in a line."""
    touched = [load.touched for load in loads]
    busiest = [load.busiest for load in loads]
    return (
        f"of the {loads[0].experts} in a layer {min(touched)} at least, {statistics.median(touched):.0f} in the median layer; "
        f"the busiest expert has {statistics.median(busiest):.2f} times the mean in the median layer, {max(busiest):.2f} at most"
    )
