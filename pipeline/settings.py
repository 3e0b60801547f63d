"""The settings: one typed, frozen, printable object, a section for each part of the work.

Reading them from a file, and telling what is wrong there, is in `config.py`. Nothing here
imports torch or Ray, so that `plan` and a fully cached run answer at once.
"""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

NOISE_GROUP = 16  # positions of the global batch that share one noise stream (design 3.4)
MAX_ITEM_BYTES = 1 << 28  # of an image or a sequence as it is stored
MAX_SHARD_BYTES = 1 << 30  # a task holds as much of each split
CACHE_BYTES = 64 << 30
# Of `data`: what the data set does not depend on, but only how it is found or read.
NOT_OF_THE_DATA_SET = {"sources", "shuffle_window", "cache_bytes"}
MAX_PATIENCE_S = 480.0  # ranks give each other up after ten minutes
LABEL_FIELD = "label"
TRAINED_EXTRACTORS = ("classifier", "self_supervised")
EXTRACTORS = (*TRAINED_EXTRACTORS, "inception")
SMALL_WIDTH, MAX_SMALL_WIDTH = 16, 512  # features of those
INCEPTION_WIDTHS = (64, 192, 768, 2048)
_OF_IMAGES = (
    "mode",
    "fit",
    "resample",
    "background",
    "jpeg_draft",
    "max_pixels",
    "min_resolution_px",
)


