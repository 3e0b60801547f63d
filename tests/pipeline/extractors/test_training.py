"""What small networks learn, and when they are too poor to be extractors."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError, EvaluationError
from pipeline.extractors.classifier import check_labels, count_classes
from pipeline.extractors.self_supervised import train_self_supervised
from pipeline.extractors.small import SmallNetwork
from pipeline.extractors.training import check_accuracy, draw_ids, measure_accuracy, train_network
from pipeline.settings import DataConfig, FeaturesConfig
from pipeline.storage import LocalStorage

DATA = DataConfig(sources=("x",), resolution=4, mode="L").model_dump_json()


def _slopes(count: int) -> np.ndarray:
    """Images that are dark above and bright below."""
    rng = np.random.default_rng(0)
    rows = np.linspace(20, 235, 4)[None, None, :, None]
    return (rows + rng.normal(0, 15, (count, 1, 4, 4))).clip(0, 255).astype(np.uint8)


def _train(write: Callable[..., Any], root: Path, images: np.ndarray) -> dict[str, Any]:
    storage = LocalStorage(str(root))
    manifest = write(storage, images, num_validation=40)
    config = FeaturesConfig(extractor="self_supervised", width=4, num_steps=40, batch_size=32)
    return train_self_supervised(storage.uri, manifest, config.model_dump_json(), DATA)


def test_which_way_up_images_are_is_learned_without_labels(
    write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    facts = _train(write_data_set, tmp_path, _slopes(200))
    assert facts["validation_accuracy"] > 0.95
    assert facts["guessing_accuracy"] == 0.25
    assert (facts["num_classes"], facts["classifies"]) == (None, False)
    check_accuracy(facts, "x.")
    assert facts == _train(write_data_set, tmp_path, _slopes(200))


def test_images_that_look_the_same_from_all_sides_make_no_extractor(
    write_data_set: Callable[..., Any], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 1, 1), np.uint8)
    facts = _train(write_data_set, tmp_path, images.repeat(4, 2).repeat(4, 3))
    assert facts["validation_accuracy"] == pytest.approx(0.25)
    with pytest.raises(EvaluationError, match=r"is right for 25\.0% .* where 62\.5% are needed"):
        check_accuracy(facts, "x.")


@pytest.mark.parametrize(
    ("accuracy", "guessing", "is_enough"),
    [(0.55, 0.1, True), (0.54, 0.1, False), (0.95, 0.9, True), (0.94, 0.9, False), (1, 1, True)],
)
def test_half_of_the_errors_of_guessing_are_the_limit(
    accuracy: float, guessing: float, is_enough: bool
) -> None:
    facts = {
        "extractor": "classifier",
        "validation_accuracy": accuracy,
        "guessing_accuracy": guessing,
    }
    if is_enough:
        check_accuracy(facts, "or else.")
        return
    with pytest.raises(EvaluationError, match=r"Raise features\.num_steps .*, or else\.$"):
        check_accuracy(facts, "or else.")


def test_accuracy_counts_what_has_a_label() -> None:
    network = SmallNetwork(1, 2, 3)
    with torch.no_grad():
        head = dict(network.head.named_parameters())
        head["1.weight"].zero_()
        head["1.bias"].copy_(torch.tensor([0.0, 1.0, 0.0]))  # always says 1
    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    batches = [(images, torch.tensor([1, 2, 2, -1])), (images, torch.tensor([1, 2, 2, 0]))]
    assert measure_accuracy(network, iter(batches)) == (2 / 7, 4 / 7)
    assert measure_accuracy(network, iter([(images, torch.full((4,), -1))])) == (0, 0)
    found = [measure_accuracy(network, iter(order)) for order in itertools.permutations(batches)]
    assert found[0] == found[1]


def test_classes_are_counted_by_what_is_trained_on_and_chosen_by() -> None:
    labels: dict[str, Any] = {"train": {"0": 3, "4": 1}, "validation": {"6": 1}, "test": {"9": 2}}
    assert count_classes({"labels": labels, "classes": None}) == 7
    names = {"train": {"cat": 3}, "validation": {"dog": 1}, "test": {"eel": 2}}
    assert count_classes({"labels": names, "classes": ["cat", "dog", "eel"]}) == 2


@pytest.mark.parametrize(("labels", "unlabelled"), [({}, 9), ({"0": 8}, 0), ({"0": 4, "1": 4}, 1)])
def test_a_classifier_needs_labels(labels: dict[str, int], unlabelled: int) -> None:
    data = {"metrics": {"labels": labels, "unlabelled": unlabelled}}
    with pytest.raises(DataError, match=r"set features\.extractor = 'self_supervised'"):
        check_labels(data)
    check_labels({"metrics": {"labels": {"0": 4, "1": 4}, "unlabelled": 0}})


class Some:
    """As many items, in two shards; they are not read."""

    counts = (40, 24)

    def __len__(self) -> int:
        return 64

    def prefetch(self, uses: Any) -> None: ...


@pytest.mark.parametrize("window", [None, 16])
def test_each_step_learns_from_the_images_that_come_next(window: int | None) -> None:
    items: Any = Some()
    config = FeaturesConfig(num_steps=4, batch_size=16)
    ids = list(draw_ids(config, items, window, 16))
    assert sorted(np.concatenate(ids).tolist()) == list(range(64))
    other = list(draw_ids(config.model_copy(update={"seed": 1}), items, window, 16))
    assert np.concatenate(other).tolist() != np.concatenate(ids).tolist()


def test_another_seed_begins_with_other_weights() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        config = FeaturesConfig(width=4, num_steps=1, seed=seed)
        network = train_network("x", config, 1, 3, iter(()))
        return next(network.parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))
