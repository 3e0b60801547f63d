"""What may be evaluated in place of a config's training. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import absolute_source
from pipeline.errors import ConfigError
from pipeline.settings import Config, DataConfig
from pipeline.sources import InputShard, list_inputs
from pipeline.storage import open_storage


@dataclass(frozen=True)
class GivenModel:
    """A model made elsewhere, copied into the storage root under the hash of its content.

    Args:
        key: the hash.
        path: what it was copied from.
        class_conditional: whether it is told the class.
    """

    key: str
    path: Path | None = field(default=None, compare=False)
    class_conditional: bool = False


@dataclass(frozen=True)
class Rescored:
    """The config's training once more, for a protocol that its own score does not have.

    Args:
        program: the fields of the protocol that no setting determines.
    """

    program: tuple[tuple[str, str | int], ...]


@dataclass(frozen=True)
class GivenImages:
    """Images in place of samples.

    Args:
        sources: where they are.
        shards: that they make.
        converts: whether they may be brought to the data set's size and colours.
    """

    sources: tuple[str, ...]
    shards: tuple[InputShard, ...]
    converts: bool = False


Subject = GivenModel | GivenImages | Rescored


def find_subject(
    config: Config, *, checkpoint: Path | None, images: Sequence[str], converts: bool = False
) -> Subject | None:
    """What a command wants evaluated in place of the config's training; None where nothing else.

    Args:
        config: the whole config.
        checkpoint: a model folder, or a checkpoint of another library.
        images: patterns, as those of `data.sources`.
        converts: whether images of another size or with other channels are taken.

    Raises:
        ConfigError: both are given.
        DataError: there is no such thing, or it does not suit the data set.
        StorageError: the root cannot be written.
    """
    if checkpoint is not None and images:
        raise ConfigError("--checkpoint and --images name two things to evaluate. Give one.")
    storage = open_storage(config.storage.root)
    if checkpoint is not None:
        from pipeline.subjects import import_model  # torch: only here

        return import_model(checkpoint, config, storage)
    if not images:
        return None
    data = data_of_images(config, [absolute_source(source, Path.cwd()) for source in images])
    shards = tuple(list_inputs(data, storage).shards)
    if not converts:
        from pipeline.given_images import check_images

        check_images(shards, config.data)
    return GivenImages(data.sources, shards, converts)


def data_of_images(config: Config, sources: Sequence[str]) -> DataConfig:
    """The data set's own transform, over other sources, with all items in one split."""
    changed = {
        "sources": tuple(sources),
        "leave_out": (),
        "validation_fraction": 0.0,
        "test_fraction": 0.0,
        "include_labels": (),
        "require_labels": False,
        "drop_duplicates": False,
        "min_resolution_px": 1,
    }
    return config.data.model_copy(update=changed)
