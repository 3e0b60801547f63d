"""The configuration: one typed, frozen, printable object, read from strict TOML.

Every section is a model; the file chooses, `--set a.b=c` nudges. All faults are reported at
once, an unknown key with the nearest valid one. Nothing here imports torch or Ray, so that
`plan` and a fully cached run answer at once.
"""

import difflib
import glob
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError

NOISE_GROUP = 16  # positions of the global batch that share one noise stream (design 3.4)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Common strictness of all sections."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StorageConfig(Section):
    """Where everything is kept."""

    root: str = Field(default="runs", min_length=1, description="directory or fsspec URI")


class DataConfig(Section):
    """Which images, and what they are made into."""

    sources: tuple[str, ...] = Field(
        min_length=1, description="tar shards: paths or globs, relative to the config file"
    )
    resolution: Positive = Field(description="side of the square images in pixels")
    mode: Literal["L", "RGB"] = Field(default="RGB", description="grey or colour")
    validation_fraction: Fraction = Field(default=0.05, description="share held out for choices")
    test_fraction: Fraction = Field(default=0.05, description="share held out for the final score")
    max_bad_fraction: Fraction = Field(
        default=0.01, description="share of images that may be refused"
    )

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.mode == "L" else 3

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

    num_workers: Positive = Field(default=1, description="data-parallel workers")
    cpus_per_worker: Positive = 1
    use_gpu: bool = False
    num_steps: Positive = Field(
        default=10_000, description="optimiser steps; raising it extends a run"
    )
    global_batch_size: Positive = Field(default=64, description="over all workers")
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: Fraction = 0.999
    timestep_draw: Literal["uniform", "antithetic", "stratified"] = "uniform"
    checkpoint_every: Positive = Field(default=500, description="optimiser steps")
    max_failures: int = Field(default=2, ge=0, description="times a dead worker is replaced")
    seed: Seed = 0

    @model_validator(mode="after")
    def _split_batch_by_groups(self) -> Self:
        unit = NOISE_GROUP * self.num_workers
        if self.global_batch_size % unit:
            raise ValueError(
                f"global_batch_size must be a multiple of {NOISE_GROUP} x num_workers = {unit}, "
                f"got {self.global_batch_size}. Use "
                f"{max(unit, round(self.global_batch_size / unit) * unit)}."
            )
        return self


class FeaturesConfig(Section):
    """The classifier whose penultimate layer is the feature space of the score."""

    width: int = Field(default=16, ge=2, le=512, description="number of features")
    num_steps: Positive = 600
    batch_size: Positive = 128
    learning_rate: float = Field(default=3e-3, gt=0)
    seed: Seed = 0


class EvaluateConfig(Section):
    """The protocol of the score."""

    num_samples: Positive = 1024
    num_steps: Positive = Field(default=50, description="DDIM steps")
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    eta: float = Field(default=0.0, ge=0, le=1)
    clip_x_start: bool = True
    seed: Seed = 0


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
        if self.data.resolution % divisor:
            faults.append(
                f"data.resolution must be divisible by {divisor} for the "
                f"{len(self.model.dim_mults)} levels of model.dim_mults, got "
                f"{self.data.resolution}. Change one of them."
            )
        if self.evaluate.num_steps > self.diffusion.num_train_timesteps:
            faults.append(
                "evaluate.num_steps must not exceed diffusion.num_train_timesteps = "
                f"{self.diffusion.num_train_timesteps}, got {self.evaluate.num_steps}. Lower it."
            )
        needed = 10 * self.features.width
        if self.evaluate.num_samples < needed:
            faults.append(
                f"evaluate.num_samples must be at least 10 x features.width = {needed}, got "
                f"{self.evaluate.num_samples}. Raise it or make the features narrower."
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies `a.b=c` overrides, and validates the whole.

    Relative `data.sources` are resolved against the file's directory.

    Args:
        path: of the TOML file.
        overrides: each `section.key=value`; the value is TOML, or a bare string.

    Raises:
        ConfigError: the file is missing or no TOML, an override is malformed, or values are
            wrong: all faults at once, one a line.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no config file at {path}. Give the path of a TOML file, such as "
            "examples/digits/digits.toml."
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory. Give the path of a TOML file in it.") from error
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config file {path}: {error.strerror}. Check the path and its "
            "permissions."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend that line.") from error
    for override in overrides:
        _apply_override(values, override)
    config = _validate(values, source=str(path))
    base = path.resolve().parent
    home = Path(glob.escape(str(base)))  # a directory may be called [a]
    sources = tuple(s if "://" in s else str(home / s) for s in config.data.sources)
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"--set takes section.key=value, got {override!r}. "
            "Write for example --set train.num_steps=2000."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"--set {override}: {section!r} is no section. Check the part before the dot."
            )
    values[key] = value


def _validate(values: dict[str, Any], source: str) -> Config:
    try:
        return _parse(values)
    except ValidationError as error:
        found = error.errors()
    faults = [line for fault in found for line in _fault_lines(fault)]
    # What spans several keys is only checked where each is well; look again without the unknown
    # ones, so that a misspelt key does not hide it.
    for fault in found:
        if fault["type"] == "extra_forbidden":
            *sections, key = fault["loc"]
            section: Any = values
            for name in sections:
                section = section[name]
            del section[key]
    try:
        _parse(values)
    except ValidationError as error:
        again = [line for fault in error.errors() for line in _fault_lines(fault)]
        faults += [line for line in again if line not in faults]
    heading = f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:"
    raise ConfigError("\n  ".join([heading, *faults]))


def _parse(values: dict[str, Any]) -> Config:
    # By way of JSON: strict mode then takes arrays for tuples and still no "3" for 3.
    return Config.model_validate_json(json.dumps(values, default=str))


def _fault_lines(fault: Any) -> list[str]:
    where = ".".join(str(part) for part in fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            valid = _valid_keys(fault["loc"][:-1])
            near = _nearest(str(fault["loc"][-1]), valid)
            return [f"{where} is not a known key. Did you mean {near!r}?"]
        case "missing":
            return [f"{where} is missing. Add it."]
        case "value_error":
            lines = str(fault["ctx"]["error"]).split("\n")
            return [f"{where}: {line}" if where else line for line in lines]
        case _:
            message = fault["msg"].removeprefix("Input ").rstrip(".")
            return [f"{where} {message}, got {fault['input']!r}. Change it."]


def _nearest(key: str, valid: Sequence[str]) -> str:
    """The valid key that looks most like this one; `lr` is `learning_rate`."""
    for name in valid:
        if key == "".join(word[0] for word in name.split("_")):
            return name
    return difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]


def _valid_keys(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in loc:
        model = model.model_fields[part].annotation
        if get_origin(model) in (Union, type(int | str)):
            model = next(kind for kind in get_args(model) if kind is not type(None))
    return list(model.model_fields)
