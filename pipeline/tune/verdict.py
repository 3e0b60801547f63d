"""Which finalist is best, if any can be told apart from chance.

The finalists were chosen because their one score was low, which is in part luck. So each is trained
again with seeds, and scored with noise, that the choice has not seen, and only those scores are
compared.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.95
RULE = (
    "Each finalist is trained again with fresh seeds, and scored with fresh noise. The one with "
    "the lowest mean is called best only if, against every other finalist, the whole of Welch's "
    "interval of the difference of means lies on its side (95% over all comparisons together, "
    "after Bonferroni). Otherwise those that cannot be told from it are not distinguishable, "
    "and the config as it is is recommended if it is one of them. Who failed with one of its "
    "seeds cannot be told from any, and what is recommended is found among the others as if it "
    "were not there, unless there are none."
)


@dataclass(frozen=True)
class Spread:
    """Scores of one finalist over its seeds."""

    mean: float
    std: float  # of single seeds, over N - 1; 0 for a single one
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """What the seeds allow to be said; JSON.

    Args:
        kind: one finalist is best, several cannot be told apart, or there is only one.
        recommended: the finalist to use.
        lowest: the finalist with the lowest mean.
        tied: those that cannot be told from the lowest, with it.
        intervals: by finalist, of its mean minus the lowest one's.
    """

    kind: Literal["best", "not distinguishable", "unopposed"]
    recommended: int
    lowest: int
    tied: Sequence[int]
    intervals: Mapping[int, tuple[float, float]]


def spread(scores: Sequence[float]) -> Spread:
    """Mean and spread of some scores."""
    x = np.array(scores)
    std = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return Spread(float(x.mean()), std, float(x.min()), float(x.max()), len(x))


def judge(
    scores: Mapping[int, Sequence[float]], default: int = 0, unsure: Collection[int] = ()
) -> Verdict:
    """Compares finalists by their scores over seeds; lower is better. See `RULE`.

    Args:
        scores: by finalist; one with a single score cannot be told from any.
        default: the config as it is.
        unsure: who failed with some of its seeds: what is left flatters it, so that it is neither
            best nor, if there are others, recommended.

    Raises:
        ValueError: there is no finalist.
    """
    lowest = min(scores, key=lambda number: (float(np.mean(scores[number])), number))
    others = [number for number in scores if number != lowest]
    level = 1 - (1 - LEVEL) / max(1, len(others))
    intervals = {
        number: (-math.inf, math.inf)
        if {number, lowest} & set(unsure)
        else welch_interval(scores[number], scores[lowest], level)
        for number in others
    }
    tied = [lowest, *(number for number in others if intervals[number][0] <= 0)]
    if not others:  # who has nobody to beat is not best
        return Verdict("unopposed", lowest, lowest, tied, intervals)
    if len(tied) == 1:
        return Verdict("best", lowest, lowest, tied, intervals)
    sure = {number: values for number, values in scores.items() if number not in unsure}
    if 0 < len(sure) < len(scores):
        recommended = judge(sure, default).recommended
    else:  # where all failed with a seed, nothing speaks for another than the config as it is
        recommended = default if default in tied else lowest
    return Verdict("not distinguishable", recommended, lowest, tied, intervals)


def welch_interval(
    first: Sequence[float], second: Sequence[float], level: float = LEVEL
) -> tuple[float, float]:
    """Where the difference of two means lies, first minus second, with unequal variances.

    Args:
        first: scores of one, by seed.
        second: of the other.
        level: share of such intervals that hold the true difference.

    Returns:
        Low and high; infinite where one has a single score.

    Reference: Welch (1947), Biometrika 34, with Satterthwaite's degrees of freedom.
    """
    if min(len(first), len(second)) < 2:
        return -math.inf, math.inf
    x, y = np.array(first), np.array(second)
    parts = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    difference, variance = float(x.mean() - y.mean()), float(sum(parts))
    if variance == 0:
        return difference, difference
    freedom = variance**2 / (parts[0] ** 2 / (len(x) - 1) + parts[1] ** 2 / (len(y) - 1))
    reach = student_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    return difference - reach, difference + reach


def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t, from its integral.

    Args:
        probability: above 0.5 and below 1.
        freedom: degrees of freedom, at least 1.
    """
    # With t = sqrt(freedom) tan(a) the density is cos(a)^(freedom - 1), over a finite range.
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(2 * probability - 1, area / area[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)
