"""The Frechet distance as it would be with infinitely many samples, and how sure that is.

The distance of N samples is too large by about b/N + c/N^2, whatever the model, because their
covariance is not the distribution's. The bias is found from the samples themselves: in halves and
quarters of them it is twice and four times as large. How much the result varies is found by leaving
out one group of samples after another, which holds at distance 0 too, where a bootstrap fails: it
draws samples twice, and so adds a bias of its own.

Reference: Chong and Forsyth (1911.07023) extrapolate to 1/N = 0, here with the term in 1/N^2;
Efron and Stein (1981) for the variance from leaving out groups, which is rather too large.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from pipeline.scores.frechet import FeatureSums, Reference, sum_features

GROUPS = 20  # that are left out in turn
LEVEL = 0.95
STUDENT_T = 2.093  # its quantile at (1 + LEVEL) / 2 with GROUPS - 1 degrees of freedom
PARTS = (1, 2, 4)  # into how many the samples are divided
SPLITS_OF_FEW_FEATURES, SPLITS_OF_MANY = 4, 1  # ways of dividing: each costs 46 distances
MANY_FEATURES = 256
SAMPLES_PER_FEATURE = 8  # at least, so that a quarter has twice as many samples as features
# For each root of a feature as well: the term in 1/N^3 is left, which grows with d^4/N^3 where
# chance grows with d/N, and would show above 400 features.
SAMPLES_PER_FEATURE_AND_ROOT = 0.4
CHUNK_BYTES = 64 * 2**20  # of covariances that are held at once


@dataclass(frozen=True)
class Interval:
    """A distance without its bias, and where the true one lies 19 times of 20."""

    value: float  # below 0 where chance took away more than there is
    low: float  # 0 where the samples do not tell the distributions apart: then it is one-sided
    high: float
    is_reference_fixed: bool  # else the reference is taken for a sample as well


def unbiased_distance(
    reference: np.ndarray | FeatureSums, generated: np.ndarray, seed: int = 0
) -> Interval | None:
    """The distance with infinitely many samples; None where there are too few to tell.

    Args:
        reference: its sums, where it is held fixed: the distance is to these very images. Its
            features [M, d], where they are a sample as well: the distance is to the distribution
            that they come from, and the interval is wider.
        generated: features [N, d] of the samples, in any order.
        seed: of the division into groups.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    num_features = generated.shape[1]
    sets = [generated] if isinstance(reference, FeatureSums) else [generated, reference]
    if min(map(len, sets)) < min_samples(num_features):
        return None
    fixed = None
    if isinstance(reference, FeatureSums):
        fixed = Reference(reference.mean, reference.covariance)
    groups = [_Groups(features, rng) for features in sets]
    num_splits = SPLITS_OF_FEW_FEATURES if num_features < MANY_FEATURES else SPLITS_OF_MANY
    splits = [_split(rng.permutation(GROUPS)) for _ in range(num_splits)]
    values = _extrapolate(groups, splits, fixed)
    value, without = float(values[-1]), values[:-1]
    variance = (GROUPS - 1) / GROUPS * np.square(without - without.mean()).sum()
    reach = STUDENT_T * float(np.sqrt(variance))
    return Interval(value, max(0.0, value - reach), max(0.0, value + reach), fixed is not None)


def min_samples(num_features: int) -> int:
    """How many samples an interval needs."""
    per_feature = max(SAMPLES_PER_FEATURE, SAMPLES_PER_FEATURE_AND_ROOT * num_features**0.5)
    return max(ceil(per_feature * num_features), 2 * GROUPS)


class _Groups:
    """The sums of each of 20 random groups of features, and the moments of any of them together."""

    def __init__(self, features: np.ndarray, rng: np.random.Generator) -> None:
        # Samples often come sorted by class, so that neighbours would make groups of one class.
        parts = np.array_split(rng.permutation(len(features)), GROUPS)
        sums = [sum_features(features[part]) for part in parts]
        self.counts = np.array([s.count for s in sums], np.float64)
        self._total = np.stack([s.total for s in sums])
        self._outer = np.stack([s.outer.ravel() for s in sums])

    def moments(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means [K, d] and covariances [K, d, d]; members is 1.0 where a group takes part."""
        count = (members @ self.counts)[:, None]
        total = members @ self._total
        mean = total / count
        outer = (members @ self._outer).reshape(len(members), mean.shape[1], mean.shape[1])
        covariance = (outer - total[:, :, None] * mean[:, None, :]) / (count[:, :, None] - 1)
        return mean, covariance


def _split(order: np.ndarray) -> list[list[frozenset[int]]]:
    """The groups as whole, as halves, and as quarters, dividing them in this order."""
    return [[frozenset(p.tolist()) for p in np.array_split(order, n)] for n in PARTS]


def _extrapolate(
    groups: Sequence[_Groups], splits: list[list[list[frozenset[int]]]], fixed: Reference | None
) -> np.ndarray:
    """The values at 1/N = 0 without each of the groups, and at last with all of them.

    It is that of the parabola through the mean distances of whole, halves and quarters.
    """
    removed = [frozenset([k]) for k in range(GROUPS)] + [frozenset[int]()]
    # By the number of parts: the pieces of every split. Leaving out a group changes one piece of
    # each number, so that most distances serve many times.
    levels = [[piece for split in splits for piece in split[k]] for k in range(len(PARTS))]
    pieces = sorted({p - r for level in levels for p in level for r in removed}, key=sorted)
    index = {piece: k for k, piece in enumerate(pieces)}
    members = np.array([[float(g in piece) for g in range(GROUPS)] for piece in pieces])
    distances = _distances(groups, members, fixed)
    # N over the piece's: the mean over the sets, whose groups may differ by an item.
    inverse = np.mean([s.counts.sum() / (members @ s.counts) for s in groups], axis=0)
    values = []
    for r in removed:
        chosen = [[index[piece - r] for piece in level] for level in levels]
        rows = [[1, inverse[c].mean(), np.square(inverse[c]).mean()] for c in chosen]
        values.append(np.linalg.solve(rows, [distances[c].mean() for c in chosen])[0])
    return np.array(values)


def _distances(
    groups: Sequence[_Groups], members: np.ndarray, fixed: Reference | None
) -> np.ndarray:
    """The distances of these groups of the samples, each to the same groups of the reference."""
    generated, *reference = groups
    num_features = generated.moments(members[:1])[0].shape[1]
    step = max(1, CHUNK_BYTES // (8 * num_features**2))
    found = []
    for chunk in (members[i : i + step] for i in range(0, len(members), step)):
        to = fixed or Reference(*reference[0].moments(chunk))
        found.append(to.distance(*generated.moments(chunk)))
    return np.concatenate(found)
