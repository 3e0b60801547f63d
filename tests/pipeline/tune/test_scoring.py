"""What the score of a trial is a mean of, and whose noise it is drawn with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_core.bound import variational_bound
from pipeline.config import load_config
from pipeline.dataset import open_split
from pipeline.loader import keyed_seed
from pipeline.models import make_diffusion, make_unet
from pipeline.scores.frechet import FeatureSums, sum_features
from pipeline.storage import LocalStorage
from pipeline.tune import scoring
from pipeline.tune.scoring import open_score
from pipeline.validation import choose_items


def test_the_bound_is_the_mean_over_the_chosen_images_told_their_labels(
    tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> None:
    settings = [
        "tune.metric=bits_per_dim", "tune.num_samples=70", "model.class_conditional=true",
        "diffusion.num_train_timesteps=8", "evaluate.num_steps=2", "evaluate.seed=3",
        "evaluate.clip_x_start=false",
    ]  # fmt: skip
    config, storage = load_config(tiny_config, settings), LocalStorage(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (103, 1, 8, 8), np.uint8)
    labels = [k % 3 for k in range(103)]
    data = write_data_set(storage, pixels, labels, num_validation=100)
    model = make_unet(config, 0, 3).eval()
    with torch.no_grad():  # a new one puts out zeros
        model.final_conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    with open_score(config, storage, {"preprocess": data}) as score:
        value, _ = score(model)
    items, chosen = open_split(storage, data, "validation"), choose_items(100, 70)
    bits = []
    for start in (0, 64):
        ids = chosen[start : start + 64]
        bound = variational_bound(
            make_diffusion(config, 3),
            model,
            torch.from_numpy(items.gather(ids)) / 127.5 - 1,
            class_labels=torch.from_numpy(items.labels_of(ids)),
            clip_x_start=False,
            generator=torch.Generator().manual_seed(keyed_seed("bound", 3, start)),
        )
        bits += bound.total.tolist()
    assert len(bits) == 70
    assert value == pytest.approx(np.mean(bits), rel=1e-5)


def test_samples_of_a_trial_come_after_those_of_the_final_score(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, ["tune.num_samples=64", "evaluate.num_samples=200"])
    features = np.random.default_rng(0).normal(size=(64, 4))
    asked: list[Any] = []

    def draw(*arguments: Any) -> Iterator[Any]:
        asked.append(arguments[3:])
        yield np.zeros((64, 1, 8, 8), np.uint8), features

    def read_sums(content: bytes, split: str) -> FeatureSums:
        assert split == "validation"
        return sum_features(features)

    monkeypatch.setattr(scoring, "iter_drawn", draw)
    monkeypatch.setattr(scoring, "read_sums", read_sums)
    monkeypatch.setattr(scoring, "read_artifact", lambda *_: b"")
    monkeypatch.setattr(scoring, "load_extractor", lambda *_: torch.nn.Identity())
    inputs: Any = {"features": {}, "reference": {}}
    with open_score(config, LocalStorage(str(tmp_path)), inputs) as score:
        value, _ = score(make_unet(config, 0))
    assert asked == [(64, 200)]
    assert value == pytest.approx(0, abs=1e-6)
