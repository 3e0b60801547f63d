"""The section `train`."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from pipeline.settings.section import Fraction, Positive, Section, Seed

NOISE_GROUP = 16  # positions of the global batch that share one noise stream (design 3.4)
MAX_PATIENCE_S = 480.0  # ranks that wait for a patient one cannot tell it from one that hangs
WAITS = 2  # for the storage, of one rank, one after the other, while the others wait for it
BESIDE_S = 360.0  # for all else that ranks wait for: attempts that take long, a rank that is slow


class TrainConfig(Section):
    """How the network is trained."""

    num_workers: Positive | tuple[Positive, Positive] = Field(
        default=1, description="data-parallel workers; [min, max]: as many as there is room for"
    )
    cpus_per_worker: Positive = Field(default=1, description="threads of each worker")
    use_gpu: bool = Field(default=False, description="one for each worker")
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
        default="auto",
        description="of the network's arithmetic; auto: bf16 on GPUs that have it; with fp32, "
        "convolutions on GPUs are in TF32, as is torch's default",
    )
    compile: bool = Field(default=False, description="with torch.compile")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW")
    learning_rate_decay: Literal["constant", "cosine"] = Field(
        default="constant", description="after the warm-up; cosine ends at 0 with num_steps"
    )
    warmup_steps: int = Field(
        default=100, ge=0, description="in which the learning rate rises from 0"
    )
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="longer gradients are shortened to it"
    )
    ema_decay: Fraction = Field(
        default=0.999,
        description="of the weights' moving average, at most: it rises by `1 - (1 + step)^-0.75`, "
        "to 0.99 after 460 steps and 0.999 after 10,000",
    )
    timestep_draw: Literal["uniform", "antithetic", "stratified"] = Field(
        default="uniform", description="how the timesteps of a batch are drawn"
    )
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
        default=None,
        description="optimiser steps between grids of samples; for one every k images "
        "`k / global_batch_size`",
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
        description="how long a checkpoint that cannot be written or read, or a shard that cannot "
        "be read, is tried again",
    )
    seed: Seed = Field(default=0, description="of the weights, the order and the noise")

    @property
    def group_timeout_s(self) -> float:
        """When an exchange between ranks is given up, in seconds: one that is gone is noticed.

        Rank 0 waits twice where it goes back after a loss that is not finite: for the checkpoint
        that is being written, and for the one to be read. So it does at the end, for the last two.
        Any rank waits for its checkpoint, or rank 0 to write, and then for its next shard.
        """
        return WAITS * self.storage_patience_s + BESIDE_S

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
