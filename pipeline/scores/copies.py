"""Copies: the training images nearest to each sample, and whether too many are too near.

A sample is near to a training image or not by its own surroundings: its ratio is the distance to
the nearest training image over the mean distance to the next 49. Where it lies among them it is
close to 1, whether images are alike or not; for a copy it is near 0. What ratio is too low is read
from held-out real images, and so is how many of the samples may lie below it by chance. Those that
have twins in training (the same picture, saved again) are passed over where the ratio is read, and
counted where chance is.

What this does not see: a copy that is moved, mirrored or recoloured, and one that is altered at all
where the training images hold its image 50 times.

Reference: Carlini et al. (2301.13188), who compare with the 50 nearest; the calibration is ours.
"""

from dataclasses import dataclass
from math import lgamma

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.errors import EvaluationError
from pipeline.scores.distances import squared_distances

NEIGHBOURS = 50
SIDE_PX = 32  # of the thumbnails in which images are compared
LENGTH = 1024  # of the shortened sequences
BLOCK = 2048  # rows and columns of the matrix of distances that are held in memory at once
QUANTILE = 0.005  # of the held-out ratios, below which is a near-copy; the lowest of a few hundred
TWIN = 1 / 3  # of the median ratio: held-out images below it have twins among the training images
FALSE_ALARM = 1e-3  # how often samples of the real distribution may trip the check, at most
MIN_EXCESS = 0.02  # of near-copies among the samples, over those among the held-out images
MIN_HELD_OUT = 200  # with as many samples, 5% of copies are then beyond chance


class NearestImages:
    """The training images nearest to each query, kept while the training images go by.

    Args:
        queries: images, uint8 [N, C, H, W], or sequences, float32 [N, C, L].
        count: of the nearest that are kept of each.

    Raises:
        EvaluationError: queries or training images hold NaN, or their shapes differ.
    """

    def __init__(self, queries: np.ndarray, count: int = NEIGHBOURS) -> None:
        self._shape = queries.shape[1:]
        self._queries = _shorten(queries)
        self._squares = torch.full((len(queries), count), torch.inf, dtype=torch.float64)
        self._ids = torch.full((len(queries), count), -1)

    def add(self, images: np.ndarray, first_id: int) -> None:
        """Goes through training images, of the same shape, with the ids from `first_id` up."""
        if images.shape[1:] != self._shape:
            raise EvaluationError(
                f"Training images of shape {list(images.shape[1:])} and samples of shape "
                f"{list(self._shape)} cannot be compared. Name the data set that the model was "
                "trained on."
            )
        others = _shorten(images)
        for start in range(0, len(others), BLOCK):
            block = others[start : start + BLOCK].double()
            ids = torch.arange(len(block)) + first_id + start
            for k in range(0, len(self._queries), BLOCK):
                rows = slice(k, k + BLOCK)
                squares = squared_distances(self._queries[rows].double(), block)
                squares = torch.cat([self._squares[rows], squares], dim=1)
                ids_of_rows = torch.cat([self._ids[rows], ids.expand(len(squares), -1)], dim=1)
                kept = squares.topk(self._squares.shape[1], dim=1, largest=False, sorted=True)
                self._squares[rows] = kept.values
                self._ids[rows] = ids_of_rows.gather(1, kept.indices)

    @property
    def distances(self) -> np.ndarray:
        """Float64 [N, count], root mean squares over the values, nearest first.

        Images have values in [-1, 1]. Infinite where there were fewer training images.
        """
        return self._squares.div(self._queries.shape[1]).sqrt().numpy()

    @property
    def ids(self) -> np.ndarray:
        """Int64 [N, count], nearest first; -1 where there were fewer training images."""
        return self._ids.numpy()


@dataclass(frozen=True)
class CopyCheck:
    """How near samples are to training images, beside held-out real images."""

    median_distance: float  # to the nearest: root mean square, of values in [-1, 1] for images
    held_out_median_distance: float
    threshold: float  # of the ratio
    num_near_copies: int
    share: float  # of the samples
    held_out_share: float
    p_value: float  # that so many of the samples are below by chance alone
    is_memorising: bool
    ratios: tuple[float, ...]  # of each sample
    nearest_ids: tuple[int, ...]  # of each sample


def check_copies(samples: NearestImages, held_out: NearestImages) -> CopyCheck | None:
    """Whether more samples are near-copies of training images than held-out images make likely.

    None for fewer than 200 held-out images, or fewer training images than are kept of each query.

    Args:
        samples: after all training images went by.
        held_out: real images that were not trained on, after the same.
    """
    near, held_out_near = samples.distances, held_out.distances
    if len(held_out_near) < MIN_HELD_OUT or (samples.ids < 0).any():
        return None
    ratios, held_out_ratios = _ratios(near), _ratios(held_out_near)
    num_twins = int((held_out_ratios < TWIN * np.median(held_out_ratios)).sum())
    place = num_twins + max(1, int(QUANTILE * len(held_out_ratios)))
    threshold = np.sort(held_out_ratios)[place - 1]
    found, expected = (int((r <= threshold).sum()) for r in (ratios, held_out_ratios))
    share, held_out_share = found / len(ratios), expected / len(held_out_ratios)
    p_value = _chance_of_so_many(found, len(ratios), expected, len(held_out_ratios))
    return CopyCheck(
        float(np.median(near[:, 0])),
        float(np.median(held_out_near[:, 0])),
        float(threshold),
        found,
        share,
        held_out_share,
        p_value,
        p_value < FALSE_ALARM and share - held_out_share >= MIN_EXCESS,
        tuple(ratios.tolist()),
        tuple(samples.ids[:, 0].tolist()),
    )


def _shorten(items: np.ndarray) -> Tensor:
    """Float32 [N, D]: values of averages over areas, at most 32 x 32 or 1024 of each channel."""
    x = torch.from_numpy(items)
    if x.dtype == torch.uint8:
        height, width = x.shape[2:]
        x = F.adaptive_avg_pool2d(x.float(), (min(height, SIDE_PX), min(width, SIDE_PX)))
        x = x / 127.5 - 1
    else:
        x = F.adaptive_avg_pool1d(x.float(), min(x.shape[2], LENGTH))
    if not x.isfinite().all():
        raise EvaluationError(
            "Items to compare hold NaN or infinite values, which are at no distance from anything. "
            "Leave those items out."
        )
    return x.flatten(1)


def _ratios(near: np.ndarray) -> np.ndarray:
    """Of the nearest distance to the mean of the others [N]; 0 where all are 0."""
    mean = near[:, 1:].mean(1)
    return np.divide(near[:, 0], mean, out=np.zeros(len(near)), where=mean > 0)


def _chance_of_so_many(found: int, count: int, expected: int, held_out_count: int) -> float:
    """The chance that so many samples or more come before this one of the held-out images.

    All are drawn in order of their ratios, each order being as likely. `found` samples come before
    the held-out image number `expected` if they are among the first found + expected - 1.
    """

    def log_choose(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    first = found + expected - 1
    ways = [
        log_choose(count, k) + log_choose(held_out_count, first - k)
        for k in range(found, min(count, first) + 1)
    ]
    whole = log_choose(count + held_out_count, first)
    return float(min(1.0, np.exp(np.array(ways) - whole).sum()))
