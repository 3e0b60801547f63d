from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.readers.entries import Label
from pipeline.shards import ArrowFile, ArrowItems, write_arrow
from pipeline.storage import join_content


def write(path: Path, items: np.ndarray, labels: list[Label] | None = None) -> ArrowFile:
    names = [f"s/{k}" for k in range(len(items))]
    path.write_bytes(join_content(write_arrow(items, labels or [None] * len(items), names)))
    return ArrowFile(path)


@pytest.mark.parametrize(("dtype", "shape"), [(np.uint8, (1, 2, 2)), (np.float32, (2, 2))])
def test_gathers_from_several_shards_in_any_order(
    tmp_path: Path, dtype: Any, shape: tuple[int, ...]
) -> None:
    values = np.arange(7 * 4, dtype=dtype).reshape(7, *shape)
    parts = (("a", values[:3]), ("b", values[:0]), ("c", values[3:]))
    items = ArrowItems([write(tmp_path / name, part) for name, part in parts])
    assert len(items) == 7
    assert items.shape == shape
    ids = np.array([6, 0, 3, 2, 0])
    found = items.gather(ids)
    assert (found.dtype, found.flags.writeable) == (dtype, True)
    assert np.array_equal(found, values[ids])
    assert items.gather(ids[:0]).shape == (0, *shape)
    assert items.labels.tolist() == [-1] * 7


def test_excluded_rows_are_not_seen(tmp_path: Path) -> None:
    pixels = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1)
    files = [
        write(tmp_path / "a", pixels[:4], [0, 1, 2, 3]),
        write(tmp_path / "b", pixels[4:6], [4, 5]),
        write(tmp_path / "c", pixels[6:], [6, 7]),
    ]
    excluded = [(0, 2), (0, 1), ()]
    items = ArrowItems([ArrowFile(f.path, e) for f, e in zip(files, excluded, strict=True)])
    assert items.labels.tolist() == [1, 3, 6, 7]
    assert items.gather(np.array([3, 0, 2, 1])).ravel().tolist() == [7, 1, 6, 3]


def test_class_names_become_ids_of_the_whole_set(tmp_path: Path) -> None:
    pixels = np.zeros((2, 1, 1, 1), np.uint8)
    files = [
        write(tmp_path / "a", pixels, ["dog", None]),
        write(tmp_path / "b", pixels, ["cat", "dog"]),
        write(tmp_path / "c", pixels, [7, None]),
    ]
    items = ArrowItems(files, classes=["7", "cat", "dog"])
    assert items.labels.tolist() == [2, -1, 1, 2, 0, -1]


def test_sequences_are_read_as_they_were(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float32)
    file = write(tmp_path / "a", values)
    items = ArrowItems([file])
    assert np.array_equal(items.gather(np.arange(5)), values)
    table = pa.ipc.open_file(str(file.path)).read_all()
    assert table.schema.field("sequence").type == pa.fixed_shape_tensor(pa.float32(), [3, 16])


def test_equal_rows_give_equal_bytes() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 1, 3, 3), np.uint8)
    one = write_arrow(pixels, ["b", "a", None, "b"], list("wxyz"))
    two = write_arrow(pixels.copy(), ["b", "a", None, "b"], list("wxyz"))
    assert join_content(one) == join_content(two)
