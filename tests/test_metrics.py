"""The metrics by themselves: what is there from the start, what is counted, and what the engine is asked for at a scrape."""

from __future__ import annotations

import pytest

from server.errors import QueueFull
from server.metrics import Metrics
from server.types import EngineUse, FinishReason, GpuUse, Timings


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"moespan_{name}", labels)


def test_counters_with_labels_are_there_before_they_count() -> None:
    """Prometheus sees a counter rise only from one scrape to the next: the first failure must not be the series' first value."""
    metrics = Metrics()
    assert value(metrics, "request_failure_total", error="EngineFailure") == 0
    assert all(value(metrics, "request_success_total", finished_reason=reason.value) == 0 for reason in FinishReason)
    metrics.failed(QueueFull(1, 2))
    assert value(metrics, "request_failure_total", error="QueueFull") == 1


def test_replies_and_their_tokens_are_counted_by_their_end() -> None:
    metrics = Metrics()
    metrics.finished(FinishReason.LENGTH, Timings(0.5, 1.0, 2.0, prompt_tokens=10, generated_tokens=5))
    metrics.finished(FinishReason.CANCELLED, Timings(queue_s=3.0))
    assert value(metrics, "finished_tokens_total", finished_reason="length") == 5
    assert value(metrics, "finished_tokens_total", finished_reason="cancelled") == 0
    assert value(metrics, "request_queue_time_seconds_sum") == 3.5
    assert value(metrics, "time_to_first_token_seconds_sum") == 1.5
    assert (value(metrics, "request_prompt_tokens_sum"), value(metrics, "request_generation_tokens_sum")) == (10, 5)
    assert (value(metrics, "prefill_tokens_per_second"), value(metrics, "decode_tokens_per_second")) == (10, 2)


def test_steps_and_loading() -> None:
    metrics = Metrics()
    assert value(metrics, "load_progress_ratio") == 0
    metrics.loading(30, 120)
    assert value(metrics, "load_progress_ratio") == 0.25
    metrics.stepped(prefill=True, seconds=0.5)
    metrics.stepped(prefill=False, seconds=0.25)
    assert value(metrics, "engine_step_seconds_total", phase="prefill") == 0.5
    assert value(metrics, "engine_step_seconds_total", phase="decode") == 0.25
    assert value(metrics, "state", state="loading") == 1
    metrics.watch_state(lambda: "ready")
    assert (value(metrics, "state", state="loading"), value(metrics, "state", state="ready")) == (0, 1)


def test_the_engine_is_asked_at_a_scrape_and_not_missed() -> None:
    metrics = Metrics()
    assert value(metrics, "cpu_pool_threads") is None
    metrics.watch_engine(lambda: EngineUse(8, 2.5, 1000, 200, 30, {"cpu": 4, "stream": 2}, GpuUse(1.5, 6, 8)))
    assert (value(metrics, "cpu_pool_threads"), value(metrics, "cpu_pool_busy_seconds_total")) == (8, 2.5)
    assert [value(metrics, "weight_read_bytes_total", weights=kind) for kind in ("experts", "dense", "streamed")] == [1000, 200, 30]
    assert [value(metrics, "prefill_expert_chunks_total", road=road) for road in ("cpu", "stream", "split")] == [4, 2, 0]
    assert (value(metrics, "gpu_busy_seconds_total"), value(metrics, "gpu_memory_used_bytes"), value(metrics, "gpu_memory_total_bytes")) == (1.5, 6, 8)
    metrics.watch_engine(lambda: EngineUse(8, 2.5, 1000, 200))
    assert value(metrics, "gpu_busy_seconds_total") is None
    assert value(metrics, "prefill_expert_chunks_total", road="cpu") is None


@pytest.mark.parametrize("use", [None, EngineUse(8, 2.5, 1000, 200, 30, None, GpuUse(1.5, 6, 8))])
def test_live_figures_are_plain_json(use: EngineUse | None) -> None:
    metrics = Metrics()
    metrics.watch_engine(lambda: use)
    live = metrics.live()
    assert live["state"] == "loading"
    assert live["engine"] == (use and {"pool_threads": 8, "pool_busy_s": 2.5, "expert_bytes": 1030, "dense_bytes": 200,
                                       "gpu": {"busy_s": 1.5, "memory_used": 6, "memory_total": 8}})  # fmt: skip
