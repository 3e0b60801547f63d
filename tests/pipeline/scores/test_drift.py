"""Shards of Gaussian features: near ones pass, far ones do not, and few are not judged."""

import numpy as np
import pytest

from pipeline.scores.drift import MIN_ITEMS, draw_rows, measure_drift
from pipeline.scores.frechet import FeatureSums, sum_features


def draw(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (shift + scale * rng.standard_normal((count, 8))).astype(np.float32)


@pytest.fixture(scope="module")
def training() -> np.ndarray:
    return draw(1000, seed=0)


@pytest.fixture(scope="module")
def reference() -> FeatureSums:
    return sum_features(draw(300, seed=1))


@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("count", [MIN_ITEMS, 300])
def test_images_like_the_others_pass(
    training: np.ndarray, reference: FeatureSums, seed: int, count: int
) -> None:
    drift = measure_drift(draw(count, seed), training, reference, factor=1.5)
    assert drift is not None
    assert not drift.has_drifted
    assert drift.count == count
    assert drift.limit == 1.5 * drift.largest


@pytest.mark.parametrize(("shift", "scale"), [(1.0, 1.0), (0.0, 2.0), (0.0, 0.2)])
def test_images_unlike_the_others_do_not(
    training: np.ndarray, reference: FeatureSums, shift: float, scale: float
) -> None:
    drift = measure_drift(draw(300, 2, shift, scale), training, reference, factor=1.5)
    assert drift is not None
    assert drift.has_drifted


def test_the_factor_is_what_may_be_beyond(training: np.ndarray, reference: FeatureSums) -> None:
    shard = draw(300, 2, shift=1.0)
    near = measure_drift(shard, training, reference, factor=1.0)
    far = measure_drift(shard, training, reference, factor=1000.0)
    assert near is not None
    assert far is not None
    assert (near.distance, near.largest) == (far.distance, far.largest)
    assert near.has_drifted
    assert not far.has_drifted


def test_a_distance_that_is_no_number_has_drifted(
    training: np.ndarray, reference: FeatureSums
) -> None:
    drift = measure_drift(draw(300, 2), training, reference, factor=float("nan"))
    assert drift is not None
    assert drift.has_drifted


def test_few_items_are_not_judged(training: np.ndarray, reference: FeatureSums) -> None:
    few = draw(MIN_ITEMS - 1, 2, shift=9.0)
    assert measure_drift(few, training, reference, factor=1.5) is None
    assert measure_drift(draw(300, 2), training[:60], reference, factor=1.5) is None


def test_of_a_shard_larger_than_half_the_training_as_many_are_looked_at(
    training: np.ndarray, reference: FeatureSums
) -> None:
    drift = measure_drift(draw(5000, 2), training, reference, factor=1.5)
    assert drift is not None
    assert drift.count == 500
    assert not drift.has_drifted


def test_rows_are_drawn_once_each_and_the_same_again() -> None:
    assert draw_rows(5, 5).tolist() == draw_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    some = draw_rows(1000, 100)
    assert len(set(some.tolist())) == 100
    assert some.tolist() == sorted(draw_rows(1000, 100).tolist())
    assert some.tolist() != draw_rows(1000, 100, seed=1).tolist()
