"""The native module has one importer. It is built outside the source tree, where the import contracts cannot see it, so this looks for its name."""

from __future__ import annotations

from pathlib import Path

import server

ROOT = Path(server.__file__).parent


def test_only_engine_native_names_the_native_module():
    naming = {file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py") if "server._native" in file.read_text(encoding="utf-8")}
    assert naming == {"engine/native.py"}
