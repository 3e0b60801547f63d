"""What a score is called, and what tells one extractor from another."""

from collections.abc import Mapping
from typing import Any

from pipeline.workflow import hash_json

ARTIFACT = "extractor.safetensors"  # of the step `features`
STANDARD_WIDTH = 2048  # of the features in which published Frechet distances are
VERSION = 1  # raise when an extractor with the same weights gives other features


def score_name(prefix: str, features: Mapping[str, Any]) -> str:
    """The name of a score: `fid` alone is in standard Inception features, of published work.

    In others it is `fid[classifier]`, `fid[inception-192]`, `fid[package.module:factory]`, or
    `fid[inception-2048:ab12cd34]` with the beginning of the hash of weights that are not standard.

    Args:
        prefix: `fid`, `kid`.
        features: the manifest of the step `features`.
    """
    facts = features["metrics"]
    name, width = facts["extractor"], facts["num_features"]
    if name != "inception":
        return f"{prefix}[{name}]"
    if not facts["has_standard_weights"]:
        return f"{prefix}[inception-{width}:{facts['weights_sha256'][:8]}]"
    return prefix if width == STANDARD_WIDTH else f"{prefix}[inception-{width}]"


def extractor_key(features: Mapping[str, Any]) -> str:
    """The same for extractors that give the same features: 32 hex digits.

    Args:
        features: the manifest of the step `features`.
    """
    facts = features["metrics"]
    return hash_json(
        {
            "version": VERSION,
            "extractor": facts["extractor"],
            "num_features": facts["num_features"],
            "weights": features["artifacts"][ARTIFACT]["sha256"],
            "code": facts["code_sha256"],
        }
    )
