"""`python -m tests.api.process STEP_S GRACE_S`: a server over the fake engine in the main thread, where signals arrive; prints its port."""

from __future__ import annotations

import sys

from server.api.runner import Runner, bind
from server.api.serving import Loaded, Serving
from server.config import ApiConfig, Config, SchedulerConfig
from server.metrics import Metrics
from server.scheduler.service import Service
from server.text.template import ChatTemplate
from tests.api.live import MODEL, TEMPLATE, fake_tokenizer, wait_for
from tests.fakes import FakeEngine


def main() -> None:
    step_s, grace_s = map(float, sys.argv[1:])
    config = Config(api=ApiConfig(port=0), scheduler=SchedulerConfig(grace_s=grace_s))
    serving = Serving(MODEL, config, Metrics())
    listener = bind(config.api)

    def load() -> Loaded:
        service = Service(FakeEngine(step_s=step_s), config.scheduler, 1024, serving.metrics)
        wait_for(lambda: runner._server.started)
        return Loaded(service, fake_tokenizer(), ChatTemplate(TEMPLATE))

    runner = Runner(serving, listener, load)
    print(listener.getsockname()[1], flush=True)
    runner.run()


if __name__ == "__main__":
    main()
