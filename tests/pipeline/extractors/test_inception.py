"""The Inception extractor without its libraries; with them: docs/extractors.md."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import EvaluationError
from pipeline.extractors import extract, inception, load_extractor
from pipeline.storage import LocalStorage, hash_content

HAS_LIBRARY = importlib.util.find_spec("torch_fidelity") is not None


class Stand(nn.Module):
    """Takes weights and images as the library's network does: uint8, three channels, one width."""

    def __init__(self, name: str, features_list: list[str], file: Any) -> None:
        super().__init__()
        assert name == "inception-v3-compat"
        self.width = int(features_list[0])
        self.fc = nn.Linear(2048, 1008)
        self.load_state_dict(torch.load(file, weights_only=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return images.float().mean((2, 3)).repeat(1, self.width)[:, : self.width]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: Any) -> bytes:
    """Of a network in the place of the library's."""
    monkeypatch.setattr(inception, "import_network", lambda: Stand)
    torch.save(nn.ModuleDict({"fc": nn.Linear(2048, 1008)}).state_dict(), tmp_path / "w.pth")
    return (tmp_path / "w.pth").read_bytes()


@pytest.mark.skipif(HAS_LIBRARY, reason="torch-fidelity is installed")
def test_without_the_library_the_error_says_what_to_install() -> None:
    with pytest.raises(EvaluationError, match="cannot be imported") as caught:
        inception.make_inception(2048, 1, None, None)
    text = str(caught.value)
    assert "No module named 'torch_fidelity'" in text
    assert "Install raydiffusion[inception]" in text
    assert "features.extractor = 'classifier'" in text


def test_a_library_that_does_not_go_with_torch_is_told_too(monkeypatch: Any) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr(inception.importlib, "import_module", fail)
    with pytest.raises(EvaluationError, match=r"torchvision::nms does not exist\. Install"):
        inception.import_network()


@pytest.mark.parametrize("width", [64, 192, 768, 2048])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_are_shown_as_three_equal_channels(
    weights: bytes, keep_extractor: Callable[..., Any], tmp_path: Path, width: int, channels: int
) -> None:
    facts = inception.make_inception(width, channels, weights, None)
    assert (facts["num_features"], facts["channels"]) == (width, channels)
    assert not facts["has_standard_weights"]
    assert facts["weights_sha256"] == hash_content(weights)  # of the file, which users can compare
    extractor = load_extractor(LocalStorage(str(tmp_path)), keep_extractor(facts))
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 4, 4), np.uint8)
    found = extract(extractor, images)
    means = images.mean((2, 3)).repeat(3 // channels, axis=1)
    assert found[:, :3] == pytest.approx(means, rel=1e-5)
    assert found.shape == (5, width)
    assert facts["classifies"] == (extractor.head is not None) == (width == 2048)


def test_logits_have_no_bias(
    weights: bytes, keep_extractor: Callable[..., Any], tmp_path: Path
) -> None:
    facts = inception.make_inception(2048, 3, weights, None)
    assert facts["num_classes"] == 1008
    extractor = load_extractor(LocalStorage(str(tmp_path)), keep_extractor(facts))
    assert extractor.head is not None
    assert torch.equal(extractor.head(torch.zeros(1, 2048)), torch.zeros(1, 1008))
    assert extractor.head(torch.ones(2, 2048)).shape == (2, 1008)


def test_weights_of_something_else_are_refused(weights: bytes, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "w.pth")
    message = r"features\.weights are not those of this Inception network"
    with pytest.raises(EvaluationError, match=message):
        inception.make_inception(2048, 3, (tmp_path / "w.pth").read_bytes(), None)


def test_what_the_library_would_download_must_have_its_hash(
    weights: bytes, monkeypatch: Any
) -> None:
    monkeypatch.setattr(inception, "read_library_weights", lambda: weights)
    with pytest.raises(EvaluationError, match=f"where it must be {inception.STANDARD_SHA256}"):
        inception.make_inception(2048, 3, None, None)
    with pytest.raises(EvaluationError, match=f"where it must be {'0' * 64}"):
        inception.make_inception(2048, 3, None, "0" * 64)
    monkeypatch.setattr(inception, "STANDARD_SHA256", hash_content(weights))
    assert inception.make_inception(2048, 3, None, None)["has_standard_weights"]


def test_weights_that_cannot_be_downloaded_are_told_with_what_to_do(
    tmp_path: Path, monkeypatch: Any
) -> None:
    class Library:
        URL_INCEPTION_V3 = f"file://{tmp_path}/nowhere/weights-inception.pth"

    monkeypatch.setattr(inception.importlib, "import_module", lambda name: Library)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(EvaluationError, match=r"cannot be had from file.*Set features\.weights"):
        inception.read_library_weights()
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "weights-inception.pth").write_bytes(b"abc")
    assert inception.read_library_weights() == b"abc"
    (tmp_path / "nowhere" / "weights-inception.pth").unlink()
    assert inception.read_library_weights() == b"abc"  # from where the library keeps it
