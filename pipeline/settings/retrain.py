"""The sections `promote` and `retrain`: what may become the champion, and how it is made anew."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings.section import Positive, Section


class PromoteConfig(Section):
    """The gate: when a version replaces the champion by itself."""

    rule: Literal["better", "not_worse", "ask"] = Field(
        default="better",
        description="better: beyond the intervals; not_worse: by at most the tolerance; ask: never "
        "by itself",
    )
    tolerance: float = Field(
        default=0.05, ge=0, description="of not_worse, as a share of the champion's score"
    )
    max_degenerate_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="share of the samples that may be of one value throughout"
    )
    allow_memorising: bool = Field(
        default=False, description="promote what makes near-copies of training images"
    )
    unchecked_copies: Literal["keep", "allow"] = Field(
        default="keep",
        description="too few images to look for near-copies: keep the version unless it is the "
        "first champion, or let its score decide",
    )


class RetrainConfig(Section):
    """A cycle of `retrain`: what it starts from, and what new shards must be like."""

    start: Literal["champion", "scratch"] = Field(
        default="champion", description="what training begins from"
    )
    num_steps: Positive | None = Field(
        default=None,
        description="optimiser steps of a cycle where there is a champion; none: train.num_steps",
    )
    check_drift: bool = Field(
        default=True, description="hold new shards that are unlike the pinned reference"
    )
    drift_factor: float = Field(
        default=1.5,
        ge=1,
        description="how many times as far from the reference as random real images a shard may be",
    )
