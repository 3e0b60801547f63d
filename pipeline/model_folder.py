"""Model folders: all that is needed to run a network, in a form that outlives the run.

A folder holds `model.json` and weights as safetensors, each file named there with its hash. It is
written whole or not at all. What goes into one, and from where, is in `exchange.py`.
"""

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field, ValidationError

from diffusion_core import Diffusion, NoiseSchedule, UNet, UNetConfig, make_schedule
from diffusion_core.objectives import Objective, Weighting
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.settings import Section
from pipeline.storage import open_storage

MODEL_FILE = "model.json"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class NamedSchedule(Section):
    """A schedule that `make_schedule` makes anew, to the bit."""

    name: str
    num_train_timesteps: int
    options: dict[str, float | bool]


class ListedSchedule(Section):
    """Any other schedule: its scales, not betas, so that it too comes back to the bit."""

    name: str
    signal_scale: tuple[float, ...]
    noise_scale: tuple[float, ...]

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.signal_scale)


class Source(Section):
    """Where a model comes from: a checkpoint of another library, or a training here."""

    name: str = Field(description="of the checkpoint's file, or of the model")
    sha256: str = Field(description="of the checkpoint's file, or of the trained EMA weights")
    library: str
    library_version: str | None
    train: str | None = Field(default=None, description="key of the step that trained it")


class WeightsFile(Section):
    """A safetensors file beside `model.json`."""

    file: FileName
    sha256: str


class ModelDocument(Section):
    """The content of `model.json`."""

    format: Literal[1] = 1
    unet: UNetConfig
    schedule: NamedSchedule | ListedSchedule
    objective: Objective
    weighting: Weighting
    gamma: float
    global_step: int
    source: Source
    weights: dict[Literal["ema", "model"], WeightsFile] = Field(min_length=1)


def load_model_folder(path: Path) -> tuple[UNet, Diffusion]:
    """The network with its EMA weights, in evaluation mode, and its process.

    The weights as trained are taken where no EMA was kept.

    Raises:
        DataError: the folder is none, or is damaged.
    """
    return load_model(to_json(document := read_document(path)), read_weights(path, document), path)


def load_model(document: bytes, weights: bytes, name: Path | str) -> tuple[UNet, Diffusion]:
    """The network with these weights, in evaluation mode, and its process.

    Args:
        document: the content of `model.json`.
        weights: the content of a safetensors file that it names.
        name: of the folder, for errors.

    Raises:
        DataError: they do not go together.
    """
    try:
        known = ModelDocument.model_validate_json(document)
        with torch.random.fork_rng(devices=[]):
            model = UNet(known.unet)
        model.load_state_dict(safetensors.torch.load(weights))
        diffusion = Diffusion(
            build_schedule(known.schedule),
            known.objective,
            known.weighting,
            known.gamma,
            self_condition=known.unet.self_condition,
            learned_variance=known.unet.learned_variance,
            null_label=known.unet.num_classes,
        )
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise damaged_file(name, "its weights are not of the network it describes") from error
    except ValueError as error:
        raise damaged_file(name, str(error)) from error
    return model.eval(), diffusion


def read_document(folder: Path, others: str = "") -> ModelDocument:
    """The document of a model folder.

    Args:
        folder: with the document.
        others: what may be given in its place, for people, after a comma.

    Raises:
        DataError: the folder is none, or the document is damaged or of a later version.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} is no model folder: it has no {MODEL_FILE}. Give a folder that "
            f"`raydiffusion import` or `export` has written{others}."
        )
    with as_data_error(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("unet"), dict):
            raise damaged_file(path, "it describes no network")
        unknown = set(values["unet"]) - {field.name for field in fields(UNetConfig)}
        if unknown:
            raise ValueError(
                f"unet has {', '.join(sorted(unknown))}, which this version does not know. Use the "
                "version that wrote it."
            )
        return ModelDocument.model_validate_json(json.dumps(values))


def read_weights(folder: Path, document: ModelDocument) -> bytes:
    """The EMA weights of a model folder, or those as trained where no EMA was kept.

    Raises:
        DataError: the file is missing or not what the document says.
    """
    file = document.weights.get("ema") or document.weights["model"]
    with as_data_error(folder / file.file):
        content = (folder / file.file).read_bytes()
    if sha256_of(content) != file.sha256:
        raise damaged_file(folder / file.file, f"its content is not what {MODEL_FILE} says")
    return content


def describe_schedule(
    schedule: NoiseSchedule, options: dict[str, float | bool]
) -> NamedSchedule | ListedSchedule:
    """How to make the schedule anew: by name if these options give it to the bit."""
    T = schedule.num_train_timesteps  # noqa: N806  (the field's name for it)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule at hand has had its say
        try:
            again = make_schedule(schedule.name, T, **options)
        except ValueError:
            again = None
    if (
        again is not None
        and torch.equal(again.signal_scale, schedule.signal_scale)
        and torch.equal(again.noise_scale, schedule.noise_scale)
    ):
        return NamedSchedule(name=schedule.name, num_train_timesteps=T, options=options)
    return ListedSchedule(
        name=schedule.name,
        signal_scale=tuple(schedule.signal_scale.tolist()),
        noise_scale=tuple(schedule.noise_scale.tolist()),
    )


def build_schedule(schedule: NamedSchedule | ListedSchedule) -> NoiseSchedule:
    """The inverse of `describe_schedule`.

    Raises:
        ValueError: the document has been tampered with.
    """
    if isinstance(schedule, NamedSchedule):
        return make_schedule(schedule.name, schedule.num_train_timesteps, **schedule.options)
    scales = (schedule.signal_scale, schedule.noise_scale)
    return NoiseSchedule(schedule.name, *(torch.tensor(s, dtype=torch.float64) for s in scales))


def check_output(output: Path) -> None:
    """Refuses a place that holds something.

    Raises:
        ConfigError: it does.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(
            f"{output} is there already and not empty. Give --output a new directory, or delete it."
        )


def write_folder(output: Path, files: Mapping[str, bytes]) -> None:
    """Writes the folder beside its place and moves it there: it is whole or not there.

    Raises:
        ConfigError: the place holds something.
        StorageError: it cannot be written.
    """
    output = output.absolute()
    staged = output.parent / f".{output.name}-{uuid.uuid4().hex}"
    storage = open_storage(str(staged))
    try:
        for name, content in files.items():
            storage.create(name, content)
        staged.replace(output)
    except OSError as error:
        check_output(output)  # another may have written there meanwhile
        raise StorageError(
            f"Cannot write {output}: {error.strerror}. Check the path and its permissions."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def as_data_error(path: Path) -> Iterator[None]:
    """Makes what goes wrong in reading a file a DataError that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}. Check the path and its permissions."
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Give another file.") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise damaged_file(path, f"{where}: {fault['msg']}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def damaged_file(path: Path | str, fault: str) -> DataError:
    """The error for a file of a model folder that is not as it was written."""
    return DataError(f"{path} is damaged: {fault}. Import or export the model again.")


def to_json(document: ModelDocument) -> bytes:
    """The content of `model.json`."""
    return document.model_dump_json(indent=1).encode()


def sha256_of(content: bytes) -> str:
    """The hash that the document has of a file."""
    return hashlib.sha256(content).hexdigest()
