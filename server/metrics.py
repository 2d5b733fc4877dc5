"""Every metric, declared here. The names and meanings are vLLM's with our prefix, so that dashboards of the field carry over.

One `Metrics` is made by the composition root and handed to the scheduler's service, which writes it, and to the API, which exposes it.
It has its own registry: nothing is global, and a test makes as many as it likes.

What a step would have to pay for is not written but read when somebody asks: the queue, the pages, and what the engine's parts have done (`watch...`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.types import EngineUse, FinishReason, Timings

# Seconds. From a small model's token on a fast machine to an R1 prompt that takes a quarter of an hour.
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
LENGTH_BUCKETS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # tokens
STATES = ("loading", "ready", "stopping")
ROADS = ("cpu", "stream", "split")


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How much of the model's file has been read."""

    done: int = 0  # bytes
    total: int = 0  # 0: not known yet


class Metrics:
    """The figures of one server. The scheduler's worker and service are the writers; a scrape may come from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU time, open files, start time
        self._declare_histograms()
        self._declare_counters()
        self._declare_gauges()
        self.load = LoadProgress()
        self._use: Callable[[], EngineUse | None] = lambda: None
        self._state: Callable[[], str] = lambda: "loading"
        self.registry.register(_EngineCollector(self.engine_use))

    def _declare_histograms(self) -> None:
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Submitted to first token drawn.", REQUEST_BUCKETS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "One token drawn to the next.", TOKEN_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Submitted to last token drawn.", REQUEST_BUCKETS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Submitted to first prefill chunk.", REQUEST_BUCKETS)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "First prefill chunk to first token drawn.", REQUEST_BUCKETS)
        self.decode_time = self._histogram("request_decode_time_seconds", "First token drawn to last token drawn.", REQUEST_BUCKETS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self.reply_length = self._histogram("request_generation_tokens", "Tokens drawn for a request.", LENGTH_BUCKETS)

    def _declare_counters(self) -> None:
        self.prompt_tokens = Counter("moespan_prompt_tokens", "Prompt tokens computed.", registry=self.registry)
        self.generation_tokens = Counter("moespan_generation_tokens", "Tokens drawn.", registry=self.registry)
        self.success = Counter(
            "moespan_request_success", "Requests that ended without an error; cancelled: the client went away.", ["finished_reason"], registry=self.registry
        )
        self.finished_tokens = Counter("moespan_finished_tokens", "Tokens drawn for requests that are over.", ["finished_reason"], registry=self.registry)
        self.failure = Counter("moespan_request_failure", "Requests that were refused or failed.", ["error"], registry=self.registry)
        for reason in FinishReason:  # there from the start, at 0: Prometheus does not see a counter rise that begins at 1
            self.success.labels(reason.value), self.finished_tokens.labels(reason.value)
        for error in ("ContextOverflow", "QueueFull", "Busy", "ShuttingDown", "RequestTimeout", "SlowReader", "EngineFailure"):
            self.failure.labels(error)
        steps = Counter("moespan_engine_step_seconds", "Time that the engine's steps took, drawing included.", ["phase"], registry=self.registry)
        self._prefill_steps, self._decode_steps = steps.labels("prefill"), steps.labels("decode")

    def _declare_gauges(self) -> None:
        self.running = Gauge("moespan_num_requests_running", "Requests in the engine.", registry=self.registry)
        self.waiting = Gauge("moespan_num_requests_waiting", "Requests in the queue.", registry=self.registry)
        self.queue_capacity = Gauge("moespan_queue_capacity_requests", "Requests that may wait; more are refused.", registry=self.registry)
        self.kv_usage = Gauge("moespan_kv_cache_usage_perc", "Used KV pages, 0 to 1.", registry=self.registry)
        self.kv_tokens = Gauge("moespan_kv_cache_capacity_tokens", "Tokens that a request may have in the KV cache.", registry=self.registry)
        self.experts_per_token = Gauge("moespan_experts_per_token", "Routed experts that a token uses; 0: a model without experts.", registry=self.registry)
        self.prefill_rate = Gauge("moespan_prefill_tokens_per_second", "Prefill speed of the last request.", registry=self.registry)
        self.decode_rate = Gauge("moespan_decode_tokens_per_second", "Decode speed of the last request.", registry=self.registry)
        self.build = Info("moespan_build", "What runs.", registry=self.registry)
        self.model = Info("moespan_model", "What is served, and on what.", registry=self.registry)
        progress = Gauge("moespan_load_progress_ratio", "How much of the model's file has been read, 0 to 1.", registry=self.registry)
        progress.set_function(lambda: self.load.done / self.load.total if self.load.total else 0.0)
        states = Gauge("moespan_state", "1 for the state that the server is in.", ["state"], registry=self.registry)
        for state in STATES:
            states.labels(state).set_function(partial(self._is, state))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"moespan_{name}", text, buckets=buckets, registry=self.registry)

    # --- What is read when somebody asks -----------------------------------------

    def watch(self, running: Callable[[], float], waiting: Callable[[], float], kv_usage: Callable[[], float]) -> None:
        """Read the scheduler's state when scraped, so that it costs a step nothing."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)
        self.kv_usage.set_function(kv_usage)

    def watch_engine(self, use: Callable[[], EngineUse | None]) -> None:
        """What the engine's parts have done; None once it is closed."""
        self._use = use

    def watch_state(self, state: Callable[[], str]) -> None:
        """One of STATES."""
        self._state = state

    def _is(self, state: str) -> float:
        return float(self.state == state)

    @property
    def state(self) -> str:
        """Loading, ready or stopping."""
        return self._state()

    def engine_use(self) -> EngineUse | None:
        """What the engine's parts have done; None before it is there and once it is closed."""
        return self._use()

    # --- What is written ---------------------------------------------------------

    def loading(self, done: int, total: int) -> None:
        """So many bytes of the model's file have been read."""
        self.load = LoadProgress(done, total)

    def stepped(self, prefill: bool, seconds: float) -> None:
        """A step of the engine is over."""
        (self._prefill_steps if prefill else self._decode_steps).inc(seconds)

    def finished(self, reason: FinishReason, timings: Timings) -> None:
        """A request ended; one that was cancelled in the queue or in prefill has no decode figures."""
        self.success.labels(reason.value).inc()
        self.finished_tokens.labels(reason.value).inc(timings.generated_tokens)
        self.queue_time.observe(timings.queue_s)
        if timings.generated_tokens:
            self._generated(timings)

    def _generated(self, timings: Timings) -> None:
        self.time_to_first_token.observe(timings.queue_s + timings.prefill_s)
        self.prefill_time.observe(timings.prefill_s)
        self.decode_time.observe(timings.decode_s)
        self.e2e.observe(timings.queue_s + timings.prefill_s + timings.decode_s)
        self.prompt_length.observe(timings.prompt_tokens)
        self.reply_length.observe(timings.generated_tokens)
        if rate := timings.prefill_per_s:
            self.prefill_rate.set(rate)
        if rate := timings.decode_per_s:
            self.decode_rate.set(rate)

    def failed(self, error: Exception) -> None:
        """A request was refused (ContextOverflow, QueueFull, Busy, ShuttingDown), cut short (RequestTimeout, SlowReader) or failed (EngineFailure)."""
        self.failure.labels(type(error).__name__).inc()

    # --- What is told ------------------------------------------------------------

    def exposition(self) -> tuple[bytes, str]:
        """What /metrics answers: the body and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def live(self) -> dict[str, object]:
        """What a page shows of a running server. Counters: who asks twice has the speed between, by `clock_s`."""
        use = self.engine_use()
        return {
            "clock_s": time.monotonic(),
            "state": self.state,
            "load": {"done_bytes": self.load.done, "total_bytes": self.load.total},
            "running": _value(self.running),
            "waiting": _value(self.waiting),
            "queue_capacity": _value(self.queue_capacity),
            "kv_usage": _value(self.kv_usage),
            "kv_tokens": _value(self.kv_tokens),
            "prompt_tokens": _value(self.prompt_tokens),
            "generation_tokens": _value(self.generation_tokens),
            "prefill_s": _value(self._prefill_steps),
            "decode_s": _value(self._decode_steps),
            "last_prefill_per_s": _value(self.prefill_rate),
            "last_decode_per_s": _value(self.decode_rate),
            "engine": None if use is None else _use_as_json(use),
        }


class _EngineCollector(Collector):
    """The engine's own counters, as metrics, at the moment of a scrape."""

    def __init__(self, use: Callable[[], EngineUse | None]) -> None:
        self._use = use

    def collect(self) -> Iterator[Metric]:
        use = self._use()
        if use is None:
            return
        yield GaugeMetricFamily("moespan_cpu_pool_threads", "Pinned CPU threads.", use.pool_threads)
        yield CounterMetricFamily("moespan_cpu_pool_busy_seconds", "Time that all of the pool's threads worked, waiting apart.", use.pool_busy_s)
        read = CounterMetricFamily("moespan_weight_read_bytes", "Bytes of weights read from RAM; streamed: by the GPU, over PCIe.", labels=["weights"])
        for weights, count in (("experts", use.expert_bytes), ("dense", use.dense_bytes), ("streamed", use.streamed_bytes)):
            read.add_metric([weights], count)
        yield read
        if use.gpu is not None:
            yield CounterMetricFamily("moespan_gpu_busy_seconds", "Time in which something ran on the GPU, whoever's it was.", use.gpu.busy_s)
            yield GaugeMetricFamily("moespan_gpu_memory_used_bytes", "Of the GPU's memory, by whomever.", use.gpu.memory_used)
            yield GaugeMetricFamily("moespan_gpu_memory_total_bytes", "The GPU's memory.", use.gpu.memory_total)
        if use.roads is not None:
            roads = CounterMetricFamily("moespan_prefill_expert_chunks", "Chunks of a layer's routed experts in prefill, by where they ran.", labels=["road"])
            for road in ROADS:
                roads.add_metric([road], use.roads.get(road, 0))
            yield roads


def _value(metric: Counter | Gauge) -> float:
    """Of one without labels."""
    return next(iter(metric.collect())).samples[0].value


def _use_as_json(use: EngineUse) -> dict[str, object]:
    gpu = use.gpu and {"busy_s": use.gpu.busy_s, "memory_used": use.gpu.memory_used, "memory_total": use.gpu.memory_total}
    return {
        "pool_threads": use.pool_threads,
        "pool_busy_s": use.pool_busy_s,
        "expert_bytes": use.expert_bytes + use.streamed_bytes,
        "dense_bytes": use.dense_bytes,
        "gpu": gpu,
    }
