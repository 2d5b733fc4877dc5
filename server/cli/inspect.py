"""`moespan inspect`: what a GGUF file holds, read from its header alone.

Metadata with long values cut, tensors by type with counts and bytes, and with --tensors every tensor, layer by layer. --json gives the same to programs.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING

from server.cli.contents import shortened, size, type_totals
from server.cli.flags import config_of
from server.cli.load import model_file
from server.engine.gguf.names import block_of
from server.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from server.engine.gguf.header import TensorInfo
    from server.engine.gguf.reader import GGUFFile


def run(arguments: Namespace) -> int:
    """Print the file's contents."""
    file = model_file(config_of(_given(arguments)).model)
    if arguments.json:
        print(json.dumps(as_json(file, arguments.tensors), ensure_ascii=False, indent=2))
    else:
        _print_tables(file, arguments.tensors)
    return 0


def as_json(file: GGUFFile, tensors: bool) -> dict[str, object]:
    """The contents as JSON values; long metadata is cut as in the tables."""
    tree: dict[str, object] = {
        "path": str(file.path),
        "files": len(file.paths),
        "nbytes": file.nbytes,
        "metadata": {key: shortened(value) for key, value in file.metadata.items()},
        "types": [{"type": t.type, "tensors": t.tensors, "values": t.values, "nbytes": t.nbytes} for t in type_totals(file)],
    }
    if tensors:
        tree["tensors"] = [{"name": t.name, "type": t.type_id.name, "shape": list(t.shape), "nbytes": t.nbytes} for t in in_layer_order(file)]
    return tree


def in_layer_order(file: GGUFFile) -> list[TensorInfo]:
    """Every tensor: those of no layer first, then layer by layer, by name within each."""

    def key(info: TensorInfo) -> tuple[int, str]:
        return _layer(info.name), info.name

    return sorted(file.tensors.values(), key=key)


def _layer(name: str) -> int:
    block = block_of(name)
    return -1 if block is None else block


def _given(arguments: Namespace) -> Namespace:
    """`inspect FILE` means `inspect --gguf_path FILE`."""
    if arguments.file is None:
        return arguments
    if "gguf_path" in arguments:
        raise ConfigError(f"Both {arguments.file} and --gguf_path name a file: give one of them.")
    return Namespace(**{**vars(arguments), "gguf_path": arguments.file})


def _print_tables(file: GGUFFile, tensors: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    files = f" in {len(file.paths)} files" if len(file.paths) > 1 else ""
    console.print(f"[bold]{escape(str(file.path))}[/]  {size(file.nbytes)}{files}, {len(file.tensors)} tensors", soft_wrap=True)
    metadata = Table("key", "value", title="Metadata", title_justify="left", box=None)
    for key, value in file.metadata.items():
        metadata.add_row(escape(key), escape(_one_line(shortened(value))))
    types = Table("type", "tensors", "values", "bytes", "bits a value", title="Tensors by type", title_justify="left", box=None)
    for total in type_totals(file):
        types.add_row(total.type, str(total.tensors), f"{total.values:,}", size(total.nbytes), f"{8 * total.nbytes / total.values:.2f}")
    console.print("", metadata, "", types)
    if tensors:
        console.print("", _tensor_table(file))


def _tensor_table(file: GGUFFile) -> Table:
    from rich.table import Table

    table = Table("layer", "tensor", "type", "shape", "bytes", title="Tensors", title_justify="left", box=None)
    previous = -1
    for info in in_layer_order(file):
        layer = _layer(info.name)
        table.add_row(str(layer) if layer != previous else "", info.name, info.type_id.name, " x ".join(map(str, info.shape)), size(info.nbytes))
        previous = layer
    return table


def _one_line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, list)) else str(value)
