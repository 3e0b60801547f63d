"""The page of an evaluation: with classes, with sequences, and where scores are missing."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipeline.config import load_config
from pipeline.report.page import _config_text, report_evaluation

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (64, 1, 8, 8), np.uint8)
SEQUENCES = RNG.normal(size=(64, 2, 16)).astype(np.float32)
SCORE: dict[str, Any] = {
    "metric": "fid[classifier]", "value": 12.0, "floor": 6.5, "ceiling": 228.2,
    "unbiased": {
        "metric": "fid_unbiased[classifier]", "value": 7.0, "low": 4.0, "high": 10.0,
        "level": 0.95, "is_reference_fixed": True,
    },
    "kid": {"metric": "kid[classifier]", "value": 0.0123, "error": 0.001},
    "inception_score": {"metric": "inception_score[classifier]", "value": 8.765},
    "precision_recall": {
        "metrics": ["precision[classifier]", "recall[classifier]"],
        "precision": 0.912, "recall": 0.834, "count": 297,
    },
    "copies": {
        "share": 0.031, "held_out_share": 0.029, "is_memorising": False,
        "median_distance": 0.2, "held_out_median_distance": 0.21,
    },
    "degenerate": {"count": 640, "constant": 0, "black": 0},
    "sweeps": None,
    "protocol": {"num_samples": 640, "reference_count": 297, "shape": [2, 16], "seed": None},
}  # fmt: skip
NO_SCORES = ("ceiling", "unbiased", "kid", "inception_score", "precision_recall", "copies")
DATA: dict[str, Any] = {
    "counts": {"train": 900, "validation": 90, "test": 297}, "shape": [1, 8, 8], "dtype": "uint8",
    "labels": {str(k): 75 for k in range(12)}, "unlabelled": 0, "channel_mean": [100.0],
    "channel_std": [50.0], "num_input_shards": 3, "num_shards": 3, "bytes": 10_000,
    "left_out": {}, "animated": 0, "refused": 0, "refused_by_reason": {},
}  # fmt: skip
CLASSIFIER = {
    "extractor": "classifier", "num_features": 16, "validation_accuracy": 0.97,
    "has_standard_weights": False,
}  # fmt: skip


@pytest.fixture
def page(tiny_config: Path) -> Callable[..., str]:
    """The text of the page of these results."""
    config = load_config(tiny_config)

    def make(
        pictures: dict[str, np.ndarray],
        score: dict[str, Any] = SCORE,
        data: dict[str, Any] = DATA,
        features: dict[str, Any] = CLASSIFIER,
        **more: dict[str, Any],
    ) -> str:
        written: dict[str, bytes] = {}
        metrics = {"preprocess": data, "features": features, "evaluate": score, **more}
        step = {"seconds": 1.0, "key": "k", "versions": {"torch": "2"}, "host": {"cpus": 2}}
        context: Any = SimpleNamespace(
            config=config,
            inputs={name: step | {"metrics": found} for name, found in metrics.items()},
            planned=SimpleNamespace(step=SimpleNamespace(settings={"title": "theirs"})),
            read_input=lambda step, name: safetensors.numpy.save(pictures),
            write_artifact=lambda name, content: written.update({name: content}),
        )
        report_evaluation(context)
        return re.sub(r"\s+", " ", written["report.html"].decode())

    return make


def test_every_score_stands_under_its_name_with_classes(page: Callable[..., str]) -> None:
    by_class = {f"class-{label}": IMAGES[:8] for label in range(10)}
    text = page({"samples": IMAGES, "real": IMAGES, **by_class})
    for name in ("fid_unbiased", "kid", "inception_score", "precision", "recall"):
        assert f'<th scope="row">{name}[classifier]</th>' in text
    assert "the first 10 of 12 classes" in text
    assert re.findall(r"<figcaption>class (\d+)<", text) == [str(k) for k in range(10)]


def test_scores_that_there_are_none_of_are_said_or_left_out(page: Callable[..., str]) -> None:
    own = {
        "extractor": "mine:make", "num_features": 7, "validation_accuracy": None,
        "has_standard_weights": False,
    }  # fmt: skip
    score = SCORE | dict.fromkeys(NO_SCORES) | {"metric": "fid[mine:make]"}
    text = page({"samples": IMAGES[:5], "real": IMAGES}, score, features=own)
    assert text.count("too few samples to tell") == text.count("too few images to tell") == 1
    assert "The features are the 7 of mine:make" in text
    for missing in ("kid[", "precision[", "the ceiling", "Samples by class", "Copies?"):
        assert missing not in text
    assert "the first 5, not chosen" in text


def test_sequences_are_drawn_and_called_so(page: Callable[..., str]) -> None:
    data = DATA | {"shape": [2, 16], "dtype": "float32", "channel_mean": [0.01234, -0.5],
                   "channel_std": [1.0, 1.0]}  # fmt: skip
    strips = {"noising": SEQUENCES[:10], "denoising": SEQUENCES[:10]}
    copies = {"copied": SEQUENCES[:8], "neighbours": np.repeat(SEQUENCES[:8, None], 5, axis=1)}
    text = page({"samples": SEQUENCES, "real": SEQUENCES, **strips, **copies}, data=data)
    assert '<th scope="row">sequences</th><td>900 train' in text
    assert "2 x 16, float32" in text
    assert "0.01234, -0.5" in text
    assert text.count("<img src=") == 5


def test_images_that_were_given_and_refused_are_counted(page: Callable[..., str]) -> None:
    given = DATA | {
        "counts": {"train": 640, "validation": 0, "test": 0},
        "refused": 3,
        "refused_by_reason": {"truncated": 2, "not_an_image": 1},
    }
    text = page({"samples": IMAGES, "real": IMAGES}, images=given)
    assert "643, of which 3 were refused" in text
    assert '<th scope="row">truncated</th><td class="n">2</td>' in text
    assert "given images" not in page({"samples": IMAGES, "real": IMAGES})


def test_the_config_on_a_page_is_toml() -> None:
    config = {
        "name": "m",
        "none": None,
        "tune": {
            "vary": {"train.learning_rate": {"low": 1e-5, "high": 1.0, "step": None}, "x": {}},
            "values": [{"a": "\U0001f600 \u00e9"}, [1, 2.5, True]],
        },
        "data": {"sources": ["a [b].tar"], "shard": None},
    }
    assert tomllib.loads(_config_text(config)) == {
        "name": "m",
        "tune": {
            "vary": {"train.learning_rate": {"low": 1e-5, "high": 1.0}, "x": {}},
            "values": [{"a": "\U0001f600 \u00e9"}, [1, 2.5, True]],
        },
        "data": {"sources": ["a [b].tar"]},
    }
