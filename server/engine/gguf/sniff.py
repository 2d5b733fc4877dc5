"""What a file that is no GGUF seems to be, said in words: the usual mix-ups of downloads."""

from __future__ import annotations

_PREFIXES = (
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself (fetch it with `git lfs pull`)"),
    (b"PK\x03\x04", "it looks like a zip archive or a PyTorch checkpoint"),
    (b"\x80\x02", "it looks like a Python pickle or a PyTorch checkpoint"),
    (b"\x1f\x8b", "it is compressed with gzip (unpack it first)"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd (unpack it first)"),
    (b"lmgg", "it is a GGML file, the format before GGUF"),
    (b"fmgg", "it is a GGML file, the format before GGUF"),
    (b"tjgg", "it is a GGML (GGJT) file, the format before GGUF"),
)


def describe_bytes(head: bytes) -> str:
    """A clause about a file that starts with `head` (some hundreds of bytes are enough)."""
    if not head:
        return "it is empty"
    if not any(head):
        return "it starts with zero bytes, as an unfinished download does"
    for prefix, meaning in _PREFIXES:
        if head.startswith(prefix):
            return meaning
    if head[8:10] == b'{"' and head[6:8] == b"\0\0":  # u64 length of a JSON header
        return "it looks like safetensors"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as an error or log-in page saved by a download is"
    if text.startswith(b"{"):
        return "it looks like JSON"
    return f"its first bytes are {head[:8]!r} instead of b'GGUF'"
