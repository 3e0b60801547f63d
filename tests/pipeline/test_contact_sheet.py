import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.dataset_document import make_document
from pipeline.errors import ConfigError
from pipeline.readers.entries import Label
from pipeline.report.contact_sheet import GAP_PX, LINE_PX, MARGIN_PX, PLOT_PX, write_contact_sheet
from pipeline.settings import DataConfig
from pipeline.shards import ArrowItems
from pipeline.sources import InputShard
from pipeline.split_writer import SplitWriter
from pipeline.storage import LocalStorage
from pipeline.units import SPLITS, unit_directory

TOP_PX = MARGIN_PX + 2 * LINE_PX + GAP_PX
HELD_OUT = 255  # level of the image in each of the other splits


def grey(levels: Sequence[int], side: int = 8) -> np.ndarray:
    """Images of one level each."""
    return np.full((len(levels), 1, side, side), np.array(levels)[:, None, None, None], np.uint8)


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Writes items as the training split of a data set and draws it, uint8 [H, W, 3]."""

    def run(
        items: np.ndarray, labels: Sequence[Label] | None = None, path: Path | None = None
    ) -> np.ndarray:
        size: dict[str, Any] = {"sequence_shape": items.shape[1:]}
        if items.dtype == np.uint8:
            size = {"resolution": items.shape[2], "mode": "L" if items.shape[1] == 1 else "RGB"}
        data = DataConfig(sources=("x",), shard_bytes=1 << 16, **size)
        storage = LocalStorage(str(tmp_path / "root"))
        shard = InputShard("s.tar", "tar", ())
        writers = {s: SplitWriter(s, storage, unit_directory(shard, data), data) for s in SPLITS}
        for item, label in zip(items, labels or [None] * len(items), strict=True):
            writers["train"].add(item, label, "s.tar/x", bytes(32))
        for split in ("validation", "test"):
            writers[split].add(np.full_like(items[0], HELD_OUT), None, "s.tar/x", bytes(32))
        for writer in writers.values():
            writer.flush()
        unit = {
            "input": shard.name,
            "files": [file for writer in writers.values() for file in writer.files],
            "splits": {split: writer.facts() for split, writer in writers.items()},
            "refused": [],
            "left_out": {},
            "animated": 0,
        }
        content = json.dumps(make_document(data, storage, [shard], [unit], [])).encode()
        storage.replace("steps/preprocess/k/dataset.json", content)
        artifact = {"file": "dataset.json", "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"step": "preprocess", "key": "k", "artifacts": {"dataset.json": artifact}}
        path = path or tmp_path / "sheet.png"
        write_contact_sheet(storage, manifest, path)
        with Image.open(path) as sheet:
            assert (sheet.format, sheet.mode) == ("PNG", "RGB")
            return np.asarray(sheet)

    return run


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn, in order."""
    texts: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def record(self: ImageDraw.ImageDraw, xy: Any, text: str, *args: Any, **kwargs: Any) -> None:
        texts.append(text)
        draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def tiles(sheet: np.ndarray, size: tuple[int, int], rows: int, columns: int) -> np.ndarray:
    """The tiles of a sheet whose widest row ends at its margin, [rows, columns, h, w, 3]."""
    width, height = size
    right = sheet.shape[1] - MARGIN_PX + GAP_PX - columns * (width + GAP_PX)
    return np.array(
        [
            [
                sheet[y : y + height, x : x + width]
                for x in range(right, right + columns * (width + GAP_PX), width + GAP_PX)
            ]
            for y in range(TOP_PX, TOP_PX + rows * (height + GAP_PX), height + GAP_PX)
        ]
    )


