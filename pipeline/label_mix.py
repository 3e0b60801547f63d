"""The labels that samples are told: drawn with the shares of the reference's training images.

A model pins its reference, so that the mix stays though later shards bring other shares. Classes go
by name: the id of one is the business of the data set that a network was trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.dataset import class_counts, class_names, read_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.pinning import read_step
from pipeline.protocol import LABELS, MIX
from pipeline.storage import Storage
from pipeline.workflow import hash_json

SHOWN = 5  # names of classes in a sentence


def read_mix(storage: Storage, reference: Mapping[str, Any]) -> dict[str, int]:
    """Training images by the name of their class, of the data set that a reference is of.

    Args:
        storage: the root.
        reference: the manifest of that step.

    Raises:
        DataError: there are no labels.
        StorageError: the data set is gone or damaged.
    """
    document = _read_data(storage, reference)
    counts = class_counts(document, "train")
    return {name: counts[id_] for id_, name in enumerate(class_names(document)) if counts[id_]}


def mix_protocol(mix: Mapping[str, int]) -> dict[str, str]:
    """What a protocol says of a mix; that of a network that is not told the class says nothing."""
    return {MIX: hash_json(LABELS | {"counts": mix})}


def count_by_id(mix: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """A mix by the ids of a network, as text: the keys that JSON has.

    Args:
        mix: by name.
        names: of the network's classes, in the order of their ids.

    Raises:
        DataError: the network does not know a class of the mix.
    """
    if unknown := _unknown(mix, names):
        raise DataError(
            f"The reference has images of {unknown}, which the network does not know. Train it "
            "anew with these classes, or name a reference without them."
        )
    return {str(id_): mix.get(name, 0) for id_, name in enumerate(names)}


def count_for_training(
    storage: Storage,
    train: Mapping[str, Any],
    data: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> dict[str, int]:
    """The mix of a reference by the ids of a network that was trained here.

    Args:
        storage: the root.
        train: the manifest of its training.
        data: that of `preprocess`, with whose ids pictures and pages go.
        reference: that of `reference`.

    Raises:
        DataError: the data set or the reference has other classes than the network.
        StorageError: a data set is gone or damaged.
    """
    names = class_names(read_dataset(storage, data))
    known = class_names(_read_data(storage, train))
    if names != known:
        raise DataError(
            f"The network was trained on a data set of other classes ({_difference(known, names)})."
            " Give the config of that data set."
        )
    return count_by_id(read_mix(storage, reference), names)


def compare_classes(
    storage: Storage,
    data: Mapping[str, Any],
    *,
    reference: Mapping[str, Any],
    start: Mapping[str, Any] | None,
    bringing: Mapping[str, Sequence[str]],
) -> None:
    """Refuses to train a network whose classes its start or its judge does not have.

    Args:
        storage: the root.
        data: the manifest of the data set to train on.
        reference: that of the reference it is to be scored by.
        start: that of the training it is to begin with; None: with random weights.
        bringing: the labels of each new input shard, by the shard's name.

    Raises:
        ConfigError: they differ, with the shards that bring other classes.
        DataError: there are no labels.
        StorageError: a data set is gone or damaged.
    """
    names = class_names(read_dataset(storage, data))
    if start is not None and (known := class_names(_read_data(storage, start))) != names:
        added = set(names) - set(known)
        shards = [name for name, labels in bringing.items() if added & set(labels)]
        brought = f", brought by {_listed(shards)}" if shards else ""
        raise ConfigError(
            "The champion knows other classes than there are now "
            f"({_difference(known, names)}{brought}), and training cannot begin with it. Set "
            'retrain.start = "scratch", or leave such shards out: data.leave_out.'
        )
    if unknown := _unknown(read_mix(storage, reference), names):
        raise ConfigError(
            f"The pinned evaluation has samples of {unknown}, of which there are no images now. "
            "Bring those back, or train with another name."
        )


def _read_data(storage: Storage, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The data set that a training or a reference was made of."""
    key = manifest["identity"]["inputs"]["preprocess"]
    return read_dataset(storage, read_step(storage, "preprocess", key))


def _unknown(mix: Mapping[str, int], names: Sequence[str]) -> str:
    return _listed([name for name in mix if name not in names])


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    words = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
    }
    return "; ".join(f"{word}: {_listed(names)}" for word, names in words.items() if names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
