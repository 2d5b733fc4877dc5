"""Every metric, declared here. The names and meanings are vLLM's with our prefix, so that dashboards of the field carry over.

One `Metrics` is made by the composition root and handed to the scheduler's service, which writes it, and to the API, which exposes it.
It has its own registry: nothing is global, and a test makes as many as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.types import FinishReason, Timings

# Seconds. From a small model's token on a fast machine to an R1 prompt that takes a quarter of an hour.
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)


class Metrics:
    """The counters of one server. The scheduler's worker and service are the writers; a scrape may come from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._declare_histograms()
        self._declare_counters()
        self._declare_gauges()

    def _declare_histograms(self) -> None:
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Submitted to first token drawn.", REQUEST_BUCKETS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "One token drawn to the next.", TOKEN_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Submitted to last token drawn.", REQUEST_BUCKETS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Submitted to first prefill chunk.", REQUEST_BUCKETS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "First prefill chunk to first token drawn.", REQUEST_BUCKETS)
        self.decode_time = self._histogram("request_decode_time_seconds", "First token drawn to last token drawn.", REQUEST_BUCKETS)

    def _declare_counters(self) -> None:
        self.prompt_tokens = Counter("moespan_prompt_tokens", "Prompt tokens computed.", registry=self.registry)
        self.generation_tokens = Counter("moespan_generation_tokens", "Tokens drawn.", registry=self.registry)
        self.success = Counter(
            "moespan_request_success", "Requests that ended without an error; cancelled: the client went away.", ["finished_reason"], registry=self.registry
        )
        self.failure = Counter("moespan_request_failure", "Requests that were refused or failed.", ["error"], registry=self.registry)

    def _declare_gauges(self) -> None:
        self.running = Gauge("moespan_num_requests_running", "Requests in the engine.", registry=self.registry)
        self.waiting = Gauge("moespan_num_requests_waiting", "Requests in the queue.", registry=self.registry)
        self.kv_usage = Gauge("moespan_kv_cache_usage_perc", "Used KV pages, 0 to 1.", registry=self.registry)
        self.experts_per_token = Gauge("moespan_experts_per_token", "Routed experts that a token uses; 0: a model without experts.", registry=self.registry)
        self.prefill_rate = Gauge("moespan_prefill_tokens_per_second", "Prefill speed of the last request.", registry=self.registry)
        self.decode_rate = Gauge("moespan_decode_tokens_per_second", "Decode speed of the last request.", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"moespan_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float], kv_usage: Callable[[], float]) -> None:
        """Read the scheduler's state when scraped, so that it costs a step nothing."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)
        self.kv_usage.set_function(kv_usage)

    def watch_roads(self, taken: Callable[[], Mapping[str, int]]) -> None:
        """Where the routed experts of prompts were computed (--prefill): chunks of a layer by their road."""
        text = "Chunks of a layer's routed experts in prefill, by where they were computed."
        roads = Gauge("moespan_prefill_expert_chunks", text, ["road"], registry=self.registry)
        for road in ("cpu", "stream", "split"):
            roads.labels(road).set_function(partial(_count, taken, road))

    def finished(self, reason: FinishReason, timings: Timings) -> None:
        """A request ended; one that was cancelled in the queue or in prefill has no decode figures."""
        self.success.labels(reason.value).inc()
        self.queue_time.observe(timings.queue_s)
        if timings.generated_tokens:
            self._generated(timings)

    def _generated(self, timings: Timings) -> None:
        self.time_to_first_token.observe(timings.queue_s + timings.prefill_s)
        self.prefill_time.observe(timings.prefill_s)
        self.decode_time.observe(timings.decode_s)
        self.e2e.observe(timings.queue_s + timings.prefill_s + timings.decode_s)
        if rate := timings.prefill_per_s:
            self.prefill_rate.set(rate)
        if rate := timings.decode_per_s:
            self.decode_rate.set(rate)

    def failed(self, error: Exception) -> None:
        """A request was refused (ContextOverflow, QueueFull, ShuttingDown) or failed (EngineFailure)."""
        self.failure.labels(type(error).__name__).inc()

    def exposition(self) -> tuple[bytes, str]:
        """What /metrics answers: the body and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


def _count(taken: Callable[[], Mapping[str, int]], road: str) -> float:
    return taken().get(road, 0)
