"""Standard errors against figures worked out by hand, and against what repeated sampling shows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.bench.estimates import Estimate, clustered_mean, clustered_quantile, mean, stratified


def test_a_mean_has_the_error_of_independent_values() -> None:
    assert mean([1.0, 2.0, 3.0, 4.0]) == Estimate(2.5, pytest.approx(math.sqrt(5 / 3) / 2), 4)
    assert mean([True, False, True, True]) == Estimate(0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 3)), 4)  # p (1 - p) / (n - 1)
    assert mean([5.0]) == Estimate(5.0, None, 1)


def test_strata_are_weighed_by_their_size() -> None:
    both = stratified([Estimate(0.5, 0.1, 30), Estimate(0.9, 0.2, 10)])
    assert both == Estimate(pytest.approx(0.6), pytest.approx(math.hypot(0.75 * 0.1, 0.25 * 0.2)), 40)
    assert stratified([Estimate(1.0, 0.0, 2), Estimate(0.0, None, 1)]) == Estimate(pytest.approx(2 / 3), None, 3)


def test_clusters_of_one_value_are_independent_values() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert clustered_mean(np.split(values, 4)) == Estimate(mean(values).value, pytest.approx(mean(values).error), 4)


def test_a_clustered_mean_counts_clusters() -> None:
    whole = clustered_mean([np.full(10, 1.0), np.full(10, 3.0)])  # two opinions, each said ten times
    assert whole == Estimate(2.0, pytest.approx(1.0), 20)  # sqrt(2 / 1 * (10^2 + 10^2)) / 20
    uneven = clustered_mean([np.array([1.0, 2.0]), np.array([6.0])])
    assert uneven == Estimate(3.0, pytest.approx(math.sqrt(2 * (9 + 9)) / 3), 3)
    assert clustered_mean([np.array([1.0, 2.0])]).error is None


def clusters(rng: np.random.Generator, k: int) -> list[np.ndarray]:
    """Values that are alike within a cluster."""
    return [rng.standard_normal() + rng.standard_normal(rng.integers(5, 15)) for _ in range(k)]


@pytest.mark.parametrize("estimate", [clustered_mean, lambda found: clustered_quantile(found, 0.9)])
def test_errors_are_those_that_repeated_sampling_shows(estimate) -> None:
    """The standard deviation of 300 figures is known to 1 / sqrt(600) = 4 %, and the mean of their errors better; a tenth leaves room for bias."""
    rng = np.random.default_rng(0)
    found = [estimate(clusters(rng, 200)) for _ in range(300)]
    spread = np.std([each.value for each in found])
    assert np.mean([each.error for each in found]) == pytest.approx(spread, rel=0.1)


def test_a_quantile_is_numpys_and_has_no_error_of_one_cluster() -> None:
    values = np.arange(101.0)
    assert clustered_quantile([values], 0.25) == Estimate(25.0, None, 101)
    evens_and_odds, halves = (clustered_quantile(parts, 0.5) for parts in ([values[::2], values[1::2]], [values[:51], values[51:]]))
    assert evens_and_odds.value == halves.value == 50.0
    assert evens_and_odds.error < 1  # each cluster tells the same
    assert halves.error == pytest.approx(50.0, rel=0.02)  # all that is below is in one, all that is above in the other: nothing is known


def test_a_function_of_a_figure_takes_its_slope() -> None:
    assert Estimate(2.0, 0.1, 5).scaled(math.exp(2), slope=-3) == Estimate(math.exp(2), pytest.approx(0.3), 5)
    assert Estimate(2.0, None, 5).scaled(4.0, slope=4.0).error is None
