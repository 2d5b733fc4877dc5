"""Carry a trained model through a narrow door: the files of a run, compressed and cut into pieces of a given size.

    python -m recipes.tiny_r1.pieces split RUN OUT --mib 15
    python -m recipes.tiny_r1.pieces join OUT RUN

bfloat16 weights are split into their high and low bytes first: signs and exponents compress to about half, mantissas not at all.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import zlib
from pathlib import Path

FILES = ("model.safetensors", "shape.json", "tokenizer.json", "tokenizer_config.json", "log.jsonl", "wrong-forced.json", "wrong-free.json")


def split(run: Path, out: Path, mib: int) -> list[Path]:
    """Write out/model.000, out/model.001 ... of at most `mib` MiB each from the files of a run."""
    out.mkdir(parents=True, exist_ok=True)
    packed = _pack(run)
    size = mib << 20
    pieces = [out / f"model.{at // size:03}" for at in range(0, len(packed), size)]
    for index, piece in enumerate(pieces):
        piece.write_bytes(packed[index * size : (index + 1) * size])
    return pieces


def join(pieces: Path, run: Path) -> None:
    """The files of a run from the pieces in a directory. ValueError where a piece is missing."""
    packed = b"".join(piece.read_bytes() for piece in sorted(pieces.glob("model.[0-9][0-9][0-9]")))
    run.mkdir(parents=True, exist_ok=True)
    try:
        even, odd = (zlib.decompress(part) for part in _parts(packed))
    except zlib.error as error:
        raise ValueError(f"the pieces in {pieces} are not whole: {error}. Copy all of them, model.000 and on.") from error
    data = bytearray(len(even) + len(odd))
    data[0::2], data[1::2] = even, odd
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(run, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # Debian 12's Python is too old for it


def _pack(run: Path) -> bytes:
    """A tar archive, its bytes at even places and those at odd ones compressed apart; the length of the first part goes before both."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in FILES:
            if (run / name).exists():
                tar.add(run / name, name)
    data = archive.getvalue()
    even, odd = zlib.compress(data[0::2], 6), zlib.compress(data[1::2], 6)
    return len(even).to_bytes(8, "little") + even + odd


def _parts(packed: bytes) -> tuple[bytes, bytes]:
    middle = 8 + int.from_bytes(packed[:8], "little")
    return packed[8:middle], packed[middle:]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Cut the files of a run into pieces, or join them.")
    parser.add_argument("action", choices=("split", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=int, default=15, help="size of a piece")
    options = parser.parse_args()
    if options.action == "join":
        join(options.source, options.target)
    else:
        for piece in split(options.source, options.target, options.mib):
            print(piece, piece.stat().st_size)


if __name__ == "__main__":
    main()
