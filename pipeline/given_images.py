"""Images that are evaluated in place of a model's samples: read as the data set was, and checked.

They become Arrow shards by the step `images`, a second `preprocess`, so that real and given images
go the same way, and a second evaluation reads none of them again.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from pipeline.preprocess import preprocess
from pipeline.readers.entries import Item
from pipeline.readers.shard import iter_entries
from pipeline.settings import DataConfig
from pipeline.sources import InputShard
from pipeline.subject_kinds import data_of_images
from pipeline.workflow import StepContext

CHECKED = 1000  # images, the first, whose pixels are looked at; of all others the header


def preprocess_images(context: StepContext) -> dict[str, Any]:
    """The step `images`: the given images as Arrow shards.

    Raises:
        DataError: too many cannot be read.
    """
    data = data_of_images(context.config, context.planned.step.settings["sources"])
    config = context.config.model_copy(update={"data": data})
    return preprocess(replace(context, config=config))


def check_images(shards: Sequence[InputShard], data: DataConfig) -> None:
    """Refuses images that would be resized, or lose their colours, to have the data set's shape.

    Looks at the size of all, and at the colours of the first thousand. What cannot be read is left
    for the step to refuse.

    Args:
        shards: of the given images.
        data: of the data set.

    Raises:
        DataError: some are not as the data set's.
    """
    if data.is_sequence:
        return
    side, found, num_seen = data.shape[-1], [], 0
    for name, image in _iter_images(shards, data):
        num_seen += 1
        has_colours = num_seen <= CHECKED and _has_colours(image)
        if image.size != (side, side):
            found.append(f"{name} has {image.width} x {image.height} pixels")
        elif has_colours and data.channels == 1:
            found.append(f"{name} has colours")
        elif image.mode in ("1", "L", "I;16", "I") and data.channels == 3:
            found.append(f"{name} is grey")
    if found:
        raise DataError(
            f"{len(found):,} of {num_seen:,} images are not of the data set's shape, "
            f"{side} x {side} {'grey' if data.channels == 1 else 'RGB'}: {found[0]}. Make samples "
            "of that shape, or give --convert to have them resized and converted as the data set "
            "was, which changes the score."
        )


def _iter_images(
    shards: Sequence[InputShard], data: DataConfig
) -> Iterator[tuple[str, Image.Image]]:
    for shard in shards:
        for entry in iter_entries(shard, data):
            if not isinstance(entry, Item):
                continue
            try:
                if isinstance(entry.content, np.ndarray):
                    yield entry.member, Image.fromarray(entry.content.squeeze())
                else:
                    with Image.open(io.BytesIO(entry.content)) as image:
                        yield entry.member, image
            except (OSError, ValueError, Image.DecompressionBombError):
                continue


def _has_colours(image: Image.Image) -> bool:
    """Whether its channels differ; a grey picture may be stored as RGB."""
    if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
        return False
    try:
        pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError):
        return False
    return bool((pixels != pixels[..., :1]).any())
