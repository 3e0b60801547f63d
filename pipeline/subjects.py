"""What is evaluated: the config's own training, a model made elsewhere, or images.

A model made elsewhere is copied into the storage root by its content, where every node reads it.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from diffusion_core import Diffusion, UNet
from pipeline.dataset import class_counts, read_dataset
from pipeline.errors import DataError
from pipeline.exchange import import_checkpoint
from pipeline.label_mix import count_for_training, mix_protocol, read_mix
from pipeline.model_folder import (
    MODEL_FILE,
    ModelDocument,
    load_model,
    read_document,
    read_weights,
    sha256_of,
)
from pipeline.models import make_diffusion, make_unet
from pipeline.protocol import OF_IMAGES, sampling_protocol
from pipeline.settings import Config
from pipeline.storage import Storage, damaged
from pipeline.subject_kinds import GivenModel
from pipeline.workflow import StepContext, read_artifact

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode with its process, and whose classes it is told."""

    model: UNet
    diffusion: Diffusion
    counts: dict[int, int] | None  # training images by label

    def to(self, device: str) -> "Network":
        """Itself, moved there."""
        self.model.to(device)
        self.diffusion.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Source:
    """Where samples come from; JSON.

    Args:
        kind: the network of the config's training, one made elsewhere, one that learned nothing, or
            images that were given.
        key: of a model made elsewhere.
        manifest: of the step `train`, or of the step `images`.
        counts: training images by label, where the network is told the class.
        num_timesteps: T of the network's process.
    """

    kind: Literal["training", "model", "untrained", "images"]
    key: str | None = None
    manifest: Mapping[str, Any] | None = None
    counts: Mapping[str, int] | None = None
    num_timesteps: int = 0

    def to_json(self) -> str:
        """As it is sent to workers."""
        return json.dumps(asdict(self), sort_keys=True)


def find_source(context: StepContext) -> Source:
    """What the step `evaluate` draws its samples from.

    Raises:
        DataError: the network knows other classes than the data set has.
    """
    storage, data = context.storage, context.inputs["preprocess"]
    if "images" in context.inputs:
        return Source("images", manifest=context.inputs["images"])
    if (key := context.planned.step.settings.get("model_key")) is not None:
        document = _read_document(storage, key)
        counts = _count_labels(storage, data, document.unet.num_classes)
        num_timesteps = document.schedule.num_train_timesteps
        return Source("model", key=key, counts=counts, num_timesteps=num_timesteps)
    train, counts = context.inputs["train"], None
    if context.config.model.class_conditional:
        reference = context.inputs["reference"]
        counts = count_for_training(storage, train, data, reference)
    return source_of_training(context.config, train, counts)


def source_of_training(
    config: Config, train: Mapping[str, Any], counts: Mapping[str, int] | None
) -> Source:
    """The network of a training.

    Args:
        config: that it was trained with.
        train: the manifest of its step `train`.
        counts: images by label, by which samples get theirs, where the network is told the class.
    """
    return Source(
        "training",
        manifest=train,
        counts=counts,
        num_timesteps=config.diffusion.num_train_timesteps,
    )


def sampling_of(context: StepContext) -> dict[str, Any]:
    """How the samples of the step `evaluate` are made, for the protocol."""
    if "images" in context.inputs:
        converts = context.planned.step.settings.get("converts", False)
        return OF_IMAGES | {"converts": converts}
    weights, is_told = "ema", context.config.model.class_conditional
    if (key := context.planned.step.settings.get("model_key")) is not None:
        document = _read_document(context.storage, key)
        weights = "ema" if "ema" in document.weights else "model"
        is_told = document.unet.num_classes is not None
    mix = {}
    if is_told:
        mix = mix_protocol(read_mix(context.storage, context.inputs["reference"]))
    return sampling_protocol(context.config, is_told=is_told, weights=weights) | mix


def import_model(path: Path, config: Config, storage: Storage) -> GivenModel:
    """Copies a model made elsewhere into the storage root.

    Args:
        path: a model folder, or a checkpoint that `raydiffusion import` reads without options.
        config: whose data set it is evaluated on.
        storage: the root.

    Raises:
        DataError: it is none, is damaged, or makes other images than those of the data set.
        StorageError: the root cannot be written.
    """
    if not path.is_dir():
        with tempfile.TemporaryDirectory() as directory:
            try:
                import_checkpoint(path, Path(directory, "model"))
            except DataError as error:
                if not path.exists():
                    raise
                raise DataError(
                    f"{error} What it takes options to read, `raydiffusion import {path} --output "
                    "FOLDER` reads; then give the folder."
                ) from error
            copied = _copy_folder(Path(directory, "model"), path.name, config, storage)
    else:
        copied = _copy_folder(path, path.name, config, storage)
    return replace(copied, path=path)


