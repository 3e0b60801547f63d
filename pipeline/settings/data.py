"""The section `data`: which images, and what is made of them."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from pipeline.settings.section import Fraction, Positive, Section

MAX_ITEM_BYTES = 1 << 28  # of an image or a sequence as it is stored
MAX_SHARD_BYTES = 1 << 30  # a task holds as much of each split
CACHE_BYTES = 64 << 30
# What the data set does not depend on, but only how it is found or read.
NOT_OF_THE_DATA_SET = {"sources", "leave_out", "shuffle_window", "cache_bytes"}
LABEL_FIELD = "label"
_OF_IMAGES = (
    "mode",
    "fit",
    "resample",
    "background",
    "jpeg_draft",
    "max_pixels",
    "min_resolution_px",
)


def _check_label(value: Any) -> Any:
    """A label as those of items are read, or ValueError."""
    from pipeline.readers.labels import Refused, parse_label  # late, for it loads numpy

    try:
        parse_label(value)
    except Refused as refused:
        raise ValueError(
            f"a label must be a whole number from 0 or a name, got {value!r}: {refused.detail}. "
            "Change it."
        ) from refused
    return value


Label = Annotated[int | str, BeforeValidator(_check_label)]


class DataConfig(Section):
    """Which images or sequences, and what they are made into."""

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="tar, zip, Parquet, IDX, npy and npz files, or directories of images: paths, "
        "globs or URIs, relative to the config file",
    )
    leave_out: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        default=(), description="SHA-256 of input shards and loose files that are not used"
    )
    resolution: Positive | None = Field(
        default=None, description="side of the square images in pixels"
    )
    sequence_shape: tuple[Positive, Positive] | None = Field(
        default=None, description="[channels, length] of sequences, instead of resolution"
    )
    mode: Literal["L", "RGB"] = Field(default="RGB", description="grey or colour")
    fit: Literal["crop", "stretch", "pad"] = Field(
        default="crop", description="how a rectangle becomes a square"
    )
    resample: Literal["area", "bicubic", "lanczos"] = Field(
        default="lanczos", description="filter of the resize, always antialiased"
    )
    background: str = Field(
        default="#ffffff",
        pattern=r"^#[0-9a-fA-F]{6}$",
        description="behind transparent pixels and around padded images",
    )
    jpeg_draft: bool = Field(
        default=True, description="decode large JPEGs at a fraction of their size"
    )
    max_pixels: Positive = Field(
        default=1 << 26, description="an image with more is refused before it is decoded"
    )
    min_resolution_px: Positive = Field(
        default=1, description="images with a shorter side are left out"
    )
    include_labels: tuple[Label, ...] = Field(
        default=(), description="only these; all when empty; -1 is what has no label"
    )
    require_labels: bool = Field(default=False, description="refuse what has no label")
    label_field: str = Field(
        default=LABEL_FIELD,
        description="Parquet column, npz array or field of .json with the label; empty: none, and "
        "directories are no classes",
    )
    content_field: str | None = Field(
        default=None, description="Parquet column or npz array with the content; none: found"
    )
    drop_duplicates: bool = Field(default=False, description="keep one of equal files")
    shard_bytes: Annotated[int, Field(ge=1 << 16, le=MAX_SHARD_BYTES)] = Field(
        default=1 << 25, description="of the items of an Arrow shard, beside labels and sources"
    )
    validation_fraction: Fraction = Field(default=0.05, description="share held out for choices")
    test_fraction: Fraction = Field(default=0.05, description="share held out for the final score")
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="share of images that may be refused"
    )
    shuffle_window: Positive | None = Field(
        default=None,
        description="items shuffled together where the data set is read in order; none: over all",
    )
    cache_bytes: Positive = Field(
        default=CACHE_BYTES, description="of local disk for Arrow shards from remote storage"
    )

    @property
    def is_sequence(self) -> bool:
        """Whether the items are float32 sequences, not uint8 images."""
        return self.sequence_shape is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of every image, or [C, L] of every sequence."""
        if self.sequence_shape is not None:
            return self.sequence_shape
        assert self.resolution is not None  # one of the two is given
        return (self.channels, self.resolution, self.resolution)

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour; those of the sequences."""
        if self.sequence_shape is not None:
            return self.sequence_shape[0]
        return 1 if self.mode == "L" else 3

    @model_validator(mode="after")
    def _have_one_size(self) -> Self:
        if (self.resolution is None) == (self.sequence_shape is None):
            raise ValueError(
                "either resolution (images) or sequence_shape (sequences) must be given, got "
                + ("neither" if self.resolution is None else "both")
                + ". Set one."
            )
        return self

    @model_validator(mode="after")
    def _be_of_one_kind(self) -> Self:
        # By value: workers get the whole config, so that every field is set there.
        fields = type(self).model_fields
        found = [n for n in _OF_IMAGES if getattr(self, n) != fields[n].default]
        if self.is_sequence and found:
            raise ValueError(
                f"{', '.join(found)} cannot be honoured for sequences, which are stored as they "
                "are. Leave out what is for images, or set resolution instead of sequence_shape."
            )
        size = math.prod(self.shape) * (4 if self.is_sequence else 1)
        if size > MAX_ITEM_BYTES:
            raise ValueError(
                f"an item must not have more than {MAX_ITEM_BYTES:,} bytes, got {size:,}. Lower "
                + ("sequence_shape." if self.is_sequence else "resolution.")
            )
        return self

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                "validation_fraction and test_fraction must leave images to train on, got "
                f"{self.validation_fraction} + {self.test_fraction}. Lower them."
            )
        return self
