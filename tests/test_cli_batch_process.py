"""`moespan batch` as a process: killed in the middle, on a terminal, and with the embedded model beside the server."""

from __future__ import annotations

import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.api.command import moespan_serve
from tests.api.live import wait_for
from tests.batch_process import answers, asks, echoes, write

ROOT = Path(__file__).parent.parent


def test_the_embedded_model_says_the_same_here_and_there(tmp_path) -> None:
    questions = ("What is 48317 + 9264?", "How many letters r are there in strawberry?")
    chats = [asks(q, "/v1/chat/completions", messages=[{"role": "user", "content": q}], temperature=0, max_tokens=60) for q in questions]
    command = [sys.executable, "-m", "server.cli", "batch", write(tmp_path / "in", chats), tmp_path / "out", "--cache_lens", "512"]
    done = subprocess.run(command, cwd=ROOT, timeout=120)
    assert done.returncode == 0
    with moespan_serve() as client:
        for line, answer in zip(chats, answers(tmp_path / "out"), strict=True):
            reply = client.chat.completions.create(model="tiny-r1", **line["body"])
            assert answer["response"]["body"]["choices"] == reply.model_dump(exclude_unset=True)["choices"]
            assert answer["response"]["body"]["model"] == reply.model


def test_killed_again_and_again_it_loses_and_doubles_nothing(tmp_path) -> None:
    lines = echoes(50)
    source, out = write(tmp_path / "in", lines), tmp_path / "out"
    command = [sys.executable, "-m", "tests.batch_process", "0.001", source, out]
    draw, killed = random.Random(7), 0
    while killed < 3:
        killed_in_mid_run(command, out, draw.random() * 0.2)
        killed += 1
        if killed % 2:
            out.write_bytes(out.read_bytes()[: -draw.randrange(1, 30)])  # what a kill within a write leaves
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, timeout=60).returncode == 0
    found = answers(out)
    assert [answer["custom_id"] for answer in found] == [line["custom_id"] for line in lines]
    assert [answer["response"]["body"]["choices"][0]["text"] for answer in found] == [line["body"]["prompt"] for line in lines]


def killed_in_mid_run(command: Sequence[object], out: Path, after: float) -> None:
    """Start it, and end it so many seconds after its first line."""
    before = size(out)
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL) as child:
        wait_for(lambda: child.poll() is not None or size(out) > before, 30)
        time.sleep(after)
        child.kill()
        assert child.wait(20) == -signal.SIGKILL, "the batch is too short to be killed so often"


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def test_a_terminal_shows_a_bar(tmp_path) -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "tests.batch_process", "0.03", write(tmp_path / "in", echoes(3)), tmp_path / "out"]
    with subprocess.Popen(command, cwd=ROOT, stdout=its, stderr=its, stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(its)
        shown = b"".join(pieces(ours)).decode(errors="replace")
        assert child.wait(60) == 0
    os.close(ours)
    assert "━━━" in shown
    assert re.search(r"[12] of 3 lines, \d+\.\d tok/s, 0:00:0\d left", shown)
    assert "3 answered" in shown


def pieces(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(terminal, 4096)
        except OSError:  # the other end is closed
            return
