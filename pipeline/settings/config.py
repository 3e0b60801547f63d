"""The whole of the settings, with where things are kept and run."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipeline.settings.data import DataConfig
from pipeline.settings.evaluate import EvaluateConfig, FeaturesConfig
from pipeline.settings.model import DiffusionConfig, ModelConfig
from pipeline.settings.notify import NotifyConfig
from pipeline.settings.retrain import PromoteConfig, RetrainConfig
from pipeline.settings.section import Positive, Section
from pipeline.settings.train import TrainConfig
from pipeline.settings.tune import TuneConfig, faults_of_tune

CLIENT = "ray://"  # what an address of Ray's client begins with


class StorageConfig(Section):
    """Where everything is kept."""

    root: str = Field(default="runs", min_length=1, description="directory or fsspec URI")


class ClusterConfig(Section):
    """Where the work runs: a Ray started here, or one that is there."""

    address: str | None = Field(
        default=None, description="of a running Ray cluster, HEAD:PORT; none starts Ray here"
    )
    num_cpus: Positive | None = Field(
        default=None, description="of the Ray started here; none is all"
    )

    @field_validator("address")
    @classmethod
    def _be_no_client(cls, address: str | None) -> str | None:
        if address is not None and address.startswith(CLIENT):
            raise ValueError(
                f"must not be of Ray's client, with which Ray Data does not run, got {address!r}. "
                "Give HEAD:6379 on a machine of the cluster, or send a job from elsewhere, with "
                "`raydiffusion submit`."
            )
        return address


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
    tune: TuneConfig = TuneConfig()
    promote: PromoteConfig = PromoteConfig()
    retrain: RetrainConfig = RetrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    # Where others could read it, in records, reports and what workers are sent, it is left out.
    notify: NotifyConfig = Field(default=NotifyConfig(), exclude=True)

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
        if self.tune.enabled:
            faults += self.faults_of_tune()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def faults_of_new(self, searches: bool | None = None) -> list[str]:
        """What is refused in a file, though a config that was kept with a model may have it.

        Args:
            searches: whether a search is wanted; what `tune.enabled` says if not given.
        """
        faults = []
        if self.name.endswith(".toml"):
            faults.append(
                "name must not end in .toml, which means a config to all verbs, got "
                f"{self.name!r}. Leave the ending out."
            )
        evaluate, num_timesteps = self.evaluate, self.diffusion.num_train_timesteps
        num_steps = {"evaluate.num_steps": evaluate.num_steps}
        searches = self.tune.enabled if searches is None else searches
        if searches and self.tune.num_steps is not None:
            num_steps["tune.num_steps"] = self.tune.num_steps
        for key, number in num_steps.items():
            left = num_timesteps % number  # of the noisy end, beside the usual part of one step
            if evaluate.spacing == "leading" and num_timesteps // 10 < left < num_timesteps:
                faults.append(
                    f"{key} = {number} with evaluate.spacing = 'leading' leaves out the last "
                    f"{left} of {num_timesteps} timesteps, and begins with pure noise where "
                    "training showed images in it. Choose 'trailing', or a divisor."
                )
        is_guided = self.model.class_conditional and evaluate.guidance_scale != 1
        if is_guided and not self.train.label_dropout:
            faults.append(
                f"evaluate.guidance_scale = {evaluate.guidance_scale:g} needs a network that is "
                "sometimes not told the class, and train.label_dropout is 0. Raise that, or set "
                "the scale to 1."
            )
        return faults

    @property
    def trial_steps(self) -> int:
        """Optimiser steps of a whole trial of the search."""
        return self.tune.train_steps or self.train.num_steps

    def faults_of_tune(self) -> list[str]:
        """What stands against a search; looked for only where one is wanted."""
        faults = faults_of_tune(
            self.tune,
            images=self.trial_steps * self.train.global_batch_size,
            batch=self.train.global_batch_size,
            num_features=self.features.num_features,
            diffusion=self.diffusion,
        )
        if self.data.is_sequence:
            faults.append(
                "tune scores images, and data.sequence_shape makes sequences. Do without."
            )
        for name in ("validation_fraction", "test_fraction"):
            if not getattr(self.data, name):
                faults.append(
                    f"data.{name} must be above 0 for a search: trials are scored on images that "
                    "are held out, and the winner on others, got 0. Raise it."
                )
        if self.train.min_workers < self.train.max_workers:
            faults.append(
                "train.num_workers must be a number for a search, so that all trials get as much, "
                f"got {[self.train.min_workers, self.train.max_workers]}. Change it."
            )
        return faults

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
