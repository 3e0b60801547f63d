import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from pipeline import gallery
from pipeline.config import load_config
from pipeline.drawing import Series
from pipeline.gallery import Gallery, look_through
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage
from pipeline.subjects import Source
from pipeline.workflow import StepContext, plan


@pytest.fixture
def look(tmp_path: Path, tiny_config: Path) -> Callable[..., tuple[Gallery, StepContext]]:
    """Looks through samples and labels that were drawn."""

    def run(items: np.ndarray, labels: list[int] | None = None, *settings: str) -> Any:
        config = load_config(tiny_config, list(settings))
        storage = LocalStorage(str(tmp_path / "root"))
        planned = {p.step.name: p for p in plan(make_steps(config, []), storage)}
        context = StepContext(config, storage, planned["evaluate"], {}, lambda event: None)
        series = Series("x", Source("untrained"), config.evaluate, len(items))
        for first in series.starts:
            arrays = {"items": items[first : first + 64]}
            if labels is not None:
                arrays["labels"] = np.array(labels[first : first + 64])
            path = f"{context.directory}/chunks/x-{first:08d}.safetensors"
            storage.create(path, safetensors.numpy.save(arrays))
        return look_through(context, series), context

    return run


def test_samples_are_kept_as_arrow_files_in_order(
    look: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "FILE_BYTES", 100 * 64)
    items = np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), np.uint8)
    labels = [k % 3 for k in range(150)]
    seen, context = look(items, labels)
    assert list(context.artifacts) == ["samples-00000.arrow", "samples-00001.arrow"]
    read, found_labels, names = [], [], []
    for artifact in context.artifacts.values():
        content = context.storage.read(f"{context.directory}/{artifact['file']}")
        table = pa.ipc.open_file(io.BytesIO(content)).read_all()
        read.append(table["image"].chunk(0).to_numpy_ndarray())
        found_labels += table["label"].to_pylist()
        names += table["source"].to_pylist()
    assert np.array_equal(np.concatenate(read), items)
    assert (found_labels, names[128]) == (labels, "sample 128")
    assert np.array_equal(seen.by_class[1], items[1:24:3])


def test_ten_classes_are_shown(look: Callable[..., Any]) -> None:
    items = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1).repeat(8, axis=2).repeat(8, axis=3)
    seen, _ = look(items, [k % 12 for k in range(100)])
    assert list(seen.by_class) == list(range(10))
    assert seen.by_class[9][:, 0, 0, 0].tolist() == list(range(9, 100, 12))


def test_samples_need_not_be_kept(look: Callable[..., Any]) -> None:
    items = np.zeros((70, 1, 8, 8), np.uint8)
    seen, context = look(items, None, "evaluate.keep_samples=false")
    assert context.artifacts == {}
    assert (seen.degenerate.count, seen.degenerate.constant, seen.degenerate.black) == (70, 70, 70)
    assert (len(seen.first), len(seen.spread), seen.by_class) == (64, 70, {})


def test_those_compared_are_spread_over_all(
    look: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "LOOKED_AT", 5)
    items = np.random.default_rng(0).integers(0, 256, (150, 1, 8, 8), np.uint8)
    seen, _ = look(items)
    assert seen.numbers == (0, 37, 74, 112, 149)
    assert np.array_equal(seen.spread, items[list(seen.numbers)])


def test_sequences_are_kept_as_they_are(look: Callable[..., Any]) -> None:
    items = np.random.default_rng(0).normal(size=(10, 2, 16)).astype(np.float32)
    items[3] = 1.5
    seen, _ = look(items)
    assert np.array_equal(seen.first, items)
    assert seen.degenerate.constant == 1
