"""The interval is held against the truth of Gaussians, which is known in closed form.

The whole table, as in the decision page: pytest -m slow -rP tests/pipeline/scores/test_interval.py
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import scipy.stats

from pipeline.scores.frechet import FeatureSums, sum_features
from pipeline.scores.interval import (
    GROUPS,
    LEVEL,
    STUDENT_T,
    Interval,
    min_samples,
    unbiased_distance,
)

REPEATS = 100


@dataclass(frozen=True)
class Case:
    """The reference is N(0, S), samples N(m, scale S) with |m| = shift and tr S about 2 d."""

    num_features: int
    num_samples: int
    shift: float
    scale: float
    is_reference_fixed: bool
    num_references: int | None = None  # as many as samples

    @property
    def root(self) -> np.ndarray:
        d = self.num_features
        return np.eye(d) + np.random.default_rng(5).normal(size=(d, d)) / d**0.5

    @property
    def truth(self) -> float:
        return self.shift**2 + np.square(self.root).sum() * (1 - self.scale**0.5) ** 2

    def draw(self, seed: int) -> tuple[FeatureSums | np.ndarray, np.ndarray]:
        """The reference, and the features of the samples."""
        rng, d = np.random.default_rng(seed), self.num_features
        samples = rng.normal(size=(self.num_samples, d)) @ self.root.T * self.scale**0.5
        samples += self.shift / d**0.5
        if self.is_reference_fixed:  # then the truth is 0 where shift is 0 and scale is 1
            return FeatureSums(1001, np.zeros(d), 1000 * self.root @ self.root.T), samples
        count = self.num_references or self.num_samples
        return rng.normal(size=(count, d)) @ self.root.T, samples


def measure(case: Case) -> tuple[int, float, float, float, float]:
    """How many of 100 intervals hold the truth; truth, mean error, deviation, mean reach."""
    found = []
    for seed in range(REPEATS):
        interval = unbiased_distance(*case.draw(seed))
        assert interval is not None
        found.append(interval)
    errors = np.array([interval.value - case.truth for interval in found])
    hits = sum(interval.low <= case.truth <= interval.high for interval in found)
    # Where both ends were clipped nothing is known of the reach.
    reach = float(np.mean([i.high - i.value for i in found if i.high > 0]))
    return hits, case.truth, float(errors.mean()), float(errors.std()), reach


FEW = [
    Case(2, 40, 0.0, 1.0, is_reference_fixed=True),
    Case(2, 200, 0.5, 1.5, is_reference_fixed=False),
    Case(8, 80, 0.3, 1.0, is_reference_fixed=True),
    Case(8, 80, 1.0, 0.7, is_reference_fixed=False),
]
SIZES = [(2, 40), (2, 1000), (8, 80), (8, 1000), (16, 160), (16, 1000), (64, 640), (64, 5000)]
SHIFTS_AND_SCALES = [(0.0, 1.0), (0.3, 1.0), (0.0, 1.5), (1.0, 0.7)]
MANY = [
    Case(*size, *kind, is_reference_fixed=fixed)
    for size, kind, fixed in product(SIZES, SHIFTS_AND_SCALES, (True, False))
]
MANY += [
    Case(8, 200, *kind, is_reference_fixed=False, num_references=count)
    for kind, count in product(SHIFTS_AND_SCALES, (100, 2000))
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_contains_the_truth_nine_times_of_ten(case: Case) -> None:
    hits, _, error, deviation, reach = measure(case)
    assert hits >= 90
    assert abs(error) < 4 * deviation / REPEATS**0.5  # no bias is left
    assert reach / STUDENT_T < 2 * deviation  # and not because it is wide


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_contains_the_truth_nine_times_of_ten_in_every_case(case: Case) -> None:
    hits, truth, error, deviation, reach = measure(case)
    reference = "fixed" if case.is_reference_fixed else str(case.num_references or "N")
    print(
        f"| {case.num_features} | {case.num_samples} | {case.shift} | {case.scale} | {reference} "
        f"| {truth:.3f} | {error:+.3f} | {deviation:.3f} | {reach / STUDENT_T:.3f} | {hits} |"
    )
    assert hits >= 90


def intervals(case: Case, seed: int = 0) -> Interval:
    found = unbiased_distance(*case.draw(seed))
    assert found is not None
    return found


def test_is_one_sided_where_nothing_tells_the_distributions_apart() -> None:
    case = Case(8, 400, 0.0, 1.0, is_reference_fixed=True)
    found = intervals(case)
    assert found.low == 0
    assert 0 < found.high < 1
    assert found.is_reference_fixed


def test_takes_the_bias_away() -> None:
    case = Case(8, 80, 0.0, 1.0, is_reference_fixed=False)
    assert abs(np.mean([intervals(case, seed).value for seed in range(20)])) < 0.3
    shifted = Case(8, 80, 1.0, 1.0, is_reference_fixed=False)
    assert np.mean([intervals(shifted, seed).value for seed in range(20)]) == pytest.approx(1, 0.3)


def test_a_reference_that_is_a_sample_is_less_sure() -> None:
    reference, samples = Case(8, 400, 1.0, 1.0, is_reference_fixed=False).draw(0)
    assert isinstance(reference, np.ndarray)
    to_sample, to_fixed = (
        unbiased_distance(kind, samples) for kind in (reference, sum_features(reference))
    )
    assert to_sample is not None
    assert to_fixed is not None
    assert not to_sample.is_reference_fixed
    assert to_sample.high - to_sample.low > 1.2 * (to_fixed.high - to_fixed.low)


def test_the_order_of_the_samples_does_not_matter() -> None:
    # As samples of a model with classes come: sorted. Groups of neighbours would be of one class.
    reference, samples = Case(4, 400, 1.0, 1.0, is_reference_fixed=True).draw(0)
    by_class = samples[np.argsort(samples[:, 0])]
    sorted_, shuffled = (unbiased_distance(reference, x) for x in (by_class, samples))
    assert sorted_ is not None
    assert shuffled is not None
    reach = shuffled.high - shuffled.value
    assert abs(sorted_.value - shuffled.value) < reach
    assert sorted_.high - sorted_.value == pytest.approx(reach, rel=0.5)


@pytest.mark.parametrize(("num_features", "enough"), [(2, 40), (16, 128)])
def test_too_few_samples_have_no_interval(num_features: int, enough: int) -> None:
    reference, samples = Case(num_features, enough, 0, 1, is_reference_fixed=True).draw(0)
    assert unbiased_distance(reference, samples) is not None
    assert unbiased_distance(reference, samples[1:]) is None
    assert min_samples(num_features) == enough


def test_many_features_need_more_samples_each() -> None:
    # Below that the term in 1/N^3 would show: see the decision page.
    assert min_samples(400) == 8 * 400
    assert 18 * 2048 < min_samples(2048) < 50_000


def test_the_quantile_is_students() -> None:
    assert pytest.approx(scipy.stats.t.ppf((1 + LEVEL) / 2, GROUPS - 1), abs=5e-4) == STUDENT_T
