import numpy as np
import pytest
import scipy.linalg
import torchmetrics.metric
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import EvaluationError
from pipeline.scores.frechet import FeatureSums, Reference, frechet_distance, sum_features


def independent_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance with scipy's matrix root, and covariances about the mean."""
    m, s = a.mean(0) - b.mean(0), (np.cov(a.T), np.cov(b.T))
    root = scipy.linalg.sqrtm(s[0] @ s[1])
    return float(m @ m + np.trace(s[0] + s[1] - 2 * np.real(root)))


def draw(seed: int, count: int = 200, num_features: int = 6, offset: float = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(num_features, num_features))
    features = rng.normal(size=(count, num_features)) @ mix + seed + offset
    return features.astype(np.float32)


def traces(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.astype(np.float64).var(0).sum() + b.astype(np.float64).var(0).sum())


@pytest.mark.parametrize("num_features", [2, 6, 48])
@pytest.mark.parametrize("offset", [0, 1000])
def test_agrees_with_an_independent_implementation(num_features: int, offset: float) -> None:
    a, b = (draw(seed, 10 * num_features, num_features, offset) for seed in (0, 3))
    ours = frechet_distance(sum_features(a), sum_features(b))
    theirs = independent_distance(a.astype(np.float64), b.astype(np.float64))
    assert abs(ours - theirs) < 1e-6 * traces(a, b)


@pytest.mark.parametrize("offset", [0, 1000])
def test_a_set_has_no_distance_to_itself(offset: float) -> None:
    a = draw(3, 480, 48, offset)
    assert abs(frechet_distance(sum_features(a), sum_features(a))) < 1e-6 * traces(a, a)


def test_two_workers_equal_one() -> None:
    a, b = draw(1), draw(2)
    merged = sum_features(a[::2]) + sum_features(a[1::2])
    one = frechet_distance(sum_features(b), sum_features(a))
    assert frechet_distance(sum_features(b), merged) == pytest.approx(one, rel=1e-9)


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 199), max_size=6), seed=st.integers(0, 99))
def test_any_grouping_of_shards_gives_the_same_value(cuts: list[int], seed: int) -> None:
    features, other = draw(1), sum_features(draw(2))
    shards = [sum_features(part) for part in np.split(features, sorted(set(cuts)))]
    merged = FeatureSums(0, np.zeros(6), np.zeros((6, 6)))
    for k in np.random.default_rng(seed).permutation(len(shards)):
        merged += shards[k]
    whole = sum_features(features)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-12)
    value = frechet_distance(other, whole)
    assert frechet_distance(other, merged) == pytest.approx(value, rel=1e-9)


def test_a_known_shift_is_its_square() -> None:
    a = draw(4)
    distance = frechet_distance(sum_features(a), sum_features(a + 0.5))
    assert abs(distance - 6 * 0.25) < 1e-6 * traces(a, a)


def test_a_known_scale_is_in_the_traces() -> None:
    a = draw(4)
    a = a - a.mean(0)
    # tr S + tr 9 S - 2 tr (S 9 S)^(1/2) = (1 - 3)^2 tr S
    expected = 4 * np.trace(np.cov(a.T.astype(np.float64)))
    distance = frechet_distance(sum_features(a), sum_features(3 * a))
    assert abs(distance - expected) < 1e-6 * expected


@pytest.mark.parametrize("is_singular", [False, True])
def test_a_factored_reference_agrees_with_torchmetrics(is_singular: bool) -> None:
    a, others = draw(0), [draw(seed) for seed in (0, 1, 5)]
    if is_singular:
        a[:, 2] = 7
    real, generated = sum_features(a), [sum_features(b) for b in others]
    found = Reference(real.mean, real.covariance).distance(
        np.stack([g.mean for g in generated]), np.stack([g.covariance for g in generated])
    )
    for value, sums, b in zip(found, generated, others, strict=True):
        assert abs(value - frechet_distance(real, sums)) < 1e-6 * traces(a, b)


def test_features_that_are_not_numbers_are_refused() -> None:
    features = draw(0)
    features[[3, 8], 1] = np.nan, np.inf
    with pytest.raises(EvaluationError, match="2 of 200 items"):
        sum_features(features)


def test_one_rank_of_many_computes_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("it waits for the other ranks, which do not come")

    monkeypatch.setattr(torchmetrics.metric, "jit_distributed_available", lambda: True)
    monkeypatch.setattr(torchmetrics.metric, "gather_all_tensors", never)
    a, b = (sum_features(draw(seed)) for seed in (0, 3))
    assert frechet_distance(a, b) > 0
