import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.statistics import frechet_distance, sum_features


class Extractor(nn.Module):
    """torchmetrics asks an extractor for its width only."""

    num_features = 6


def independent_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance with scipy's matrix root."""
    m, s = a.mean(0) - b.mean(0), (np.cov(a.T), np.cov(b.T))
    root = scipy.linalg.sqrtm(s[0] @ s[1])
    return float(m @ m + np.trace(s[0] + s[1] - 2 * np.real(root)))


def draw(seed: int, count: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 6)) @ rng.normal(size=(6, 6)) + seed).astype(np.float32)


@pytest.mark.parametrize("seeds", [(0, 1), (2, 5)])
def test_agrees_with_an_independent_implementation(seeds: tuple[int, int]) -> None:
    a, b = (draw(seed) for seed in seeds)
    ours = frechet_distance(Extractor(), sum_features(a), sum_features(b))
    theirs = independent_distance(a.astype(np.float64), b.astype(np.float64))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_set_has_no_distance_to_itself() -> None:
    sums = sum_features(draw(3))
    scale = 2 * np.trace(np.cov(draw(3).T))
    assert abs(frechet_distance(Extractor(), sums, sums)) < 1e-6 * scale


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 199), max_size=4))
def test_any_grouping_gives_the_same_sums(cuts: list[int]) -> None:
    features = draw(1)
    whole = sum_features(features)
    first, *rest = np.split(features, sorted(set(cuts)))
    merged = sum_features(first)
    for part in rest:
        merged += sum_features(part)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-12)


def test_a_known_shift_is_its_square() -> None:
    a = draw(4)
    shifted = a + np.float32(0.5)
    distance = frechet_distance(Extractor(), sum_features(a), sum_features(shifted))
    assert distance == pytest.approx(6 * 0.25, rel=1e-3)
