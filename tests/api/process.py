"""`python -m tests.api.process STEP_S GRACE_S [KEY=VALUE ...]`: a server over the fake engine in the main thread, where signals arrive; prints its port."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.api.runner import Runner, bind
from server.api.serving import Loaded, Serving
from server.config import load_config
from server.engine.protocol import Drawn, Step
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import ChatTemplate
from tests.api.live import MODEL, TEMPLATE, fake_tokenizer, wait_for
from tests.fakes import FakeEngine

ROOT = Path(__file__).parents[2]


@contextmanager
def process(step_s: float, grace_s: float, *settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "tests.api.process", str(step_s), str(grace_s), *settings]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            port = int(child.stdout.readline())
            yield child, f"http://127.0.0.1:{port}"
        finally:
            child.kill()


class Forgetful(FakeEngine):
    """Keeps no account of its steps, which would look like a leak."""

    def step(self, step: Step) -> Drawn | None:
        self.steps.clear()
        self.samplers.clear()
        return super().step(step)


def main() -> None:
    step_s, grace_s, *settings = sys.argv[1:]
    config = load_config(flags={"port": 0, "grace_s": grace_s, **dict(setting.split("=") for setting in settings)})
    serving = Serving(MODEL, config, Metrics())
    listener = bind(config.api)

    def load() -> Loaded:
        service = Service(Forgetful(step_s=float(step_s)), config.scheduler, 1024, serving.metrics)
        wait_for(lambda: runner._server.started)
        return Loaded(service, fake_tokenizer(), ChatTemplate(TEMPLATE))

    runner = Runner(serving, listener, load)
    print(listener.getsockname()[1], flush=True)
    runner.run()


if __name__ == "__main__":
    main()
