from typing import Any

import pytest

from pipeline.extractors import extractor_key, score_name


def manifest(**facts: Any) -> dict[str, Any]:
    metrics = {
        "extractor": "inception", "num_features": 2048, "has_standard_weights": True,
        "weights_sha256": "ab12cd34" + 56 * "0", "code_sha256": None,
    } | facts  # fmt: skip
    return {"metrics": metrics, "artifacts": {"extractor.safetensors": {"sha256": "f" * 64}}}


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, "fid"),
        ({"num_features": 192}, "fid[inception-192]"),
        ({"has_standard_weights": False}, "fid[inception-2048:ab12cd34]"),
        ({"has_standard_weights": False, "num_features": 64}, "fid[inception-64:ab12cd34]"),
        ({"extractor": "classifier", "num_features": 16}, "fid[classifier]"),
        # Even where a small network has as many features, and whatever it says of its weights.
        ({"extractor": "self_supervised"}, "fid[self_supervised]"),
        ({"extractor": "lib.nets:make"}, "fid[lib.nets:make]"),
    ],
)
def test_only_published_features_give_the_plain_name(facts: dict[str, Any], name: str) -> None:
    assert score_name("fid", manifest(**facts)) == name
    assert score_name("kid", manifest(**facts)) == name.replace("fid", "kid", 1)


def test_features_are_kept_apart_by_all_that_changes_them() -> None:
    other_weights = manifest()
    other_weights["artifacts"]["extractor.safetensors"]["sha256"] = "0" * 64
    found = [
        extractor_key(m)
        for m in (
            manifest(), manifest(num_features=192), manifest(code_sha256="1"),
            manifest(extractor="classifier"), other_weights,
        )
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert extractor_key(manifest(validation_accuracy=0.5)) == found[0]
