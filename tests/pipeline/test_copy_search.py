"""Copies that are planted are found, with the training images they are of."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import copy_search
from pipeline.config import load_config
from pipeline.copy_search import _search, find_copies
from pipeline.dataset import open_split
from pipeline.storage import LocalStorage


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_planted_copies_are_found_and_shown(
    tmp_path: Path,
    write_data_set: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    is_mirrored: bool,
) -> None:
    monkeypatch.setattr(copy_search, "READ_AT_ONCE", 100)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (700, 1, 8, 8), np.uint8)
    storage = LocalStorage(str(tmp_path))
    data = write_data_set(storage, images, num_validation=300, num_shards=3)
    real_open = open_split

    def opened(storage: Any, data: Any, split: str, **options: Any) -> Any:
        return real_open(storage, data, "validation" if split == "test" else split, **options)

    monkeypatch.setattr(copy_search, "open_split", opened)
    samples = rng.integers(0, 256, (200, 1, 8, 8), np.uint8)
    planted = [3, 150, 399, 7, 8, 9, 10, 11]
    copies = images[planted]
    samples[20:28] = copies[..., ::-1] if is_mirrored else copies
    found = _search(storage.uri, data, 1 << 30, is_mirrored, samples, range(1000, 1200))
    assert found is not None
    assert sorted(found.shown) == list(range(20, 28))
    facts = found.facts()
    assert {near["sample"]: near["training_image"] for near in facts["nearest"]} == dict(
        zip(range(1020, 1028), planted, strict=True)
    )
    assert all(near["ratio"] < 0.01 for near in facts["nearest"])
    order = [place - 20 for place in found.shown]
    assert np.array_equal(found.neighbours[:, 0], images[[planted[k] for k in order]])
    assert np.array_equal(found.samples, samples[list(found.shown)])
    assert facts["is_memorising"]
    if is_mirrored:
        blind = _search(storage.uri, data, 1 << 30, False, samples, range(200))
        assert blind is not None
        assert not blind.facts()["is_memorising"]


@pytest.mark.parametrize("is_mirrored", ["false", "true"])
def test_mirror_images_are_looked_at_where_they_were_trained_on(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, is_mirrored: str
) -> None:
    monkeypatch.setattr(copy_search, "send_task", lambda function, resources, *sent: sent)
    config = load_config(tiny_config, [f"train.horizontal_flip={is_mirrored}"])
    context: Any = SimpleNamespace(
        config=config, storage=SimpleNamespace(uri="x"), inputs={"preprocess": {}}
    )
    seen: Any = SimpleNamespace(spread=None, numbers=())
    sent: Any = find_copies(context, seen)
    named = inspect.signature(_search).bind(*sent).arguments
    assert named["is_mirrored"] is (is_mirrored == "true")
