"""Exchange with other libraries: checkpoints and scheduler configs in, model folders out.

The formats of others are read in `diffusion_core.interop` and `diffusion_core.scheduler_config`;
the folders, and the way back by `load_model_folder`, are in `model_folder.py`.
"""

import difflib
import hashlib
import json
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
from pydantic import TypeAdapter, ValidationError

from diffusion_core import UNetConfig
from diffusion_core.interop import read_checkpoint
from diffusion_core.interop_unet import LIBRARY
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.scheduler_config import (
    SchedulerSettings,
    make_scheduler_config,
    read_scheduler_config,
)
from diffusion_core.timesteps import Spacing
from pipeline.checkpoints import to_safetensors
from pipeline.errors import ConfigError, DataError
from pipeline.model_folder import (
    MODEL_FILE,
    ModelDocument,
    Source,
    WeightsFile,
    as_data_error,
    build_schedule,
    check_output,
    describe_schedule,
    read_document,
    read_weights,
    sha256_of,
    to_json,
    write_folder,
)
from pipeline.model_folder import load_model_folder as load_model_folder
from pipeline.models import make_diffusion, make_unet
from pipeline.targets import SUFFIX, Trained, find_trained
from pipeline.workflow import read_artifact

SCHEDULER_FILE = "scheduler_config.json"


@dataclass(frozen=True)
class Exchanged:
    """What an import or export wrote, and what a person should know of it."""

    output: str
    document: ModelDocument
    num_parameters: int
    notes: list[str]


@dataclass(frozen=True)
class ReadScheduler:
    """A scheduler config as sections of ours; `diffusion` is None where none says the same."""

    diffusion: dict[str, Any] | None
    evaluate: dict[str, Any]
    notes: list[str]

    def to_toml(self) -> str:
        """The sections as TOML."""
        lines: list[str] = []
        if self.diffusion is not None:
            options = self.diffusion["schedule_options"]
            plain = {k: v for k, v in self.diffusion.items() if k != "schedule_options"}
            lines += ["[diffusion]", *_toml_lines(plain)]
            if options:
                lines += ["", "[diffusion.schedule_options]", *_toml_lines(options)]
            lines += ["", "[evaluate]", *_toml_lines(self.evaluate)]
        return "\n".join(lines)


def import_checkpoint(
    path: Path,
    output: Path,
    *,
    objective: str | None = None,
    library_version: str | None = None,
    overrides: Sequence[str] = (),
) -> Exchanged:
    """Reads a checkpoint of denoising-diffusion-pytorch into a model folder.

    Args:
        path: the `.pt` file.
        output: the folder, which must not be there or be empty; it appears whole or not at all.
        objective: what the network predicts, where the file does not say.
        library_version: of the library that wrote it, where the file does not say.
        overrides: `field=value` of `UNetConfig`, for what weights do not tell.

    Raises:
        ConfigError: an option is wrong, or the output holds something.
        DataError: the checkpoint is missing, damaged, or not what we have a network for.
        StorageError: the output cannot be written.
    """
    if objective is not None and objective not in OBJECTIVES:
        raise ConfigError(
            f"--objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}. "
            "Choose one of these."
        )
    given = dict(_parse_override(override) for override in overrides)
    check_output(output)
    with _kept_warnings() as notes, as_data_error(path):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        model = read_checkpoint(path, objective=objective, library_version=library_version, **given)
    weights = {"model": model.weights}
    if model.ema_weights is not None:
        weights["ema"] = model.ema_weights
    names = {"model": "weights.safetensors", "ema": "ema.safetensors"}
    files = {names[kind]: to_safetensors(tensors) for kind, tensors in weights.items()}
    document = ModelDocument(
        unet=model.config,
        schedule=describe_schedule(model.schedule, {}),
        objective=model.objective,
        weighting=model.weighting,
        gamma=model.gamma,
        global_step=model.global_step,
        source=Source(
            name=path.name,
            sha256=sha256,
            library=LIBRARY,
            library_version=model.library_version,
        ),
        weights={
            kind: WeightsFile(file=names[kind], sha256=sha256_of(files[names[kind]]))
            for kind in ("ema", "model")
            if kind in weights
        },
    )
    write_folder(output, files | {MODEL_FILE: to_json(document)})
    num_parameters = sum(w.numel() for w in model.weights.values())
    return Exchanged(str(output), document, num_parameters, notes)


