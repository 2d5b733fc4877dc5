"""What a reply cost, as OpenAI and llama.cpp write it."""

from __future__ import annotations

from collections.abc import Sequence

from server.api.problems import Json
from server.scheduler.reply import Finished


def usage(ends: Sequence[Finished]) -> Json:
    """Token counts over all choices; of those that share a prompt, one counts it."""
    prompt = sum(end.prompt_tokens for end in ends)
    completion = sum(end.completion_tokens for end in ends)
    reasoning = sum(end.reasoning_tokens for end in ends)
    thought = {"completion_tokens_details": {"reasoning_tokens": reasoning}} if reasoning else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.timings.cached_tokens for end in ends if end.prompt_tokens)},
        **thought,
    }


def timings(ends: Sequence[Finished]) -> Json:
    """llama.cpp's `timings`, over all choices: counts, milliseconds, tokens a second."""
    each = [end.timings for end in ends]
    cached, computed = sum(t.cached_tokens for t in each), sum(t.prompt_tokens - t.cached_tokens for t in each)
    prefill_s, decode_s = sum(t.prefill_s for t in each), sum(t.decode_s for t in each)
    decoded = sum(max(t.generated_tokens - 1, 0) for t in each)  # the first token of each reply is prefill's
    return {
        "cache_n": cached,
        "prompt_n": computed,
        "prompt_ms": round(prefill_s * 1e3, 3),
        "prompt_per_second": round(_rate(computed, prefill_s), 3),
        "predicted_n": sum(t.generated_tokens for t in each),
        "predicted_ms": round(decode_s * 1e3, 3),
        "predicted_per_second": round(_rate(decoded, decode_s), 3),
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
