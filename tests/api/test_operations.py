"""Loading, readiness, metrics, tokens; and the process: ports, signals, exit status."""

from __future__ import annotations

import errno
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.api.runner import Runner, bind
from server.api.serving import Loaded, Serving
from server.config import ApiConfig, Config
from server.errors import ConfigError, DeviceError, ModelNotFound
from server.metrics import Metrics
from tests.api.live import MODEL, USER, Live, live, wait_for
from tests.api.process import process
from tests.fakes import FakeEngine


def test_health_ready_and_models(server: Live) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready", "model": MODEL}
    listed = server.get("/v1/models").json()
    assert listed == {"object": "list", "data": [{"id": MODEL, "object": "model", "created": server.serving.created, "owned_by": "moespan"}]}
    assert server.get(f"/v1/models/{MODEL}").json() == listed["data"][0]


def loads_in_vain(let_go: threading.Event) -> Callable[[], Loaded]:
    """A loader that fails once it is let go."""

    def load() -> Loaded:
        let_go.wait(20)
        raise ModelNotFound("There is no such model.")

    return load


def test_while_loading_models_answer_and_the_rest_is_503_with_retry_after() -> None:
    let_go = threading.Event()

    config = Config(api=ApiConfig(port=0))
    serving = Serving(MODEL, config, Metrics())
    listener = bind(config.api)
    runner = Runner(serving, listener, loads_in_vain(let_go))
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as http:
        running = pool.submit(runner.run)
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
        ready = http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "loading")
        for path, body in [("/v1/chat/completions", {"messages": USER}), ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})]:
            reply = http.post(path, json=body)
            assert (reply.status_code, int(reply.headers["retry-after"])) == (503, 5)
            assert "still loading" in reply.json()["error"]["message"]
        let_go.set()
        with pytest.raises(ModelNotFound, match="no such model"):
            running.result(20)


def test_stopping_while_loading_does_not_wait_for_the_model() -> None:
    config = Config(api=ApiConfig(port=0))
    runner = Runner(Serving(MODEL, config, Metrics()), bind(config.api), loads_in_vain(threading.Event()))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(runner.run)
        wait_for(lambda: runner._server.started)
        runner.stop()
        running.result(5)


def test_metrics_are_exposed_under_their_names(server: Live) -> None:
    server.chat()
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    names = {line.split(" ")[2] for line in reply.text.splitlines() if line.startswith("# TYPE")}
    histograms = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time")
    assert {f"moespan_{name}_seconds" for name in histograms} <= names
    assert {"moespan_prompt_tokens_total", "moespan_generation_tokens_total", "moespan_request_success_total"} <= names
    assert {"moespan_num_requests_running", "moespan_num_requests_waiting", "moespan_kv_cache_usage_perc", "moespan_experts_per_token"} <= names
    assert {"moespan_prefill_tokens_per_second", "moespan_decode_tokens_per_second"} <= names
    assert 'moespan_request_success_total{finished_reason="stop"}' in reply.text


def test_tokens_there_and_back(server: Live) -> None:
    reply = server.post("/tokenize", {"prompt": "a🦙"}).json()
    assert reply == {"tokens": list("a🦙".encode()), "count": 5, "max_model_len": 1024}
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "a🦙"}
    assert bytes(server.post("/tokenize", {"messages": USER}).json()["tokens"]) == b"u:hello\na:"


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(server: Live) -> None:
    with pytest.raises(DeviceError, match=rf"port {server.port}: Address already in use. Stop what uses it, or choose another with --port"):
        bind(ApiConfig(port=server.port))
    with pytest.raises(DeviceError, match=r"no-such-host.*\. --host wants an address of this machine: 127\.0\.0\.1 for itself alone"):
        bind(ApiConfig(host="no-such-host.invalid", port=0))


def test_a_port_that_is_not_ours_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(listener: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(DeviceError, match=r"port 80: Permission denied\. Ports below 1024 are the system's: choose another with --port\."):
        bind(ApiConfig(port=80))


def test_tls_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("this is no key")
    api = ApiConfig(port=0, ssl_keyfile=tmp_path / "key.pem", ssl_certfile=tmp_path / "key.pem")
    with pytest.raises(ConfigError, match="--ssl_keyfile"):
        Runner(Serving(MODEL, Config(api=api), Metrics()), socket.socket(), lambda: pytest.fail("loaded nevertheless"))


def test_draining_answers_the_running_request_and_refuses_the_others() -> None:
    with live(FakeEngine(step_s=0.005)) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(server.chat, messages=[{"role": "user", "content": "x" * 60}], stream=True)
        wait_for(lambda: len(server.engine.samplers) == 1)
        waiting = [pool.submit(server.chat, stream=stream) for stream in (False, True)]
        wait_for(lambda: server.service.open == 3)
        server.runner.stop()
        for each in waiting:
            assert each.result().status_code == 503
            assert "shutting down" in each.result().json()["error"]["message"]
        assert server.get("/ready").json()["status"] == "stopping"
        assert server.chat().status_code == 503
        assert running.result().text.endswith("data: [DONE]\n\n")


def test_draining_lets_a_list_of_prompts_finish() -> None:
    with live(FakeEngine(step_s=0.005)) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "/v1/completions", {"prompt": ["first" * 6, "second" * 6]})
        wait_for(lambda: len(server.engine.samplers) == 1)
        server.runner.stop()
        assert [choice["text"] for choice in running.result().json()["choices"]] == ["first" * 6, "second" * 6]


def chat(address: str) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 30}], "stream": True}, timeout=20)


@contextmanager
def busy_process(step_s: float, grace_s: float) -> Iterator[tuple[subprocess.Popen[str], Future[httpx.Response]]]:
    """A server that answers a stream just now, and that stream; it must exit with 0 in the end."""
    with process(step_s, grace_s) as (child, address), ThreadPoolExecutor() as pool:
        running = pool.submit(chat, address)
        wait_for(lambda: "moespan_num_requests_running 1.0" in httpx.get(f"{address}/metrics").text)
        yield child, running
        assert child.wait(10) == 0


def ends_with_503(reply: httpx.Response) -> bool:
    last = reply.text.strip().splitlines()[-1]
    return bool(json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_reply_finish_and_exits_with_0(number: signal.Signals) -> None:
    with busy_process(step_s=0.02, grace_s=10) as (child, running):
        child.send_signal(number)
        assert running.result().text.endswith("data: [DONE]\n\n")


def test_the_grace_time_ends_a_reply_with_an_error_and_the_process_with_0() -> None:
    with busy_process(step_s=0.05, grace_s=0.2) as (child, running):
        time.sleep(0.2)
        child.send_signal(signal.SIGTERM)
        assert ends_with_503(running.result())


def test_the_same_signal_twice_at_once_still_lets_the_reply_finish() -> None:
    with busy_process(step_s=0.02, grace_s=10) as (child, running):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        assert running.result().text.endswith("data: [DONE]\n\n")


def test_a_second_signal_ends_the_reply_with_an_error_and_the_process_with_0() -> None:
    with busy_process(step_s=0.2, grace_s=30) as (child, running):
        child.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        child.send_signal(signal.SIGTERM)
        assert ends_with_503(running.result())


def test_an_idle_server_stops_at_once() -> None:
    with process(step_s=0, grace_s=10) as (child, address):
        assert chat(address).status_code == 200
        start = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
        assert time.monotonic() - start < 3
