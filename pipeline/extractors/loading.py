"""Loading an extractor that the step `features` has kept, and running it over many items."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.errors import EvaluationError
from pipeline.extractors import inception, own
from pipeline.extractors.naming import ARTIFACT
from pipeline.extractors.small import SmallNetwork
from pipeline.storage import Storage
from pipeline.workflow import read_artifact

BATCH = 256  # items in a forward pass


class Extractor(nn.Module):
    """A network that gives features, with its name, and its `head` where it classifies.

    Args:
        name: of the extractor, for errors.
        network: called with uint8 images [N, C, H, W] or float32 sequences [N, C, L].
        num_features: that it returns for each.
        head: features to logits [N, classes], where it classifies.
    """

    def __init__(
        self, name: str, network: nn.Module, num_features: int, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.name, self.num_features = name, num_features
        self.network, self.head = network, head

    def forward(self, items: Tensor) -> Tensor:
        """Features float32 [N, d]."""
        return self.network(items).float()


def load_extractor(storage: Storage, features: Mapping[str, Any]) -> Extractor:
    """The extractor in eval mode.

    Args:
        storage: the root.
        features: the manifest of the step `features`.

    Raises:
        EvaluationError: it cannot be made here, or its code is not what it was.
        StorageError: the weights are missing or damaged.
    """
    facts = features["metrics"]
    name, num_features = facts["extractor"], facts["num_features"]
    weights = safetensors.torch.load(read_artifact(storage, features, ARTIFACT))
    head = None
    if name == "inception":
        network_class = inception.import_network()
        network = inception.Inception(inception.build_network(network_class, num_features, weights))
        if facts["classifies"]:
            head = inception.UnbiasedLogits(weights["fc.weight"])
    elif ":" in name:
        network = own.load_own(name, facts["code_sha256"], weights)
    else:
        network = SmallNetwork(facts["channels"], num_features, facts["num_classes"])
        network.load_state_dict(weights)
        head = network.head if facts["classifies"] else None
    return Extractor(name, network, num_features, head).eval().requires_grad_(False)


@torch.inference_mode()
def extract(extractor: nn.Module, items: np.ndarray) -> np.ndarray:
    """Features float32 [N, d], in batches of 256.

    Args:
        extractor: what `load_extractor` gave.
        items: uint8 [N, C, H, W] or float32 [N, C, L].

    Raises:
        EvaluationError: what it returns are no features, or not finite.
    """
    name = getattr(extractor, "name", type(extractor).__name__)
    tensors = itertools.chain(extractor.parameters(), extractor.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    num_features = int(getattr(extractor, "num_features", 0))
    found = np.empty((len(items), num_features), np.float32)
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        if not batch.flags.writeable:  # memory-mapped, which torch does not take without a warning
            batch = batch.copy()
        features = _call(name, extractor, torch.from_numpy(batch).to(device))
        if start == 0 and not num_features:
            found = np.empty((len(items), features.shape[1]), np.float32)
        if features.shape != (len(batch), found.shape[1]):
            raise EvaluationError(
                f"The extractor {name} returns {list(features.shape)} for {len(batch)} items, "
                f"where it must be {[len(batch), found.shape[1]]}. Have it return features [N, d], "
                "always as many."
            )
        if not bool(torch.isfinite(features).all()):
            raise EvaluationError(
                f"The extractor {name} returns features that are not finite. Check its weights, "
                "and its arithmetic on images that are all black or white."
            )
        found[start : start + len(batch)] = features.float().cpu().numpy()
    return found


def _call(name: str, extractor: nn.Module, batch: Tensor) -> Tensor:
    try:
        features = extractor(batch)
    except Exception as error:  # the user's code may raise anything
        raise EvaluationError(
            f"The extractor {name} fails on {batch.dtype} {list(batch.shape)}: "
            f"{type(error).__name__}: {error}. See that these are the items that it was made for."
        ) from error
    if features.ndim != 2:
        raise EvaluationError(
            f"The extractor {name} returns {list(features.shape)}. Have it return features [N, d]."
        )
    return features
