"""The section `tune`: which settings are searched, over which ranges, and by what they are judged.

What a choice becomes is in `pipeline/tune/space.py`.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.settings.model import DiffusionConfig
from pipeline.settings.section import Positive, Section, Seed

METRICS = ("fid", "bits_per_dim")


def _ascend(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if not low < high:
        raise ValueError(f"a range is [low, high] with low < high, got [{low}, {high}]. Swap them.")
    return ends


def _be_positive(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] <= 0:
        raise ValueError(
            f"a range on a log scale must begin above 0, got [{ends[0]}, {ends[1]}]. Raise its low "
            "end."
        )
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ascend)]
LogRange = Annotated[Range, AfterValidator(_be_positive)]


class LinearSpace(Section):
    """Ranges of `linear`: the end of the betas is the start times the ratio."""

    beta_start: LogRange = Field(default=(1e-5, 1e-3), description="log-uniform")
    ratio: LogRange = Field(
        default=(10.0, 1000.0), description="beta_end / beta_start, log-uniform"
    )

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if self.ratio[0] <= 1:
            raise ValueError(
                f"ratio is beta_end / beta_start and must be above 1, got {list(self.ratio)}. "
                "Raise its low end."
            )
        return self


class CosineSpace(Section):
    """The range of `cosine`."""

    s: LogRange = Field(default=(1e-3, 0.1), description="log-uniform")


class SigmoidSpace(Section):
    """Ranges of `sigmoid`."""

    start: Range = Field(default=(-6.0, 0.0), description="where the sigmoid begins")
    end: Range = Field(default=(0.0, 6.0), description="where it ends")
    tau: LogRange = Field(default=(0.3, 3.0), description="log-uniform")


class SqrtSpace(Section):
    """The range of `sqrt`."""

    s: LogRange = Field(default=(1e-6, 9e-4), description="log-uniform; below 1/T")


Objective = Literal["pred_noise", "pred_x0", "pred_v", "pred_flow"]
Weighting = Literal["uniform", "snr", "min_snr", "vlb"]


class SpaceConfig(Section):
    """What is searched. What is empty stays as the config has it, as with `schedule = []`."""

    schedule: tuple[Literal["linear", "cosine", "sigmoid", "sqrt"], ...] = Field(
        default=("linear", "cosine", "sigmoid"), description="each with its own ranges below"
    )
    linear: LinearSpace = LinearSpace()
    cosine: CosineSpace = CosineSpace()
    sigmoid: SigmoidSpace = SigmoidSpace()
    sqrt: SqrtSpace = SqrtSpace()
    objective: tuple[Objective, ...] = Field(default=(), description="to choose among")
    weighting: tuple[Weighting, ...] = Field(default=(), description="to choose among")
    zero_terminal_snr: tuple[bool, ...] = Field(default=(), description="to choose among")
    learning_rate: LogRange | None = Field(default=None, description="log-uniform")

    @model_validator(mode="after")
    def _hold_something(self) -> Self:
        names = ("schedule", "objective", "weighting", "zero_terminal_snr")
        faults = [
            f"{name} names a value twice, got {list(getattr(self, name))}. Name each once."
            for name in names
            if len(set(getattr(self, name))) < len(getattr(self, name))
        ]
        if self.learning_rate is None and not any(getattr(self, name) for name in names):
            faults.append("nothing is searched. Name schedules, or another setting to vary.")
        if faults:
            raise ValueError("\n".join(faults))
        return self


class TuneConfig(Section):
    """The search for a better schedule, by short trainings that are scored."""

    enabled: bool = Field(
        default=False, description="whether `run` searches first, and trains what it recommends"
    )
    metric: str = Field(
        default="fid", description="fid or bits_per_dim, both on the validation split"
    )
    num_trials: Positive = Field(default=16, description="with the config as it is, the first")
    searcher: Literal["tpe", "random"] = Field(
        default="tpe", description="what proposes the next trial"
    )
    stopping: Literal["asha", "none"] = Field(
        default="asha", description="whether trials that fall behind are ended early"
    )
    grace_images: Positive | None = Field(
        default=None,
        description="images that a trial sees before it can be stopped; none: two rungs before "
        "its end",
    )
    reduction_factor: int = Field(
        default=3, ge=2, description="of ASHA: one in so many goes on at each rung"
    )
    train_steps: Positive | None = Field(
        default=None, description="optimiser steps of a trial; none: train.num_steps"
    )
    num_samples: Positive = Field(default=512, description="samples, or images, of a trial's score")
    num_steps: Positive | None = Field(
        default=None, description="DDIM steps of a trial's score; none: evaluate.num_steps"
    )
    num_finalists: int = Field(
        default=3, ge=1, description="that are trained again, the config as it is not counted"
    )
    num_seeds: int = Field(default=3, ge=2, description="of each of these")
    max_signal_left: float = Field(
        default=0.01, gt=0, lt=1, description="share of signal that a schedule may keep at its end"
    )
    max_concurrent: Positive | None = Field(
        default=None, description="trials at a time; none: as many as the cluster holds"
    )
    seed: Seed = Field(default=0, description="of the proposals")
    space: SpaceConfig = SpaceConfig()

    @field_validator("metric")
    @classmethod
    def _compare_schedules(cls, value: str) -> str:
        if "loss" in value:
            raise ValueError(
                f"{value} cannot choose between schedules: each schedule, objective and weighting "
                "measures another error at other noise levels, so the lower loss may be the worse "
                'model. Use "fid" or "bits_per_dim", which mean the same for all.'
            )
        if value not in METRICS:
            raise ValueError(f"must be one of {', '.join(METRICS)}, got {value!r}. Change it.")
        return value

    @property
    def varies_diffusion(self) -> bool:
        """Whether a trial may have another schedule than the config."""
        return bool(self.space.schedule or self.space.zero_terminal_snr)


def faults_of_tune(
    tune: TuneConfig,
    *,
    images: int,
    batch: int,
    num_features: int | None,
    diffusion: DiffusionConfig,
) -> list[str]:
    """What stands against a search with the other sections as they are.

    Args:
        tune: the section.
        images: that a whole trial sees.
        batch: images of a step.
        num_features: of the extractor, where that is known.
        diffusion: the section.
    """
    faults = []
    if tune.grace_images is not None and not batch <= tune.grace_images <= images:
        faults.append(
            f"tune.grace_images must be from {batch}, a batch, to {images}, what a whole trial "
            f"sees, got {tune.grace_images}. Change it."
        )
    needed = 10 * (num_features or 0)
    if tune.metric == "fid" and tune.num_samples < needed:
        faults.append(
            f"tune.num_samples must be at least 10 x features.width = {needed}, got "
            f"{tune.num_samples}. Raise it or make the features narrower."
        )
    if tune.num_steps is not None and tune.num_steps > diffusion.num_train_timesteps:
        faults.append(
            "tune.num_steps must not exceed diffusion.num_train_timesteps = "
            f"{diffusion.num_train_timesteps}, got {tune.num_steps}. Lower it."
        )
    return faults