_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # package.module:factory


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


Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Label = Annotated[int | str, BeforeValidator(_check_label)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Common strictness of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StorageConfig(Section):
    """Where everything is kept."""

    root: str = Field(default="runs", min_length=1, description="directory or fsspec URI")


class DataConfig(Section):
    """Which images or sequences, and what they are made into."""

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="tar, zip, Parquet, IDX, npy and npz files, or directories of images: paths, "
        "globs or URIs, relative to the config file",
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
        description="Parquet column, npz array or field of .json with the label; empty: none",
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


class ModelConfig(Section):
    """The U-Net; see `diffusion_core.UNetConfig` for the meaning of each."""

    dim: Positive = 64
    dim_mults: tuple[Positive, ...] = Field(default=(1, 2, 4), min_length=1)
    attention: tuple[Literal["none", "linear", "full"], ...] = ("none", "none", "full")
    heads: Positive = 4
    head_dim: Positive = 32
    memory_kv: int = Field(default=0, ge=0, description="learned keys and values in attention")
    norm: Literal["group", "rms"] = "group"
    norm_groups: Positive = 8
    downsample: Literal["unshuffle", "strided"] = "unshuffle"
    time_features: Literal["sinusoidal", "learned", "random"] = "sinusoidal"
    class_conditional: bool = Field(default=False, description="tell the network the labels")
    dropout: Fraction = 0.0

    @model_validator(mode="after")
    def _one_attention_a_level(self) -> Self:
        if len(self.attention) != len(self.dim_mults):
            raise ValueError(
                f"attention must name one kind for each of the {len(self.dim_mults)} levels of "
                f"dim_mults, got {len(self.attention)}. Make them equally long."
            )
        if self.dim % 2 or (self.norm == "group" and self.dim % self.norm_groups):
            raise ValueError(
                f"dim must be even and divisible by norm_groups = {self.norm_groups}, got "
                f"{self.dim}. Use a multiple of it."
            )
        return self


class DiffusionConfig(Section):
    """Schedule and objective; the options of the named schedule go into `schedule_options`."""

    schedule: Literal[
        "linear", "scaled_linear", "cosine", "sigmoid", "sqrt", "logistic", "lerp"
    ] = "cosine"
    schedule_options: dict[str, float | bool] = {}
    num_train_timesteps: Positive = 1000
    objective: Literal["pred_noise", "pred_x0", "pred_v", "pred_flow"] = "pred_v"
    weighting: Literal["uniform", "snr", "min_snr", "vlb"] = "uniform"
    gamma: float = Field(default=5.0, gt=0)
    offset_noise: float = Field(default=0.0, ge=0, description="strength; 0.1 is usual")
    self_condition: bool = Field(
        default=False, description="show the network its own guess of the clean image"
    )
    learned_variance: bool = Field(default=False, description="for sampling with ddpm")


class TrainConfig(Section):
    """How the network is trained."""

    num_workers: Positive | tuple[Positive, Positive] = Field(
        default=1, description="data-parallel workers; [min, max]: as many as there is room for"
    )
    cpus_per_worker: Positive = 1
    use_gpu: bool = False
    num_steps: Positive = Field(
        default=10_000,
        description="optimiser steps; raising it extends a run, but for the cosine's, which is "
        "another from its first step",
    )
    global_batch_size: Positive = Field(default=64, description="over all workers")
    accumulation_steps: Positive = Field(
        default=1, description="parts in which a worker goes through its share of a batch"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="of the network's arithmetic; auto: bf16 on GPUs that have it"
    )
    compile: bool = Field(default=False, description="with torch.compile")
    learning_rate: float = Field(default=1e-3, gt=0)
    learning_rate_decay: Literal["constant", "cosine"] = Field(
        default="constant", description="after the warm-up; cosine ends at 0 with num_steps"
    )
    warmup_steps: int = Field(default=100, ge=0)
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: Fraction = 0.999
    timestep_draw: Literal["uniform", "antithetic", "stratified"] = "uniform"
    horizontal_flip: bool = Field(default=False, description="mirror half of the images")
    label_dropout: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="share of labels hidden, for guidance"
    )
    checkpoint_every: Positive = Field(default=500, description="optimiser steps")
    keep_every: Positive | None = Field(
        default=None, description="checkpoints at multiples of so many steps are never dropped"
    )
    log_every: Positive = Field(default=20, description="optimiser steps in a row of metrics")
    validate_every: Positive | None = Field(
        default=None, description="optimiser steps between losses on the validation split"
    )
    sample_every: Positive | None = Field(
        default=None, description="optimiser steps between grids of samples"
    )
    fid_every: Positive | None = Field(
        default=None,
        description="optimiser steps between scores on the validation split, beside training",
    )
    fid_samples: Positive = Field(default=512, description="that such a score draws")
    max_failures: int = Field(default=2, ge=0, description="times a dead worker is replaced")
    max_rewinds: int = Field(
        default=2, ge=0, description="times training goes back after a loss that is not finite"
    )
    storage_patience_s: float = Field(
        default=120.0,
        ge=0,
        le=MAX_PATIENCE_S,
        description="how long a checkpoint that cannot be written or read is tried again",
    )
    seed: Seed = 0

    @property
    def min_workers(self) -> int:
        """The fewest workers that training goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that training takes."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("num_workers", mode="wrap")
    @classmethod
    def _say_both_forms_at_once(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            found = validate(tuple(value) if isinstance(value, list) else value)  # JSON's arrays
        except ValidationError:
            found = None
        if found is None or (isinstance(found, tuple) and found[0] > found[1]):
            raise ValueError(
                f"must be a number from 1, or [min, max] with min <= max, got {value!r}. Change it."
            )
        return found

    @model_validator(mode="after")
    def _split_batch_by_groups(self) -> Self:
        least = NOISE_GROUP * self.max_workers
        if self.global_batch_size % NOISE_GROUP or self.global_batch_size < least:
            raise ValueError(
                f"global_batch_size must be a multiple of {NOISE_GROUP} and at least "
                f"{NOISE_GROUP} x num_workers = {least}, got {self.global_batch_size}. Use "
                f"{max(least, round(self.global_batch_size / NOISE_GROUP) * NOISE_GROUP)}."
            )
        share = self.global_batch_size // NOISE_GROUP // self.max_workers * NOISE_GROUP
        if self.accumulation_steps > share:
            raise ValueError(
                f"accumulation_steps must be at most {share}, the smallest share of a batch that a "
                f"worker has, got {self.accumulation_steps}. Lower it."
            )
        return self


class FeaturesConfig(Section):
    """The feature space of the score: what extracts it, and how an extractor of ours is trained."""

    extractor: str = Field(
        default="classifier",
        description="classifier (learns from labels), self_supervised (needs none), inception, or "
        "package.module:factory of one's own",
    )
    width: int | None = Field(
        default=None,
        ge=2,
        description="number of features; none: 16, of inception 2048, of one's own what it returns",
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="of inception or of one's own: path, relative to the config file, or URI",
    )
    weights_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="that the file of weights must have"
    )
    num_steps: Positive = Field(default=600, description="of training it, as what follows")
    batch_size: Positive = 128
    learning_rate: float = Field(default=3e-3, gt=0)
    seed: Seed = 0

    @property
    def is_trained(self) -> bool:
        """Whether it learns from the data set."""
        return self.extractor in TRAINED_EXTRACTORS

    @property
    def is_own(self) -> bool:
        """Whether it is code of the user's."""
        return ":" in self.extractor

    @property
    def num_features(self) -> int | None:
        """Of each item; None where the user's own extractor tells only when it is there."""
        if self.width is not None or self.is_own:
            return self.width
        return SMALL_WIDTH if self.is_trained else max(INCEPTION_WIDTHS)

    @model_validator(mode="after")
    def _one_of_the_extractors(self) -> Self:
        if self.extractor not in EXTRACTORS and not _FACTORY.fullmatch(self.extractor):
            raise ValueError(
                f"extractor must be one of {', '.join(EXTRACTORS)}, or package.module:factory, got "
                f"{self.extractor!r}. Change it."
            )
        faults = []
        if self.is_trained and self.width is not None and self.width > MAX_SMALL_WIDTH:
            faults.append(
                f"width must be at most {MAX_SMALL_WIDTH} for the extractor {self.extractor}, got "
                f"{self.width}. Lower it."
            )
        if self.extractor == "inception" and self.num_features not in INCEPTION_WIDTHS:
            widths = ", ".join(map(str, INCEPTION_WIDTHS))
            faults.append(
                f"width must be one of {widths} for inception, got {self.width}. Choose one."
            )
        if self.is_trained and (self.weights or self.weights_sha256):
            faults.append(
                f"weights are those of inception or of one's own extractor, and {self.extractor} "
                "is trained. Leave weights and weights_sha256 out."
            )
        if self.is_own and self.weights_sha256 and not self.weights:
            faults.append("weights_sha256 is that of weights, which are not given. Give them.")
        if faults:
            raise ValueError("\n".join(faults))
        return self