def copy_again(model: GivenModel, config: Config, storage: Storage) -> None:
    """Copies a model once more that a clean-up took before a run's record told that it is needed.

    Args:
        model: as it was imported.
        config: whose data set it is evaluated on.
        storage: the root.

    Raises:
        DataError: what it was copied from is gone.
        StorageError: the root cannot be written.
    """
    is_whole = storage.exists(f"{_directory(model.key)}/{MODEL_FILE}")  # it is deleted first
    if model.path is not None and not is_whole:
        import_model(model.path, config, storage)


def _copy_folder(folder: Path, name: str, config: Config, storage: Storage) -> GivenModel:
    document = read_document(folder, ", or another library's checkpoint (.pt)")
    weights = read_weights(folder, document)
    unet, data = document.unet, config.data
    factor = 2 ** (len(unet.dim_mults) - 1)
    fault = None
    if (unet.channels, unet.is_sequence) != (data.channels, data.is_sequence):
        kinds = [
            f"{'sequences' if is_sequence else 'images'} of {channels} channel"
            + ("s" if channels > 1 else "")
            for channels, is_sequence in (
                (unet.channels, unet.is_sequence),
                (data.channels, data.is_sequence),
            )
        ]
        fault = f"it makes {kinds[0]}, and the data set has {kinds[1]}"
    elif data.shape[-1] % factor:
        fault = f"its network needs sizes divisible by {factor}, and the data set has {data.shape}"
    elif config.evaluate.num_steps > document.schedule.num_train_timesteps:
        fault = (
            f"it has {document.schedule.num_train_timesteps} timesteps, fewer than "
            f"evaluate.num_steps = {config.evaluate.num_steps}"
        )
    if fault is not None:
        raise DataError(
            f"{name} cannot be evaluated with this config: {fault}. Give the config of its data "
            "set."
        )
    content = (folder / MODEL_FILE).read_bytes()
    key = hashlib.sha256(content + hashlib.sha256(weights).digest()).hexdigest()[:32]
    directory = _directory(key)
    storage.create(f"{directory}/{WEIGHTS}", weights)
    storage.create(f"{directory}/{MODEL_FILE}", content)
    return GivenModel(key, class_conditional=unet.num_classes is not None)


def _count_labels(
    storage: Storage, data: Mapping[str, Any], num_classes: int | None
) -> dict[str, int] | None:
    """Training images by label, for a network that is told the class."""
    if num_classes is None:
        return None
    counts = class_counts(read_dataset(storage, data), "train")
    if len(counts) != num_classes:  # of a model made elsewhere, whose classes have no names
        raise DataError(
            f"The network knows {num_classes} classes, and the data set has {len(counts)}. Give "
            "the config of the data set that it was trained on."
        )
    return {str(label): count for label, count in counts.items()}  # the keys that JSON has


def load_network(storage: Storage, config: Config, source: Source) -> Network:
    """The network that a source names.

    Raises:
        StorageError: its weights are missing or damaged.
    """
    counts = None if source.counts is None else {int(k): n for k, n in source.counts.items()}
    if source.kind == "model":
        assert source.key is not None
        directory = _directory(source.key)
        document, weights = (storage.read(f"{directory}/{n}") for n in (MODEL_FILE, WEIGHTS))
        known = _read_document(storage, source.key).weights
        if sha256_of(weights) != (known.get("ema") or known["model"]).sha256:
            raise damaged(storage, f"{directory}/{WEIGHTS}")
        model, diffusion = load_model(document, weights, f"{storage.uri}/{directory}")
        return Network(model, diffusion, counts)
    num_classes = None if counts is None else len(counts)
    model = make_unet(config, config.train.seed, num_classes)
    if source.manifest is not None:
        content = read_artifact(storage, source.manifest, "ema.safetensors")
        model.load_state_dict(safetensors.torch.load(content))
    return Network(model.eval(), make_diffusion(config, num_classes), counts)


def _read_document(storage: Storage, key: str) -> ModelDocument:
    """What describes a model made elsewhere."""
    path = f"{_directory(key)}/{MODEL_FILE}"
    try:
        return ModelDocument.model_validate_json(storage.read(path))
    except (FileNotFoundError, ValueError) as error:
        raise damaged(storage, path) from error


def _directory(key: str) -> str:
    return f"models-elsewhere/{key}"
