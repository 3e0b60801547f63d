"""Samples of a finished training as files: a PNG for each image, a grid, and Arrow."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_core import CHUNK
from pipeline.dataset import class_counts, read_dataset
from pipeline.drawing import device_of, draw_items
from pipeline.errors import ConfigError
from pipeline.host import full_precision
from pipeline.model_folder import check_output, write_folder
from pipeline.pinning import read_step
from pipeline.report.plots import draw_grid, draw_sequences
from pipeline.sampling import draw_labels
from pipeline.shards import write_arrow
from pipeline.subjects import Network, load_network, source_of_training
from pipeline.targets import Trained, find_trained
from pipeline.workflow import Event, Observer

GRID_SHOWN, COLUMNS, TILE_PX = 64, 8, 64
LISTED = 10  # classes in a sentence


@dataclass(frozen=True)
class Sampled:
    """What was drawn, from what, and where it is."""

    output: str
    name: str
    num_samples: int
    files: list[str]


def write_samples(
    target: str,
    output: Path,
    *,
    num_samples: int,
    observer: Observer,
    label: str | None = None,
    overrides: Sequence[str] = (),
    root: str = "runs",
) -> Sampled:
    """Draws samples in this process, by DDIM as `evaluate` of the config says, into a new folder.

    The noise of each is that of its number, as in an evaluation.

    Args:
        target: a config, `NAME` or `NAME@VERSION`.
        output: the folder, which must not be there or be empty; it appears whole or not at all.
        num_samples: how many, the first with number 0.
        observer: told how far it is.
        label: a class by its name, or by its number where classes have no names; otherwise
            classes are drawn with the shares of the model's own training split, where an
            evaluation takes those of the reference's.
        overrides: `a.b=c` of the config; of a version, those of `evaluate` alone.
        root: the storage root of a model's name.

    Raises:
        ConfigError: an option is wrong, the training is not finished, or there is no such version.
        StorageError: the root cannot be read or the output not written.
        EvaluationError: the samples are not finite.
    """
    check_output(output)
    trained = find_trained(target, overrides, root=root)
    if trained.config.evaluate.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "evaluate.use_gpu is true, and torch finds no GPU on this machine. Add --set "
            "evaluate.use_gpu=false."
        )
    network, names = _load(trained)
    labels = _choose_labels(network, names, label, num_samples, trained.config.evaluate.seed)
    parts = []
    for start in range(0, num_samples, CHUNK):
        numbers = range(start, min(start + CHUNK, num_samples))
        some = None if labels is None else labels[numbers.start : numbers.stop]
        with full_precision():
            parts.append(draw_items(trained.config, network, numbers, some))
        fields = {"done": numbers.stop, "total": num_samples, "unit": "samples"}
        observer(Event("progress", "sample", fields))
    files = _as_files(np.concatenate(parts), labels)
    write_folder(output, files)
    return Sampled(str(output), trained.name, num_samples, sorted(files))


def _load(trained: Trained) -> tuple[Network, Sequence[str] | None]:
    """The network, and the names of the classes that it is told, if they have any."""
    config, storage, names, counts = trained.config, trained.storage, None, None
    if config.model.class_conditional:
        document = read_dataset(storage, read_step(storage, "preprocess", trained.data))
        names = document["classes"]
        counts = {str(k): count for k, count in class_counts(document, "train").items()}
    source = source_of_training(config, trained.train, counts)
    return load_network(storage, config, source).to(device_of(config)), names


def _choose_labels(
    network: Network, names: Sequence[str] | None, label: str | None, num_samples: int, seed: int
) -> Tensor | None:
    """The label of each sample, int64 [N], for a network that is told the class."""
    if network.counts is None:
        if label is not None:
            raise ConfigError(
                "--label is for a model that is told the class, and this one is not "
                "(model.class_conditional = false). Leave it out."
            )
        return None
    if label is None:
        return draw_labels(network.counts, seed, range(num_samples))
    known = [str(k) for k in network.counts] if names is None else list(names)
    if label not in known:
        listed = ", ".join(known[:LISTED]) + (", ..." if len(known) > LISTED else "")
        raise ConfigError(f"There is no class {label!r}. Those there are: {listed}.")
    return torch.full((num_samples,), known.index(label))


def _as_files(items: np.ndarray, labels: Tensor | None) -> dict[str, bytes]:
    numbers = [None] * len(items) if labels is None else labels.tolist()
    names = [f"sample {k}" for k in range(len(items))]
    files = {"samples.arrow": b"".join(write_arrow(items, numbers, names))}
    if items.dtype != np.uint8:
        return files | {"grid.png": draw_sequences(items[:GRID_SHOWN], COLUMNS)}
    files["grid.png"] = draw_grid(items[:GRID_SHOWN], COLUMNS, TILE_PX)
    return files | {f"{k:06d}.png": _encode(item) for k, item in enumerate(items)}


def _encode(item: np.ndarray) -> bytes:
    """A PNG of one image uint8 [C, H, W], pixel for pixel."""
    pixels, buffer = item.transpose(1, 2, 0), io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
