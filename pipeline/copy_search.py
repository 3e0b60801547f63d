"""The nearest training images of the samples, found in one pass over the training split."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.dataset import open_split
from pipeline.gallery import Gallery, spread_evenly
from pipeline.host import torch_threads
from pipeline.scores.copies import CopyCheck, NearestImages, check_copies
from pipeline.shards import Items, front_to_back
from pipeline.storage import open_storage
from pipeline.tasks import send_task
from pipeline.workflow import Resources, StepContext

HELD_OUT = 2048  # test images that tell how near is near
READ_AT_ONCE = 2048
SHOWN, NEIGHBOURS_SHOWN = 8, 5


@dataclass(frozen=True)
class Copies:
    """How near the samples are to training images, and the nearest of some."""

    check: CopyCheck
    numbers: tuple[int, ...]  # of the samples that were compared
    shown: tuple[int, ...]  # places in these: the nearest to a training image, nearest first
    samples: np.ndarray  # those shown
    neighbours: np.ndarray  # their nearest training images [shown, neighbours, ...]

    def facts(self) -> dict[str, Any]:
        """As it stands in the record."""
        c = self.check
        return {
            "num_samples": len(c.ratios),
            "num_near_copies": c.num_near_copies,
            "share": c.share,
            "held_out_share": c.held_out_share,
            "threshold": c.threshold,
            "p_value": c.p_value,
            "is_memorising": c.is_memorising,
            "median_distance": c.median_distance,
            "held_out_median_distance": c.held_out_median_distance,
            "nearest": [
                {
                    "sample": self.numbers[k],
                    "ratio": c.ratios[k],
                    "training_image": c.nearest_ids[k],
                }
                for k in self.shown
            ],
        }


def find_copies(context: StepContext, seen: Gallery) -> Copies | None:
    """Compares the samples with all training images; None where there are too few images to tell.

    With their mirror images too, where these were trained on. It is one task of one CPU, and takes
    as long as the training split is large.
    """
    return send_task(
        _search,
        Resources(cpus=1),
        context.storage.uri,
        dict(context.inputs["preprocess"]),
        context.config.data.cache_bytes,
        context.config.train.horizontal_flip,
        seen.spread,
        seen.numbers,
    )


def _search(
    storage_uri: str,
    data: Mapping[str, Any],
    cache_bytes: int,
    is_mirrored: bool,
    samples: np.ndarray,
    numbers: Sequence[int],
) -> Copies | None:
    storage = open_storage(storage_uri)

    def opened(split: str) -> Items:
        return open_split(storage, data, split, whole=False, cache_bytes=cache_bytes)

    with torch_threads(1), contextlib.ExitStack() as stack:
        train, test = (
            stack.enter_context(contextlib.closing(opened(s))) for s in ("train", "test")
        )
        held_out = NearestImages(test.gather(np.array(spread_evenly(len(test), HELD_OUT))))
        nearest = NearestImages(samples)
        train.prefetch(front_to_back(train.counts))
        for first in range(0, len(train), READ_AT_ONCE):
            images = train.gather(np.arange(first, min(len(train), first + READ_AT_ONCE)))
            for shown in (images, images[..., ::-1].copy()) if is_mirrored else (images,):
                nearest.add(shown, first)
                held_out.add(shown, first)
        if (check := check_copies(nearest, held_out)) is None:
            return None
        shown = np.argsort(check.ratios, kind="stable")[:SHOWN]
        train.prefetch(())
        ids = nearest.ids[shown, :NEIGHBOURS_SHOWN]
        images = np.stack([train.gather(of_sample) for of_sample in ids])
        return Copies(check, tuple(numbers), tuple(shown.tolist()), samples[shown], images)
