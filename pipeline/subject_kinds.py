"""What may be evaluated in place of a config's training. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.settings import Config, DataConfig
from pipeline.sources import InputShard


@dataclass(frozen=True)
class GivenModel:
    """A model made elsewhere, copied into the storage root under the hash of its content."""

    key: str
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
