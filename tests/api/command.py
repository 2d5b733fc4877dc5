"""`moespan serve` in a process of its own, for as long as a `with` block lasts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

ROOT = Path(__file__).parents[2]


@contextmanager
def moespan_serve(*flags: str) -> Iterator[openai.OpenAI]:
    """A client of the server once it is ready. In the end the process gets a SIGTERM and must leave in order."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--cache_lens", "512", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            address = next(found[1] for line in child.stdout if (found := re.search(r"ready at (\S+)/v1", line)))
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
                yield client
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) == 0
        finally:
            child.kill()
