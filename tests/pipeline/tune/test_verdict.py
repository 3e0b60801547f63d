"""Which finalist is called best, and when none is."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tune.verdict import judge, spread, student_quantile, welch_interval


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),  # tables of Student's t
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.995, 3, 5.84091),
     (0.95, 10, 1.81246), (0.975, 100, 1.98397)],
)  # fmt: skip
def test_the_quantile_is_that_of_the_tables(
    probability: float, freedom: float, expected: float
) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=2e-4)


def test_the_interval_is_that_of_a_worked_example() -> None:
    # Two samples with known sums: means 20.0 and 22.0, variances 4 and 16, five of each.
    first = [
        20 + 2 * z
        for z in (
            -1.2649110640673518,
            -0.6324555320336759,
            0,
            0.6324555320336759,
            1.2649110640673518,
        )
    ]
    second = [
        22 + 4 * z
        for z in (
            -1.2649110640673518,
            -0.6324555320336759,
            0,
            0.6324555320336759,
            1.2649110640673518,
        )
    ]
    low, high = welch_interval(first, second)
    freedom = (4 / 5 + 16 / 5) ** 2 / ((4 / 5) ** 2 / 4 + (16 / 5) ** 2 / 4)
    assert freedom == pytest.approx(5.882, abs=1e-3)
    assert (low + high) / 2 == pytest.approx(-2)
    assert (high - low) / 2 == pytest.approx(2.4590 * 2, rel=2e-3)


def test_one_far_below_the_others_is_best() -> None:
    verdict = judge({0: [9.0, 9.1, 9.2], 4: [5.0, 5.1, 4.9], 7: [8.0, 8.2, 8.1]})
    assert (verdict.kind, verdict.recommended, verdict.tied) == ("best", 4, [4])


def test_within_the_spread_the_config_as_it_is_is_recommended() -> None:
    verdict = judge({0: [5.1, 5.4, 4.9], 4: [5.0, 5.3, 4.7], 7: [9.0, 9.1, 9.2]})
    assert verdict.kind == "not distinguishable"
    assert (verdict.lowest, verdict.recommended, set(verdict.tied)) == (4, 0, {0, 4})


def test_a_default_that_is_beaten_is_not_recommended_among_ties() -> None:
    verdict = judge({0: [9.0, 9.1, 9.2], 4: [5.0, 5.3, 4.7], 7: [5.1, 5.2, 4.9]})
    assert verdict.kind == "not distinguishable"
    assert verdict.recommended == verdict.lowest == 4


def test_a_single_seed_tells_nothing_apart() -> None:
    verdict = judge({0: [9.0], 4: [1.0, 1.1]})
    assert verdict.kind == "not distinguishable"
    assert verdict.recommended == 0
    assert verdict.intervals[0] == (-math.inf, math.inf)


def test_who_has_nobody_to_beat_is_not_called_best() -> None:
    verdict = judge({0: [5.1, 5.2]})
    assert (verdict.kind, verdict.recommended, verdict.tied) == ("unopposed", 0, [0])


def test_who_failed_with_a_seed_is_not_called_best() -> None:
    scores = {0: [9.0, 9.1, 9.2], 4: [5.0, 5.1]}
    assert judge(scores).kind == "best"
    verdict = judge(scores, unsure=[4])
    assert (verdict.kind, verdict.recommended) == ("not distinguishable", 0)
    assert judge(scores, unsure=[0]).kind == "not distinguishable"


@pytest.mark.parametrize(
    ("scores", "unsure", "recommended"),
    [
        ({0: [9.0, 9.1], 4: [5.0, 5.1, 4.9], 7: [5.05, 5.1, 4.95]}, [0], 4),
        ({4: [5.0, 5.1], 7: [5.2, 5.3, 5.25]}, [4], 7),
        ({0: [5.0, 5.1], 4: [5.2, 5.3, 5.1], 7: [5.1, 5.2, 5.0]}, [0], 7),
        ({0: [5.4, 5.1, 5.2], 4: [5.0, 5.1], 7: [5.2, 5.3, 5.1]}, [4], 0),  # tied with the sure one
        ({0: [9.0, 9.1, 9.2], 4: [5.0, 5.1], 7: [5.2, 5.3, 5.25]}, [4], 7),  # which beats it
        ({0: [9.0, 9.1], 4: [5.0, 5.1]}, [0, 4], 0),
        ({4: [5.0, 5.1], 7: [5.2, 5.3]}, [4, 7], 4),
    ],
)
def test_who_failed_with_a_seed_is_recommended_only_where_all_did(
    scores: dict[int, list[float]], unsure: list[int], recommended: int
) -> None:
    verdict = judge(scores, unsure=unsure)
    assert verdict.kind == "not distinguishable"
    assert set(unsure) <= set(verdict.tied)
    assert verdict.recommended == recommended


def test_many_comparisons_ask_for_more() -> None:
    two = {0: [5.7, 6.0, 5.85], 1: [5.0, 5.3, 5.2]}
    assert judge(two).kind == "best"
    assert judge(two | {k: [9.0, 9.1, 9.2] for k in range(2, 12)}).kind == "not distinguishable"


def test_equals_are_rarely_called_different() -> None:
    rng = np.random.default_rng(0)
    called = [
        judge({k: rng.normal(5, 1, 3).tolist() for k in range(4)}).kind == "best"
        for _ in range(100)
    ]
    assert np.mean(called) <= 0.05


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=5), st.floats(0.1, 10))
def test_the_verdict_does_not_depend_on_the_unit(scores: list[float], unit: float) -> None:
    other = [score + 1 for score in scores]
    here = judge({0: scores, 1: other})
    there = judge({0: [unit * s for s in scores], 1: [unit * s for s in other]})
    assert here.lowest == there.lowest == 0
    assert spread(scores).low <= spread(scores).mean + 1e-9
