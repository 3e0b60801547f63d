"""Running an extractor: batches, and what is refused of what it returns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import EvaluationError, StorageError
from pipeline.extractors import Extractor, extract, load_extractor
from pipeline.extractors.small import SmallNetwork
from pipeline.extractors.training import make_facts
from pipeline.storage import LocalStorage


class Calls(nn.Module):
    """Applies a function, and remembers how many items each call had."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function, self.counts = function, list[int]()

    def forward(self, items: Tensor) -> Any:
        self.counts.append(len(items))
        return self.function(items)


IMAGES = np.random.default_rng(0).integers(0, 256, (600, 1, 2, 2), np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batches_are_256_items_and_features_float32(dtype: torch.dtype) -> None:
    network = Calls(lambda items: items.flatten(1).to(dtype))
    found = extract(Extractor("x", network, 4), IMAGES)
    assert network.counts == [256, 256, 88]
    assert found.dtype == np.float32
    assert np.array_equal(found, IMAGES.reshape(600, 4))
    assert np.array_equal(extract(network, IMAGES), found)  # a bare module, its width unknown


def test_no_items_are_no_features() -> None:
    network = Calls(lambda items: items.flatten(1))
    assert extract(Extractor("x", network, 4), IMAGES[:0]).shape == (0, 4)
    assert network.counts == []


def test_items_that_cannot_be_written_are_read() -> None:
    items = IMAGES.copy()
    items.flags.writeable = False  # as those of a memory map
    extractor = Extractor("x", Calls(lambda batch: batch.flatten(1)), 4)
    assert np.array_equal(extract(extractor, items), IMAGES.reshape(600, 4))


def test_no_gradients_are_kept() -> None:
    class Checked(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(input.float().flatten(1))

    assert extract(Extractor("x", Checked(4, 2), 2), IMAGES).shape == (600, 2)


def _not_a_number(items: Tensor) -> Tensor:
    features = items.flatten(1).float()
    features[-1, 0] = float("nan")
    return features


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_not_a_number, r"x returns features that are not finite"),
        (lambda items: items, r"x returns \[256, 1, 2, 2\]\. Have it return"),
        (lambda items: items.flatten(), r"x returns \[1024\]\. Have it return"),
        (lambda items: items.flatten(1)[:, :3], r"x returns \[256, 3\] for 256 items, .* \[256, 4"),
        (lambda items: items.flatten(1)[1:], r"x returns \[255, 4\] for 256 items"),
        (lambda items: items.reshape(7, -1), r"x fails on torch\.uint8 \[256, 1, 2, 2\]"),
        (lambda items: None, r"x fails on torch\.uint8 .*AttributeError"),
    ],
)
def test_what_is_no_features_is_refused_by_name(
    function: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=f"The extractor {message}"):
        extract(Extractor("x", Calls(function), 4), IMAGES)


@pytest.mark.parametrize("num_classes", [10, None])
def test_a_small_network_is_the_same_when_it_is_loaded(
    keep_extractor: Callable[..., Any], tmp_path: Path, num_classes: int | None
) -> None:
    torch.manual_seed(0)
    network = SmallNetwork(1, 5, num_classes).eval()
    manifest = keep_extractor(make_facts("classifier", network, [(1.0, 0.1), (1.0, 0.1)], 1))
    loaded = load_extractor(LocalStorage(str(tmp_path)), manifest)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert not loaded.training
    images = torch.from_numpy(IMAGES[:7])
    assert torch.equal(loaded(images), network(images))
    if num_classes is None:
        assert loaded.head is None
    else:
        assert loaded.head is not None
        assert torch.equal(loaded.head(loaded(images)), network.head(network(images)))
    assert manifest["metrics"]["classifies"] == (num_classes is not None)
    assert manifest["metrics"]["num_classes"] == num_classes


def test_damaged_weights_are_refused(keep_extractor: Callable[..., Any], tmp_path: Path) -> None:
    facts = make_facts("classifier", SmallNetwork(1, 5, 3), [(1.0, 0.1), (1.0, 0.1)], 1)
    manifest = keep_extractor(facts)
    path = tmp_path / "steps" / "features" / "k" / "w"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match="not what its manifest says"):
        load_extractor(LocalStorage(str(tmp_path)), manifest)
