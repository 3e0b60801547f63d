"""The sections `model` and `diffusion`: the network, the schedule and the objective."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.settings.section import Fraction, Positive, Section


class ModelConfig(Section):
    """The U-Net; see `diffusion_core.UNetConfig` for the meaning of each."""

    dim: Positive = Field(default=64, description="channels of the first level")
    dim_mults: tuple[Positive, ...] = Field(
        default=(1, 2, 4),
        min_length=1,
        description="channels of each level as multiples of dim; each but the last halves the size",
    )
    attention: tuple[Literal["none", "linear", "full"], ...] = Field(
        default=("none", "none", "full"), description="of each level"
    )
    heads: Positive = Field(default=4, description="of attention")
    head_dim: Positive = Field(default=32, description="channels of a head")
    memory_kv: int = Field(default=0, ge=0, description="learned keys and values in attention")
    norm: Literal["group", "rms"] = Field(default="group", description="GroupNorm or RMSNorm")
    norm_groups: Positive = Field(default=8, description="of GroupNorm")
    downsample: Literal["unshuffle", "strided"] = Field(
        default="unshuffle", description="how the size is halved"
    )
    time_features: Literal["sinusoidal", "learned", "random"] = Field(
        default="sinusoidal", description="of the timestep"
    )
    class_conditional: bool = Field(default=False, description="tell the network the labels")
    dropout: Fraction = Field(default=0.0, description="share of units that training drops")

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
    ] = Field(default="cosine", description="of the noise")
    schedule_options: dict[str, float | bool] = Field(
        default={}, description="of the schedule, by name"
    )
    zero_terminal_snr: bool = Field(
        default=False, description="shift and scale the signal so that the last step is noise alone"
    )
    num_train_timesteps: Positive = Field(default=1000, description="T, the steps of the schedule")
    objective: Literal["pred_noise", "pred_x0", "pred_v", "pred_flow"] = Field(
        default="pred_v", description="what the network learns to tell"
    )
    weighting: Literal["uniform", "snr", "min_snr", "vlb"] = Field(
        default="uniform", description="of the loss over timesteps"
    )
    gamma: float = Field(default=5.0, gt=0, description="of min_snr")
    offset_noise: float = Field(default=0.0, ge=0, description="strength; 0.1 is usual")
    self_condition: bool = Field(
        default=False, description="show the network its own guess of the clean image"
    )
    learned_variance: bool = Field(default=False, description="for sampling with ddpm")
