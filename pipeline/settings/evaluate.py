"""The sections `features` and `evaluate`: the space of the score, and its protocol."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.settings.section import Positive, Section, Seed

TRAINED_EXTRACTORS = ("classifier", "self_supervised")
EXTRACTORS = (*TRAINED_EXTRACTORS, "inception")
SMALL_WIDTH, MAX_SMALL_WIDTH = 16, 512  # features of those
INCEPTION_WIDTHS = (64, 192, 768, 2048)

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # package.module:factory


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
    batch_size: Positive = Field(default=128, description="images of a step")
    learning_rate: float = Field(default=3e-3, gt=0, description="of AdamW")
    seed: Seed = Field(default=0, description="of its weights and batches")

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

    num_samples: Positive = Field(default=1024, description="that are scored")
    num_steps: Positive = Field(default=50, description="DDIM steps")
    spacing: Literal["leading", "trailing", "linspace"] = Field(
        default="trailing", description="of the sampler's timesteps"
    )
    eta: float = Field(
        default=0.0, ge=0, le=1, description="noise put back at each step; 0 is none"
    )
    clip_x_start: bool = Field(
        default=True,
        description="keep the guess of the clean image in [-1, 1]; sequences: `false` by default",
    )
    guidance_scale: float = Field(
        default=1.0, ge=0, description="of a network that is told the class; 1 is no guidance"
    )
    seed: Seed = Field(default=0, description="of the samples")
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
