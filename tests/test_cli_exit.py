"""How a command ends where something is in its way: a file that the machine withholds, a signal before the model is there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import server.api.runner
from server.cli import bench, main, serve
from server.cli.flags import parse

CLOSED = [["synth", "qwen3-0.6b", "OUT.gguf"], ["batch", "IN", "OUT"], ["eval", "text", "--limit", "1", "--out", "OUT"]]


@pytest.mark.parametrize("command", CLOSED, ids=lambda words: words[0])
def test_a_directory_that_may_not_be_looked_into_is_a_sentence(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pathlib raises for it where it says no of a file that is not there."""
    (tmp_path / "IN").write_text("{}")
    closed, look = str(tmp_path / "OUT"), os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert main([str(tmp_path / word) if word.startswith(("IN", "OUT")) else word for word in command]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"moespan: {closed}")
    assert said.endswith("cannot be used: Permission denied. Check its name, its permissions and the disk.")


def test_an_address_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "https://example.com/m.gguf"]) == 1
    assert "nothing is downloaded here: fetch the file first" in capsys.readouterr().err


def test_an_error_that_is_of_no_file_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: Namespace) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(bench, "run", fails)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["bench"])


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("loading", [False, True])
def test_the_process_ends_at_once_where_a_signal_came_before_the_model(loading: bool, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that ends under a thread in native code aborts."""

    class Signalled:
        def __init__(self, *_: object) -> None:
            self.loading = loading

        def run(self) -> None:
            if early:
                raise KeyboardInterrupt

    left: list[int] = []
    monkeypatch.setattr(server.api.runner, "Runner", Signalled)
    monkeypatch.setattr(os, "_exit", left.append)
    status = 130 if early else 0
    assert serve.run(parse(["serve", "--port", "0"])) == status
    assert left == [status] * loading


def test_an_interrupt_while_the_model_loads_is_no_crash() -> None:
    """The thread that loads is within the native module when the signal arrives."""
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loading\n"
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=20)
    assert child.returncode == 0, said
    assert said.splitlines()[-1].endswith("SIGINT: the model is not loaded any further.")


ENDLESS = """
import signal, sys, time
from server.cli import main, serve
from server.engine.native import open_ops

def load(*_):
    ops = open_ops(1)
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        time.sleep(0.01)
    print("loading", flush=True)
    while True:
        ops.pool.peak_ops()

serve.load_chat = load
sys.exit(main(["serve", "--port", "0"]))
"""
