"""An extractor of the user's: a module that a factory of theirs makes, `package.module:factory`.

The factory is called with nothing. The module is called with uint8 images [N, C, H, W] or float32
sequences [N, C, L] and returns features [N, d]. Its weights are kept by the step `features` and
loaded into what the factory makes on every node; its file of code must be the same there.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints import to_safetensors
from pipeline.errors import EvaluationError
from pipeline.extractor_identity import hash_code
from pipeline.extractors.weight_files import read_state_dict
from pipeline.loader import keyed_seed
from pipeline.storage import hash_content


def make_own(
    extractor: str, shape: Sequence[int], width: int | None, weights: bytes | None, seed: int
) -> dict[str, Any]:
    """A task: what is told of the module, and its `weights` as a safetensors file.

    Args:
        extractor: `package.module:factory`.
        shape: of an item, [C, H, W] uint8 or [C, L] float32.
        width: number of features that it must have; None: any.
        weights: content of a file to load into it; None: it is taken as the factory makes it.
        seed: of the weights that the factory draws.

    Raises:
        EvaluationError: it cannot be made, or its features are not what they must be.
    """
    module = call_factory(extractor, seed)
    dtype = torch.uint8 if len(shape) == 3 else torch.float32
    num_features = _probe(extractor, module, torch.zeros((2, *shape), dtype=dtype))
    if width not in (None, num_features):
        raise EvaluationError(
            f"The extractor {extractor} returns {num_features} features, and features.width is "
            f"{width}. Make them equal, or leave features.width out."
        )
    if weights is not None:
        load_weights(extractor, module, read_state_dict(weights, "features.weights"))
    state = module.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise EvaluationError(
            f"The extractor {extractor} has {others[0]} in its state_dict, which is no tensor and "
            "could not be kept. Leave it out."
        )
    # Copies: what several names share is kept under each.
    content = to_safetensors({name: value.clone() for name, value in state.items()})
    return {
        "extractor": extractor,
        "channels": shape[0],
        "num_features": num_features,
        "num_classes": None,
        "classifies": False,
        "train_accuracy": None,
        "validation_accuracy": None,
        "has_standard_weights": False,
        "weights_sha256": hash_content(content if weights is None else weights),
        "code_sha256": hash_code(extractor),
        "weights": content,
    }


def call_factory(extractor: str, seed: int = 0) -> nn.Module:
    """What the factory makes, in eval mode.

    Args:
        extractor: `package.module:factory`.
        seed: of the weights that it draws.

    Raises:
        EvaluationError: it cannot be imported, fails, or makes something else.
    """
    module_name, _, name = extractor.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed("extractor", seed))
            module = factory()
    except Exception as error:  # the user's code may raise anything
        raise EvaluationError(
            f"The extractor {extractor} cannot be made: {type(error).__name__}: {error}. See that "
            f"{module_name} can be imported on every node and that {name}() returns a module."
        ) from error
    if not isinstance(module, nn.Module):
        raise EvaluationError(
            f"The extractor {extractor} is a {type(module).__name__}. Have {name}() return a "
            "torch.nn.Module."
        )
    return module.eval()


def load_own(extractor: str, code_sha256: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The module with the weights that were kept.

    Args:
        extractor: `package.module:factory`.
        code_sha256: of its file of code when they were kept.
        weights: by name.

    Raises:
        EvaluationError: its code here is another, or it cannot be made.
    """
    if hash_code(extractor) != code_sha256:
        raise EvaluationError(
            f"The code of the extractor {extractor} is not that of the features: its file has "
            "changed, or differs between nodes. Bring all nodes to one version and run again."
        )
    module = call_factory(extractor)
    load_weights(extractor, module, weights)
    return module


def load_weights(extractor: str, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads weights into a module, each that it has and no other.

    Args:
        extractor: names it in the error.
        module: to load into.
        weights: by name.

    Raises:
        EvaluationError: they do not fit.
    """
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1].strip()
        raise EvaluationError(
            f"The weights do not fit the extractor {extractor} ({line}). Give those of the module "
            "that its factory makes."
        ) from error


@torch.inference_mode()
def _probe(extractor: str, module: nn.Module, items: Tensor) -> int:
    """The number of features, which must be what the module itself says, if it does."""
    try:
        found = module(items)
        shape = tuple(found.shape)
    except Exception as error:  # the user's code may raise anything
        raise EvaluationError(
            f"The extractor {extractor} fails on {items.dtype} {tuple(items.shape)}: "
            f"{type(error).__name__}: {error}. Have it take that and return features [N, d]."
        ) from error
    said = getattr(module, "num_features", None)
    if len(shape) != 2 or shape[0] != len(items) or (said is not None and int(said) != shape[1]):
        also = f", and its num_features is {int(said)}" if said is not None else ""
        raise EvaluationError(
            f"The extractor {extractor} returns {shape} for {len(items)} items{also}. Have it "
            "return features [N, d]."
        )
    return shape[1]