class EvaluateConfig(Section):
    """The protocol of the score."""

    num_samples: Positive = 1024
    num_steps: Positive = Field(default=50, description="DDIM steps")
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    eta: float = Field(default=0.0, ge=0, le=1)
    clip_x_start: bool = True
    guidance_scale: float = Field(
        default=1.0, ge=0, description="of a network that is told the class; 1 is no guidance"
    )
    seed: Seed = 0
    allow_few_samples: bool = Field(
        default=False,
        description="score with fewer than 10 samples, or test images, a feature; the score's name "
        "then says so",
    )
    interval_reference: Literal["fixed", "sample"] = Field(
        default="fixed", description="what the interval takes the reference for"
    )
    sweep_samples: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="for each of the scores against sampling steps and against eta"
    )
    keep_samples: bool = Field(default=True, description="as Arrow files")
    use_gpu: bool = Field(default=False, description="to sample")


class ClusterConfig(Section):
    """Where the work runs: a Ray started here, or one that is there."""

    address: str | None = Field(
        default=None, description="of a running Ray cluster; none starts Ray here"
    )
    num_cpus: Positive | None = Field(
        default=None, description="of the Ray started here; none is all"
    )


class Config(Section):
    """Everything that determines a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="of the model")
    storage: StorageConfig = StorageConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    features: FeaturesConfig = FeaturesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _agree_across_sections(self) -> Self:
        divisor = 2 ** (len(self.model.dim_mults) - 1)
        faults = []
        key, size = "data.resolution", self.data.shape[-1]
        if self.data.is_sequence:
            key = "data.sequence_shape's length"
        if size % divisor:
            faults.append(
                f"{key} must be divisible by {divisor} for the "
                f"{len(self.model.dim_mults)} levels of model.dim_mults, got {size}. "
                "Change one of them."
            )
        if self.evaluate.num_steps > self.diffusion.num_train_timesteps:
            faults.append(
                "evaluate.num_steps must not exceed diffusion.num_train_timesteps = "
                f"{self.diffusion.num_train_timesteps}, got {self.evaluate.num_steps}. Lower it."
            )
        needed = 10 * (self.features.num_features or 0)  # else counted when they are known
        if self.evaluate.num_samples < needed and not self.evaluate.allow_few_samples:
            faults.append(
                f"evaluate.num_samples must be at least 10 x features.width = {needed}, got "
                f"{self.evaluate.num_samples}. Raise it, make the features narrower, or set "
                "evaluate.allow_few_samples."
            )
        if self.train.validate_every is not None and not self.data.validation_fraction:
            faults.append(
                "data.validation_fraction must be above 0 with train.validate_every, got 0. Raise "
                "it or leave out train.validate_every."
            )
        if self.train.horizontal_flip and self.data.is_sequence:
            faults.append(
                "train.horizontal_flip is for images, and data.sequence_shape makes sequences. "
                "Leave it out."
            )
        if self.train.fid_every is not None:
            faults += self._faults_of_fid(needed)
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _faults_of_fid(self, needed: int) -> list[str]:
        """What stands against scores beside training."""
        if self.data.is_sequence:
            return [
                "train.fid_every scores images, and data.sequence_shape makes sequences. Leave it "
                "out."
            ]
        faults = []
        for name in ("validation_fraction", "test_fraction"):
            if not getattr(self.data, name):
                faults.append(
                    f"data.{name} must be above 0 with train.fid_every, whose reference is made of "
                    "images that are held out, got 0. Raise it or leave out train.fid_every."
                )
        if self.train.fid_samples < needed:
            faults.append(
                f"train.fid_samples must be at least 10 x features.width = {needed}, got "
                f"{self.train.fid_samples}. Raise it or make the features narrower."
            )
        return faults
