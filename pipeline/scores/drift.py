"""Drift: whether new images are as near to the reference as real images are by chance.

The Frechet distance of few images is too large, and by how much depends on how many they are. So it
is not judged by itself but against the distances of random real images, as many each time: what is
farther than the farthest of these, times a factor, has drifted. The factor allows for what a shard
has of its own (other writers, another week), which random images of all shards do not show.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.scores.frechet import FeatureSums, Reference, sum_features

MIN_ITEMS = 32  # fewer are not judged: their distance is chance
MIN_TRAINING = 2 * MIN_ITEMS  # real images; at most half of them are drawn at a time
MAX_ITEMS = 10_000  # that are looked at
MAX_TRAINING = 4 * MAX_ITEMS  # real images of which random ones are drawn
SUBSETS_OF_FEW_FEATURES, SUBSETS_OF_MANY = 200, 20  # each costs a distance
MANY_FEATURES = 256


@dataclass(frozen=True)
class Drift:
    """How far a shard is from the reference, and how far it may be."""

    distance: float
    largest: float  # of random real images, as many
    limit: float
    count: int  # items that were looked at

    @property
    def has_drifted(self) -> bool:
        """Whether it is farther than it may be."""
        return not self.distance <= self.limit


def measure_drift(
    shard: np.ndarray,
    training: np.ndarray,
    reference: FeatureSums,
    *,
    factor: float,
    seed: int = 0,
) -> Drift | None:
    """Compares the features of a shard with those of real images; None for too few to tell.

    Args:
        shard: features [N, d] of its items, or of random ones (`draw_rows`).
        training: features [M, d] of real images, or of random ones, of which as many as the shard
            has are drawn without replacement, at most half of them at a time.
        reference: sums of the features that distances are measured to; of other images.
        factor: how many times the largest distance of random images a shard's may be.
        seed: of what is drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    count = min(len(shard), len(training) // 2)
    if count < MIN_ITEMS:
        return None
    target = Reference(reference.mean, reference.covariance)

    def distance(features: np.ndarray) -> float:
        sums = sum_features(features[rng.permutation(len(features))[:count]])
        return float(target.distance(sums.mean, sums.covariance))

    is_wide = shard.shape[1] > MANY_FEATURES
    num_subsets = SUBSETS_OF_MANY if is_wide else SUBSETS_OF_FEW_FEATURES
    largest = max(distance(training) for _ in range(num_subsets))
    return Drift(distance(shard), largest, factor * largest, count)


def draw_rows(count: int, limit: int, *, seed: int = 0) -> np.ndarray:
    """The numbers of random rows, ascending; of all where these are no more than the limit.

    Args:
        count: of the rows there are.
        limit: of those drawn.
        seed: of what is drawn.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    return np.sort(rng.permutation(count)[:limit])