def import_scheduler_config(path: Path) -> ReadScheduler:
    """Reads a diffusers scheduler config as sections of a config of ours.

    Args:
        path: of `scheduler_config.json`, or of a folder with one, or with `scheduler/` in it.

    Raises:
        DataError: there is none, it is no JSON, or it holds what we cannot honour.
    """
    if path.is_dir():
        inside = [path / SCHEDULER_FILE, path / "scheduler" / SCHEDULER_FILE]
        found = [file for file in inside if file.is_file()]
        if not found:
            raise DataError(
                f"There is no {SCHEDULER_FILE} in {path}. Give a checkpoint file, or a folder that "
                "diffusers has saved a scheduler or a pipeline to."
            )
        path = found[0]
    with _kept_warnings() as notes, as_data_error(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("A scheduler config is a JSON object. Give diffusers' file.")
        settings = read_scheduler_config(config)
    return _as_sections(settings, notes)


def export_model(
    target: str, output: Path, overrides: Sequence[str] = (), *, root: str = "runs"
) -> Exchanged:
    """Writes a model folder with a diffusers scheduler config beside the EMA weights.

    Args:
        target: a model folder, a config (`.toml`) whose training is finished, `NAME` for the
            champion of a model or `NAME@VERSION`. A directory of that name is taken first.
        output: the folder, which must not be there or be empty; it appears whole or not at all.
        overrides: `a.b=c` of the config; of a version, those of `evaluate` alone.
        root: the storage root of a model's name.

    Raises:
        ConfigError: the config is wrong or its training not finished, there is no such version,
            the process has no form in diffusers, or the output holds something.
        DataError: the model folder is none, or is damaged.
        StorageError: the root cannot be read or the output not written.
    """
    check_output(output)
    spacing: Spacing = "trailing"
    clip_x_start = True
    folder = Path(target)
    if folder.is_dir() or (len(folder.parts) > 1 and not target.endswith(SUFFIX)):
        if overrides:
            raise ConfigError("--set is not for a model folder. Leave it out.")
        document = read_document(folder, ", a config (.toml), or a model's name")
        with _kept_warnings() as notes, as_data_error(folder / MODEL_FILE):
            schedule = build_schedule(document.schedule)
        content = read_weights(folder, document)
        if "ema" not in document.weights:
            notes.append("the model has no EMA weights: its weights as trained are exported")
    else:
        trained = find_trained(target, overrides, root=root)
        evaluate = trained.config.evaluate
        spacing, clip_x_start = evaluate.spacing, evaluate.clip_x_start
        with _kept_warnings() as notes:
            document, content = _read_training(trained)
            schedule = build_schedule(document.schedule)
    try:
        scheduler = make_scheduler_config(
            schedule, document.objective, spacing=spacing, clip_x_start=clip_x_start
        )
    except ValueError as error:
        raise ConfigError(f"{target} cannot be exported: {error}") from error
    kind = "ema" if "ema" in document.weights else "model"
    file = WeightsFile(file="unet.safetensors", sha256=sha256_of(content))
    document = document.model_copy(update={"weights": {kind: file}})
    files = {
        file.file: content,
        SCHEDULER_FILE: json.dumps(scheduler, indent=2).encode(),
        MODEL_FILE: to_json(document),
    }
    write_folder(output, files)
    num_parameters = sum(w.numel() for w in safetensors.torch.load(content).values())
    return Exchanged(str(output), document, num_parameters, notes)


def _read_training(trained: Trained) -> tuple[ModelDocument, bytes]:
    config, manifest = trained.config, trained.train
    content = read_artifact(trained.storage, manifest, "ema.safetensors")
    diffusion = make_diffusion(config)
    sha256 = manifest["artifacts"]["ema.safetensors"]["sha256"]
    options = dict(config.diffusion.schedule_options)
    document = ModelDocument(
        unet=make_unet(config, config.train.seed, manifest["metrics"]["num_classes"]).config,
        schedule=describe_schedule(diffusion.schedule, options),
        objective=config.diffusion.objective,
        weighting=config.diffusion.weighting,
        gamma=config.diffusion.gamma,
        global_step=manifest["metrics"]["num_steps"],
        source=Source(
            name=config.name,
            sha256=sha256,
            library="raydiffusion",
            library_version=manifest["versions"].get("raydiffusion"),
            train=manifest["key"],
        ),
        weights={"ema": WeightsFile(file="ema.safetensors", sha256=sha256)},
    )
    return document, content


def _as_sections(settings: SchedulerSettings, notes: list[str]) -> ReadScheduler:
    evaluate = {"spacing": settings.spacing, "clip_x_start": settings.clip_x_start}
    if settings.sampler == "ddpm":
        evaluate["eta"] = 1.0
    if settings.sampler == "dpmpp_2m":
        notes.append("the file samples with DPM-Solver++(2M), and `evaluate` with DDIM")
    if settings.variance != "fixed_small":
        notes.append(f"the file's variance is {settings.variance}, and DDIM's is fixed_small")
    if settings.steps_offset and settings.spacing == "leading":
        notes.append(f"the file shifts its timesteps by {settings.steps_offset}, `evaluate` by 0")
    diffusion = None
    if settings.schedule_name == "trained_betas":
        notes.append(
            "the file has betas given one by one, which [diffusion] of a config cannot express; in "
            "Python, diffusion_core.scheduler_config.read_scheduler_config gives the schedule"
        )
    else:
        diffusion = {
            "schedule": settings.schedule_name,
            "num_train_timesteps": settings.schedule.num_train_timesteps,
            "objective": settings.objective,
            "schedule_options": dict(settings.schedule_options),
        }
        if settings.schedule.name != settings.schedule_name:  # the file has it rescaled
            diffusion["zero_terminal_snr"] = True
    return ReadScheduler(diffusion, evaluate, notes)


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def _parse_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    known = get_type_hints(UNetConfig)
    if not equals or name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--set takes field=value of the network here, got {override!r}. "
            f"Did you mean {near}=...? The fields are those of diffusion_core.UNetConfig."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    try:  # by way of JSON, so that arrays are taken for tuples
        kind = TypeAdapter(known[name])
        return name, kind.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(
            f"--set {override}: {name} must be of type {known[name]}. Mend the value."
        ) from error


@contextmanager
def _kept_warnings() -> Iterator[list[str]]:
    """Takes warnings into a list, for the person and not for the log."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    notes += dict.fromkeys(str(warning.message) for warning in caught)
