"""Perplexity of a model on windows of tokens, and how far its distributions are from those of a reference run: KL divergence and equal first tokens.

    record = score(engine, window, reference)

Every figure's error counts windows as clusters: the tokens of a window share their context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bench.estimates import Cluster, Estimate, clustered_mean, clustered_quantile
from server.bench.journal import Json
from server.bench.reference import Floats, Said
from server.bench.windows import Window
from server.engine.engine import LocalEngine
from server.engine.protocol import Step
from server.errors import ConfigError

ROWS = 64  # distributions held at a time: a vocabulary of 150,000 in float64 takes 1.2 MB each
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999}
_DIGITS = 7  # kept of each figure, as many as a float32 has


def score(engine: LocalEngine, window: Window, reference: Said | None = None, keep: Callable[[Said], None] | None = None) -> Json:
    """Run a window; the record of its scored tokens. `keep` gets their distributions, for a reference run."""
    targets = np.array(window.ids[window.first :], np.int64)
    if reference is not None and reference.nll.size != targets.size:
        raise ConfigError("The reference is damaged: a window has another number of tokens than the text's. Make it again.")
    parts: list[Json] = []
    kept: list[Said] = []
    for start, logprobs in _distributions(engine, window):
        stop = start + len(logprobs)
        said = Said.of(logprobs, targets[start:stop]) if keep else None
        if said:
            kept.append(said)
        parts.append(_part(logprobs, targets[start:stop], reference.part(start, stop) if reference else None))
    if keep:
        keep(Said.joined(kept))
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def _distributions(engine: LocalEngine, window: Window) -> Iterator[tuple[int, Floats]]:
    """Natural log-probabilities before each scored token, some rows at a time with the number of those before them. The last token is not run."""
    pages, chunk = tuple(range(-(-len(window.ids) // engine.page_size))), engine.prefill_chunk
    unscored, end = window.first - 1, len(window.ids) - 1
    for start in range(0, unscored, chunk):
        engine.step(Step(window.ids[start : min(start + chunk, unscored)], start, pages, None))
    for start in range(unscored, end, chunk):
        logits = engine.logits(Step(window.ids[start : min(start + chunk, end)], start, pages, None)).numpy()
        for row in range(0, len(logits), ROWS):
            yield start - unscored + row, _log_softmax(logits[row : row + ROWS].astype(np.float64))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _part(logprobs: Floats, targets: NDArray[np.int64], reference: Said | None) -> Json:
    nll = -np.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
    record: Json = {"nll": _rounded(nll.astype(np.float32))}  # as a reference holds it
    if reference is not None:
        record["reference_nll"] = _rounded(reference.nll)
        record["kl"] = _rounded(reference.kl(logprobs))
        record["same_top"] = (logprobs.argmax(axis=1) == reference.top).astype(int).tolist()
    return record


def _rounded(values: NDArray[Any]) -> list[float]:
    """Figures that read back as they were written, and take no more room than they are worth."""
    return [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


# --- Results -----------------------------------------------------------------


def summary(records: Sequence[Json]) -> dict[str, Any]:
    """Perplexity; with a reference also its perplexity, the ratio of both, KL divergence (nats) and the share of equal first tokens."""
    nll = _column(records, "nll")
    result: dict[str, Any] = {"windows": len(records), "tokens": sum(map(len, nll)), "perplexity": _perplexity(nll)}
    if "kl" not in records[0]:
        return result
    reference, kl = _column(records, "reference_nll"), _column(records, "kl")
    return {
        **result,
        "reference_perplexity": _perplexity(reference),
        "perplexity_ratio": _perplexity(_differences(reference, nll)),
        "kl": {
            "mean": clustered_mean(kl),
            **{name: clustered_quantile(kl, q) for name, q in QUANTILES.items()},
            "max": Estimate(float(max(map(np.max, kl))), None, result["tokens"]),
        },
        "same_top": clustered_mean(_column(records, "same_top")),
    }


def difference(a: Sequence[Json], b: Sequence[Json]) -> dict[str, Any]:
    """The second run beside the first, token by token over the same windows: the ratio of perplexities, and what KL and equal first tokens changed by."""
    if [len(record["nll"]) for record in a] != [len(record["nll"]) for record in b]:
        raise ConfigError("The two runs are not over the same windows: finish the shorter one, or compare runs of the same text.")
    result: dict[str, Any] = {"perplexity_ratio": _perplexity(_differences(_column(a, "nll"), _column(b, "nll")))}
    if "kl" in a[0] and "kl" in b[0]:
        for name, key in (("kl_mean", "kl"), ("same_top", "same_top")):
            result[name] = clustered_mean(_differences(_column(a, key), _column(b, key)))
    return result


def _column(records: Sequence[Json], key: str) -> list[Cluster]:
    return [np.array(record[key], np.float64) for record in records]


def _differences(a: Sequence[Cluster], b: Sequence[Cluster]) -> list[Cluster]:
    """b - a."""
    return [after - before for before, after in zip(a, b, strict=True)]


def _perplexity(nll: Sequence[Cluster]) -> Estimate:
    """exp(mean); of differences of nll, the ratio of two perplexities."""
    estimate = clustered_mean(nll)
    value = math.exp(estimate.value)
    return estimate.scaled(value, slope=value)


def progress_line(records: Sequence[Json]) -> str:
    """The perplexity so far, for a progress bar."""
    return f"perplexity {_perplexity(_column(records, 'nll')).value:.3f}" if records else ""
