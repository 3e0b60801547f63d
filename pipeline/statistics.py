"""Sums of features, which add up over shards, and the Frechet distance between two of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


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


def sum_features(features: np.ndarray) -> FeatureSums:
    """The sums of features [N, d]."""
    x = features.astype(np.float64)
    return FeatureSums(len(x), x.sum(0), x.T @ x)


def frechet_distance(extractor: nn.Module, real: FeatureSums, generated: FeatureSums) -> float:
    """The Frechet distance by torchmetrics, from merged sums.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64.

    Args:
        extractor: the network the features came from; torchmetrics reads its `num_features`.
        real: sums of the reference.
        generated: sums of the samples.

    Reference: Heusel et al. (1706.08500), eq. 6.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric: Any = FrechetInceptionDistance(feature=extractor)
    for side, sums in (("real", real), ("fake", generated)):
        setattr(metric, f"{side}_features_sum", torch.from_numpy(sums.total))
        setattr(metric, f"{side}_features_cov_sum", torch.from_numpy(sums.outer))
        setattr(metric, f"{side}_features_num_samples", torch.tensor(sums.count))
    metric.orig_dtype = torch.float64  # what compute() casts its float64 result to
    metric._update_count = 1  # the states are set, not updated: it would warn that they are empty
    return float(metric.compute())
