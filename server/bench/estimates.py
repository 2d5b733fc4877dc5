"""Means, shares and quantiles with their standard errors: what a measured quality is worth.

Values that come in clusters (the tokens of a window, which share their context) are not independent, so their errors count clusters, not values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Cluster = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error; None where there is none: one value or one cluster alone, or a maximum."""

    value: float
    error: float | None
    n: int  # values, not clusters

    def scaled(self, value: float, slope: float) -> Estimate:
        """A function of the figure, by its value and its derivative there (the delta method)."""
        return Estimate(value, None if self.error is None else abs(slope) * self.error, self.n)


def mean(values: ArrayLike) -> Estimate:
    """The mean of independent values, at least one; of truths, their share."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else None
    return Estimate(float(array.mean()), error, array.size)


def stratified(strata: Sequence[Estimate]) -> Estimate:
    """The mean over strata that were drawn from separately, each weighed by its size (Cochran, Sampling Techniques, 5.3)."""
    n = sum(stratum.n for stratum in strata)
    errors = [stratum.error for stratum in strata if stratum.error is not None]
    error = math.sqrt(sum((stratum.n * (stratum.error or 0.0)) ** 2 for stratum in strata)) / n if len(errors) == len(strata) else None
    return Estimate(sum(stratum.n * stratum.value for stratum in strata) / n, error, n)


def clustered_mean(clusters: Sequence[Cluster]) -> Estimate:
    """The mean over all values of clusters of any sizes: a ratio of sums, with the ratio's error (Cochran, 6.4).

    error^2 = k / (k - 1) * sum over clusters of (sum_c - mean * n_c)^2 / n^2, for k clusters with n values in all.
    """
    sums, sizes = np.array([cluster.sum() for cluster in clusters]), np.array([cluster.size for cluster in clusters])
    n, k = int(sizes.sum()), len(clusters)
    value = float(sums.sum()) / n
    error = math.sqrt(k / (k - 1) * float(((sums - value * sizes) ** 2).sum())) / n if k > 1 else None
    return Estimate(value, error, n)


def clustered_quantile(clusters: Sequence[Cluster], q: float) -> Estimate:
    """The q-quantile over all values, 0 < q < 1. Its error is half of what the quantile moves when q moves by the error of the share of
    values below it, one up and one down (Woodruff 1952)."""
    values = np.concatenate(clusters)
    value = float(np.quantile(values, q))
    share = clustered_mean([(cluster <= value).astype(np.float64) for cluster in clusters])
    if share.error is None:
        return Estimate(value, None, values.size)
    low, high = np.quantile(values, [max(q - share.error, 0.0), min(q + share.error, 1.0)])
    return Estimate(value, float(high - low) / 2, values.size)