def test_each_class_has_a_row_of_its_training_images(
    draw: Callable[..., np.ndarray], written: list[str]
) -> None:
    labels = [k // 30 for k in range(90)]  # sorted, as shards often are
    sheet = draw(grey([100 * label for label in labels]), labels)
    rows = tiles(sheet, (48, 48), 3, 12)
    for label in range(3):
        assert np.all(rows[label] == 100 * label)
    assert written[0] == "90 train, 1 validation, 1 test images,  1 x 8 x 8 uint8"
    assert written[1] == "3 classes, training images chosen evenly"
    assert written[2:] == ["0", "30", "1", "30", "2", "30"]


def test_names_are_in_order_and_what_has_none_comes_last(
    draw: Callable[..., np.ndarray], written: list[str]
) -> None:
    level: dict[str | None, int] = {"dog": 50, "cat": 100, None: 150}
    labels = ["dog", None, "cat", "cat"] * 12
    sheet = draw(grey([level[label] for label in labels]), labels)
    rows = tiles(sheet, (48, 48), 3, 12)
    assert [rows[k].min() for k in range(3)] == [rows[k].max() for k in range(3)] == [100, 50, 150]
    assert written[2:] == ["cat", "24", "dog", "12", "(no label)", "12"]


def test_images_without_labels_are_a_grid_from_the_whole_split(
    draw: Callable[..., np.ndarray], written: list[str]
) -> None:
    sheet = draw(grey([k * 200 // 1440 for k in range(1440)]))
    levels = tiles(sheet, (48, 48), 12, 12)[:, :, 0, 0, 0].ravel().tolist()
    assert levels == [(10 * k + 5) * 200 // 1440 for k in range(144)]
    assert written[1] == "training images chosen evenly"


def test_no_more_is_read_than_is_shown(
    draw: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    gather = ArrowItems.gather

    def record(self: ArrowItems, ids: np.ndarray) -> np.ndarray:
        seen.extend(ids.tolist())
        return gather(self, ids)

    monkeypatch.setattr(ArrowItems, "gather", record)
    draw(grey([0] * 1000), [k % 2 for k in range(1000)])
    assert len(set(seen)) == len(seen) == 24


def test_small_images_are_enlarged_by_a_whole_factor(draw: Callable[..., np.ndarray]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3, 20, 20), dtype=np.uint8)
    sheet = draw(pixels)
    shown = pixels[[(2 * k + 1) * 200 // 288 for k in range(144)]].transpose(0, 2, 3, 1)
    expected = shown.repeat(3, axis=1).repeat(3, axis=2)
    assert np.array_equal(tiles(sheet, (60, 60), 12, 12).reshape(expected.shape), expected)


@pytest.mark.parametrize(("side", "shown"), [(64, 64), (128, 128), (200, 128)])
def test_large_images_are_reduced(draw: Callable[..., np.ndarray], side: int, shown: int) -> None:
    sheet = draw(grey([7] * 12, side))
    assert sheet.shape[:2] == (TOP_PX + shown + MARGIN_PX, 2 * MARGIN_PX + 12 * (shown + 4) - 4)
    assert np.all(tiles(sheet, (shown, shown), 1, 12) == 7)


def test_more_classes_than_fit_are_counted(
    draw: Callable[..., np.ndarray], written: list[str]
) -> None:
    sheet = draw(grey(list(range(100))), list(range(100)))
    assert sheet.shape[0] == TOP_PX + 12 * 52 - 4 + LINE_PX + MARGIN_PX
    assert written[2:26:2] == [str(k) for k in range(12)]
    assert written[26:] == ["and 88 more classes"]


def test_a_hostile_class_name_stays_on_its_line(
    draw: Callable[..., np.ndarray], written: list[str]
) -> None:
    sheet = draw(grey([1, 2, 3]), ["a\n\x1b[2Jb", "w" * 5000, "é"])
    assert written[2] == "a\\n\\x1b[2Jb"
    assert written[4].endswith("w…")
    assert written[6] == "é"
    assert sheet.shape[1] < 600


def test_sequences_are_lines_on_one_scale(
    draw: Callable[..., np.ndarray], written: list[str]
) -> None:
    wave = np.sin(np.linspace(0, 6, 64, dtype=np.float32))
    small, large = np.stack([wave, 0 * wave]) * 0.5, np.stack([wave, 0 * wave]) * 2
    sheet = draw(np.array([small, large] * 12), [0, 1] * 12)
    rows = tiles(sheet, PLOT_PX, 2, 12)
    assert np.array_equal(rows[0, 0], rows[0, 11])
    inked = (rows[:, 0].min(-1) < 200).any(-1).sum(-1)  # heights of the drawing, in pixels
    assert inked[1] > 3 * inked[0] > 0
    assert "24 train, 1 validation, 1 test sequences,  2 x 64 float32" in written
    assert "every plot from -" in written[1]


@pytest.mark.parametrize("value", [0.0, 1e30])
def test_sequences_of_one_value_are_a_line_in_the_middle(
    draw: Callable[..., np.ndarray], value: float
) -> None:
    sheet = draw(np.full((12, 1, 1), value, np.float32))
    rows = tiles(sheet, PLOT_PX, 1, 12)
    inked = np.flatnonzero((rows[0, 0].min(-1) < 200).all(-1))
    assert np.abs(inked - PLOT_PX[1] / 2).max() < 3


def test_a_sheet_is_by_default_beside_the_data_set(
    draw: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    draw(grey([1] * 12))
    storage = LocalStorage(str(tmp_path / "root"))
    text = storage.read("steps/preprocess/k/dataset.json")
    artifact = {"file": "dataset.json", "sha256": hashlib.sha256(text).hexdigest()}
    manifest = {"step": "preprocess", "key": "k", "artifacts": {"dataset.json": artifact}}
    path = Path(write_contact_sheet(storage, manifest))
    assert path == tmp_path / "root" / "steps" / "preprocess" / "k" / "contact_sheet.png"
    assert path.read_bytes() == (tmp_path / "sheet.png").read_bytes()


def test_a_sheet_is_replaced_whole(draw: Callable[..., np.ndarray], tmp_path: Path) -> None:
    first = draw(grey([1] * 12))
    second = draw(grey([2] * 12))
    assert not np.array_equal(first, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "sheet.png"]


@pytest.mark.parametrize("name", ["none/sheet.png", "file/sheet.png", "directory", "."])
def test_a_place_that_cannot_be_written_is_refused(
    draw: Callable[..., np.ndarray], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match=r"Cannot write .*: .*\. Give another --output"):
        draw(grey([1] * 12), path=tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"directory", "file", "root"}
    assert (tmp_path / "file").read_text() == "kept"
