"""Sums of features, which add up over shards, and the Frechet distance between two of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import EvaluationError


@dataclass(frozen=True)
class FeatureSums:
    """Count, sum and sum of outer products of features, float64; they merge by addition."""

    count: int
    total: np.ndarray  # float64 [d]
    outer: np.ndarray  # float64 [d, d]

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(
            self.count + other.count, self.total + other.total, self.outer + other.outer
        )

    @property
    def mean(self) -> np.ndarray:
        """Float64 [d]."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Float64 [d, d], the sum of squares over N - 1."""
        return (self.outer - np.outer(self.total, self.mean)) / (self.count - 1)


def sum_features(features: np.ndarray) -> FeatureSums:
    """The sums of features [N, d].

    Raises:
        EvaluationError: one of them is NaN or infinite: it would make every sum so.
    """
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        broken = int((~np.isfinite(x)).any(1).sum())
        raise EvaluationError(
            f"{broken} of {len(x)} items have features that are NaN or infinite. Look at those "
            "items, and at the extractor that made the features."
        )
    return FeatureSums(len(x), x.sum(0), x.T @ x)


def frechet_distance(real: FeatureSums, generated: FeatureSums) -> float:
    """The Frechet distance by torchmetrics, from merged sums.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64.

    Args:
        real: sums of the reference.
        generated: sums of the samples.

    Reference: Heusel et al. (1706.08500), eq. 6.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    # The sums are whole: one rank alone may ask, which must not wait for the others.
    width = _OfWidth(len(real.total))
    metric: Any = FrechetInceptionDistance(feature=width, sync_on_compute=False)
    for side, sums in (("real", real), ("fake", generated)):
        setattr(metric, f"{side}_features_sum", torch.from_numpy(sums.total))
        setattr(metric, f"{side}_features_cov_sum", torch.from_numpy(sums.outer))
        setattr(metric, f"{side}_features_num_samples", torch.tensor(sums.count))
    metric.orig_dtype = torch.float64  # what compute() casts its float64 result to
    metric._update_count = 1  # the states are set, not updated: it would warn that they are empty
    return float(metric.compute())


class _OfWidth(nn.Module):
    """What torchmetrics reads of an extractor where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class Reference:
    """A Gaussian that many others are compared with: its covariance is factored once.

    With S1 = F F^T the eigenvalues of S1 S2 are those of F^T S2 F, which is symmetric, and
    tr (S1 S2)^(1/2) is the sum of their roots: many times faster than what `frechet_distance` does,
    and the same to rounding. Leading dimensions are so many Gaussians, compared each with its own.

    Args:
        mean: float64 [..., d].
        covariance: float64 [..., d, d].
    """

    def __init__(self, mean: np.ndarray, covariance: np.ndarray) -> None:
        self._mean, self._trace = mean, _trace(covariance)
        self._factor = _factor(covariance)

    def distance(self, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """The Frechet distance, float64 [...], to Gaussians of means [..., d] and covariances."""
        values = np.linalg.eigvalsh(self._factor.swapaxes(-1, -2) @ covariance @ self._factor)
        overlap = np.sqrt(np.maximum(values, 0)).sum(-1)
        shift = np.square(self._mean - mean).sum(-1)
        return shift + self._trace + _trace(covariance) - 2 * overlap


def _trace(covariance: np.ndarray) -> np.ndarray:
    return np.trace(covariance, axis1=-2, axis2=-1)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F with F F^T the covariance."""
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:  # singular: fewer images than features, or one that is constant
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
