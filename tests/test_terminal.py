"""The commands as real processes: what a terminal shows while a model loads and a prompt is processed, and what the shell gets for mistakes."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny_models import write_tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny(path, "llama", vocab=300)
    return path


def moespan(*words: object) -> list[str]:
    return [sys.executable, "-m", "server.cli", *map(str, words)]


def on_a_terminal(*words: object) -> str:
    """What the command writes to a terminal."""
    ours, its = pty.openpty()
    with subprocess.Popen(moespan(*words), cwd=ROOT, stdout=its, stderr=its, stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(its)
        shown = b"".join(iter(lambda: _read(ours), b""))
        assert child.wait(60) == 0
    os.close(ours)
    return shown.decode(errors="replace")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_loading_and_prefill_show_progress_on_a_terminal(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("x" * 100)
    words = ("--gguf_path", model, "--prompt_file", tmp_path / "prompt.txt", "--prefill_chunk", 20, "--max_new_tokens", 4, "--cpu_infer", 1)
    shown = on_a_terminal("chat", *words)
    assert "Reading" in shown
    assert re.search(r"prefill\b.*\d+/\d+", shown)  # the bar; the closing line has no slash between two numbers
    assert "tok/s" in shown


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("serve", "--gguf_path", "/no/such/model.gguf"), 1, "There is no file or directory /no/such/model.gguf"),
        (("serve", "--cpu_infer", "0"), 2, "cpu_infer"),
        (("serve", "--cache_lens", "0"), 2, "cache_lens"),
        (("serve", "--model", "r1"), 1, "There is no embedded model"),
        (("bench", "--gguf_path", __file__), 1, "is not a GGUF file"),
        (("chat", "--prompt_file", os.devnull), 2, "is empty. Write the prompt into it"),
        (("serve", "--port", "70000"), 2, "port"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(words: tuple[str, ...], status: int, said: str) -> None:
    done = subprocess.run(moespan(*words), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
