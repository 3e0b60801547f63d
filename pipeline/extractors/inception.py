"""The extractor `inception`: the network in whose features published Frechet distances are.

It is torch-fidelity's network as torchmetrics runs it: images are made 299 x 299 by antialiased
bilinear interpolation, grey ones are given three equal channels. Both libraries are optional, and
are imported only here. Their own loading is not used: it would run code that a file may hold.
"""

import importlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints import to_safetensors
from pipeline.errors import EvaluationError
from pipeline.extractor_identity import check_hash
from pipeline.extractors.naming import STANDARD_WIDTH
from pipeline.extractors.weight_files import read_state_dict
from pipeline.storage import hash_content

# Of pt_inception-2015-12-05-6726825d.pth, which torch-fidelity has as weights-inception-....pth.
STANDARD_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LIBRARY = "torch_fidelity"
OTHERWISE = "or set features.extractor = 'classifier' or 'self_supervised'."


class Inception(nn.Module):
    """Features of uint8 images [N, 1 or 3, H, W] at a layer of the Inception network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # A third faster on a CPU.
        self.network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, d]."""
        return self.network(images.expand(-1, 3, -1, -1))


class UnbiasedLogits(nn.Module):
    """The 1008 logits of the last features without their bias, for the Inception Score."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, 1008] of features [N, 2048]."""
        return features @ self.weight.T


def make_inception(
    width: int, channels: int, weights: bytes | None, sha256: str | None
) -> dict[str, Any]:
    """A task: what is told of the network, and its `weights` as a safetensors file.

    Args:
        width: number of features.
        channels: of the images.
        weights: content of the file of weights; None: the library's own, downloaded if need be.
        sha256: that the library's own must have; None: that of the standard ones.

    Raises:
        EvaluationError: the libraries or the weights cannot be had, or are not what they must be.
    """
    network_class = import_network()
    if weights is None:
        weights = read_library_weights()
        check_hash(weights, sha256 or STANDARD_SHA256, "the weights that torch-fidelity downloads")
    found = hash_content(weights)
    state = read_state_dict(weights, "features.weights")
    network = build_network(network_class, width, state)
    classifies = width == STANDARD_WIDTH
    content = to_safetensors(network.state_dict())
    return {
        "extractor": "inception",
        "channels": channels,
        "num_features": width,
        "num_classes": len(state["fc.weight"]) if classifies else None,
        "classifies": classifies,
        "train_accuracy": None,
        "validation_accuracy": None,
        "has_standard_weights": found == STANDARD_SHA256,
        "weights_sha256": found,
        "code_sha256": None,
        "weights": content,
    }


def import_network() -> Any:
    """The network's class.

    Raises:
        EvaluationError: the libraries are missing, or do not go together.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that torch-fidelity imports
            importlib.import_module(LIBRARY)
            from torchmetrics.image.fid import NoTrainInceptionV3
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EvaluationError(
            f"The Inception network cannot be imported: {first}. Install raydiffusion[inception], "
            f"with torchvision from the index that torch came from, {OTHERWISE}"
        ) from error
    return NoTrainInceptionV3


def build_network(network_class: Any, width: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with its weights, up to the layer of so many features.

    Args:
        network_class: what `import_network` gave.
        width: number of features.
        weights: by name.

    Raises:
        EvaluationError: they are not those of this network.
    """
    file = io.BytesIO()  # the class loads from a file or downloads
    torch.save(dict(weights), file)
    file.seek(0)
    try:
        return network_class("inception-v3-compat", [str(width)], file)
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or [""])[-1].strip()
        raise EvaluationError(
            f"features.weights are not those of this Inception network ({line}). Give the file "
            "pt_inception-2015-12-05-6726825d.pth, or leave features.weights out."
        ) from error


def read_library_weights() -> bytes:
    """The file that torch-fidelity uses, from where it keeps it, downloaded if it is not there.

    Raises:
        EvaluationError: it cannot be downloaded.
    """
    url = importlib.import_module(f"{LIBRARY}.feature_extractor_inceptionv3").URL_INCEPTION_V3
    path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(url).name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        return path.read_bytes()
    except OSError as error:  # URLError and HTTPError are OSErrors
        raise EvaluationError(
            f"The Inception weights cannot be had from {url} ({error}). Set features.weights to a "
            f"copy of that file, a path or URI, {OTHERWISE}"
        ) from error
