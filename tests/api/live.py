"""A real server on a free port, over the fake engine, for as long as a `with` block lasts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from server.api.runner import Runner, bind
from server.api.serving import Loaded, Serving
from server.config import ApiConfig, Config, EngineConfig, SchedulerConfig
from server.metrics import Metrics
from server.scheduler.service import Service
from server.scheduler.worker import Sink
from server.text.template import ChatTemplate
from server.text.tokenizer import ByteTokenizer
from server.types import GenerateRequest
from tests.fakes import STOP_ID, FakeEngine

MODEL = "fake-1b"
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
USER = [{"role": "user", "content": "hello"}]
ECHO = "u:hello\na:"  # what the fake engine answers to USER


def fake_tokenizer() -> ByteTokenizer:
    """257 ids: the bytes, and the id with which the fake engine ends."""
    return ByteTokenizer(vocab_size=STOP_ID + 1, stop_ids=[STOP_ID])


@dataclass
class Live:
    """A running server and the objects inside it."""

    port: int
    engine: FakeEngine
    service: Service
    serving: Serving
    runner: Runner
    _http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 20, **options})

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._http.get(path, **options)

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return self._http.post(path, json=body, **options)

    def request(self, *arguments: Any, **options: Any) -> httpx.Response:
        return self._http.request(*arguments, **options)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": USER, **body})

    def lines(self, path: str, body: dict[str, Any]) -> list[str]:
        """The stream's data lines."""
        with self._http.stream("POST", path, json={**body, "stream": True}) as response:
            return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The stream's chunks, after checking that [DONE] ends it."""
        lines = self.lines(path, body)
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def note_arrivals(self) -> list[bytes]:
        """A list that gets the prompt of each request that is accepted from now on, in order: the event loop's thread submits them one by one."""
        arrived: list[bytes] = []
        submit = self.service.submit

        def noting(request: GenerateRequest, sink: Sink, *, continues: bool = False) -> None:
            submit(request, sink, continues=continues)
            arrived.append(bytes(request.prompt_ids))

        self.service.submit = noting  # type: ignore[method-assign]
        return arrived

    def ran(self) -> list[bytes]:
        """The prompts that the engine has started, in order."""
        return [bytes(sampler.prompt_ids) for sampler in self.engine.samplers]

    def wait_idle(self) -> None:
        """Until no request is open; then every page must be free."""
        wait_for(lambda: self.service.open == 0)
        assert self.serving.metrics.registry.get_sample_value("moespan_kv_cache_usage_perc") == 0

    def close(self) -> None:
        self._http.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.002)


@contextmanager
def live(
    engine: FakeEngine | None = None,
    *,
    template: str = TEMPLATE,
    cache_lens: int = 1024,
    scheduler: SchedulerConfig | None = None,
    engine_config: EngineConfig | None = None,
    **api: Any,
) -> Iterator[Live]:
    """A server that is ready."""
    engine = engine or FakeEngine()
    config = Config(api=ApiConfig(port=0, **api), scheduler=scheduler or SchedulerConfig(grace_s=5), engine=engine_config or EngineConfig())
    metrics = Metrics()
    serving = Serving(MODEL, config, metrics)
    service = Service(engine, config.scheduler, cache_lens, metrics)
    listener = bind(config.api)
    runner = Runner(serving, listener, lambda: Loaded(service, fake_tokenizer(), ChatTemplate(template)))
    thread = threading.Thread(target=runner.run)
    thread.start()
    wait_for(lambda: serving.state == "ready")
    server = Live(listener.getsockname()[1], engine, service, serving, runner)
    try:
        yield server
    finally:
        server.close()
        runner.stop()
        thread.join(20)
        assert not thread.is_alive()
