"""The contact sheet: what a person sees of a preprocessed data set at a glance, as one PNG.

Items of the training split are drawn, a row for each class, or a grid where there are no labels.
The data set in numbers is printed by `jobs/inspection.py`.
"""

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.dataset import open_split, read_dataset
from pipeline.errors import ConfigError
from pipeline.readers.names import show
from pipeline.settings import CACHE_BYTES
from pipeline.shards import Items
from pipeline.storage import Storage

COLUMNS, ROWS = 12, 12
MIN_TILE_PX, MAX_TILE_PX = 48, 128  # of images
PLOT_PX = (112, 56)  # of sequences, width and height
PLOT_DEVIATIONS = 4  # around the mean that a plot shows
HEADING_PX = 200  # at most, left of the rows
MARGIN_PX, GAP_PX, LINE_PX = 16, 4, 22
SMOOTHING = 3  # times that a plot is drawn larger, for smooth lines
PAPER, INK, MUTED = "#eef1f5", "#1f2933", "#616e7c"
COLOURS = ("#0b6e99", "#d1495b", "#4f8a10", "#8d5fb0", "#c77700", "#3f4e5e")  # of channels


def write_contact_sheet(
    storage: Storage,
    manifest: Mapping[str, Any],
    path: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> str:
    """Draws the contact sheet of a preprocessed data set into a PNG file, whole or not at all.

    Args:
        storage: the root.
        manifest: of the step `preprocess`.
        path: the file, in a directory that is there; none: beside the data set in the storage
            root, where it can be no input of the next run.
        cache_bytes: `data.cache_bytes`.

    Returns:
        Where it is.

    Raises:
        ConfigError: the file cannot be written.
        StorageError: the data set is damaged, or the storage root cannot be written.
    """
    document = read_dataset(storage, manifest)
    items = open_split(storage, manifest, "train", whole=False, cache_bytes=cache_bytes)
    buffer = io.BytesIO()
    with contextlib.closing(items):
        draw_contact_sheet(document, items).save(buffer, "PNG")
    if path is None:
        place = f"steps/{manifest['step']}/{manifest['key']}/contact_sheet.png"
        storage.replace(place, buffer.getvalue())
        return f"{storage.uri}/{place}"
    staged = path.parent / f".{path.name}-{os.getpid()}"
    try:
        try:
            staged.write_bytes(buffer.getvalue())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror}. Give another --output, in a directory that "
            "is there."
        ) from error
    return str(path)


def draw_contact_sheet(document: Mapping[str, Any], items: Items) -> Image.Image:
    """The contact sheet as a picture; no more items are read than are drawn.

    Args:
        document: of the data set.
        items: its training split.
    """
    make_tile = _plotter(document) if document["dtype"] == "float32" else _picture
    rows = _class_rows(document, items) or _grid_rows(len(items))
    tiles = [[make_tile(items.gather(np.array([k]))[0]) for k in row.ids] for row in rows]
    lines = [(text, _font(size)) for text, size in zip(_header(document), (15, 12), strict=True)]
    num_hidden = max(0, len(document["labels"]["train"]) - ROWS)

    width, height = tiles[0][0].size
    left = max(_heading_width(row) for row in rows)
    right = left + max(map(len, tiles)) * (width + GAP_PX) - GAP_PX
    right = math.ceil(max(right, *(font.getlength(text) for text, font in lines)))
    top = MARGIN_PX + 2 * LINE_PX + GAP_PX
    bottom = top + len(rows) * (height + GAP_PX) - GAP_PX
    end = bottom + MARGIN_PX + (LINE_PX if num_hidden else 0)
    sheet = Image.new("RGB", (right + 2 * MARGIN_PX, end), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, ((text, font), colour) in enumerate(zip(lines, (INK, MUTED), strict=True)):
        draw.text((MARGIN_PX, MARGIN_PX + number * LINE_PX), text, colour, font)
    for number, (row, pictures) in enumerate(zip(rows, tiles, strict=True)):
        y = top + number * (height + GAP_PX)
        middle = y + height // 2
        draw.text((MARGIN_PX, middle - 1), row.name, INK, _font(14), anchor="ls")
        draw.text((MARGIN_PX, middle + 4), row.count, MUTED, _font(12), anchor="lt")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (MARGIN_PX + left + column * (width + GAP_PX), y))
    if num_hidden:
        text = f"and {_classes(num_hidden, 'more ')}"
        draw.text((MARGIN_PX, bottom + GAP_PX), text, MUTED, _font(12))
    return sheet


@dataclass(frozen=True)
class _Row:
    """Items side by side, and what is written left of them."""

    ids: np.ndarray
    name: str = ""
    count: str = ""


def _class_rows(document: Mapping[str, Any], items: Items) -> list[_Row]:
    """The first classes, and what has no label among what has; nothing where nothing has one."""
    counts, classes = document["labels"]["train"], document["classes"]
    if not counts:
        return []
    labels = items.labels_of(np.arange(len(items)))
    rows = []
    for name, count in list(counts.items())[:ROWS]:
        label = int(name) if classes is None else classes.index(name)
        rows.append(_Row(_evenly(np.flatnonzero(labels == label)), _cut(name), f"{count:,}"))
    if unlabelled := document["unlabelled"]["train"]:
        ids = _evenly(np.flatnonzero(labels == -1))
        rows.append(_Row(ids, "(no label)", f"{unlabelled:,}"))
    return rows


def _grid_rows(count: int) -> list[_Row]:
    ids = _evenly(np.arange(count), COLUMNS * ROWS)
    return [_Row(ids[k : k + COLUMNS]) for k in range(0, len(ids), COLUMNS)]


def _evenly(ids: np.ndarray, count: int = COLUMNS) -> np.ndarray:
    """Up to so many of them, each from the middle of an equal part: shards may be sorted."""
    count = min(count, len(ids))
    return ids[(2 * np.arange(count) + 1) * len(ids) // (2 * count)]


def _header(document: Mapping[str, Any]) -> tuple[str, str]:
    """What the sheet shows, in two lines."""
    is_sequence = document["dtype"] == "float32"
    counts = ", ".join(f"{count:,} {split}" for split, count in document["counts"].items())
    shape = " x ".join(map(str, document["shape"]))
    noun = "sequences" if is_sequence else "images"
    header = f"{counts} {noun},  {shape} {document['dtype']}"
    num_classes = len(document["labels"]["train"])
    shown = f"training {noun} chosen evenly"
    caption = f"{_classes(num_classes)}, {shown}" if num_classes else shown
    if is_sequence:
        centre, margin = _range(document)
        caption += f";  every plot from {centre - margin:.4g} to {centre + margin:.4g}"
    return header, caption


def _classes(count: int, which: str = "") -> str:
    return f"{count:,} {which}{'class' if count == 1 else 'classes'}"


def _picture(image: np.ndarray) -> Image.Image:
    """An image [C, H, W]: small ones enlarged by a whole factor, pixels left visible."""
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    side = picture.width * max(1, -(-MIN_TILE_PX // picture.width))
    resample = Image.Resampling.NEAREST
    if side > MAX_TILE_PX:
        side, resample = MAX_TILE_PX, Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((side, side), resample)


def _plotter(document: Mapping[str, Any]) -> Callable[[np.ndarray], Image.Image]:
    """Draws sequences [C, L] on one scale, a line for each channel; outliers end at the edge."""
    centre, margin = _range(document)
    width, height = (SMOOTHING * size for size in PLOT_PX)

    def plot(sequence: np.ndarray) -> Image.Image:
        tile = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(tile)
        if sequence.shape[1] == 1:
            sequence = np.repeat(sequence, 2, axis=1)  # one value is a line, too
        x = np.linspace(0, width - 1, sequence.shape[1])
        y = (0.5 - (sequence.astype(np.float64) - centre) / (2 * margin)) * (height - 1)
        y = np.clip(y, SMOOTHING, height - 1 - SMOOTHING)
        for channel, line in enumerate(y):
            points = np.stack([x, line], axis=1).ravel().tolist()
            draw.line(points, COLOURS[channel % len(COLOURS)], width=SMOOTHING + 1)
        return tile.resize(PLOT_PX, Image.Resampling.LANCZOS)

    return plot


def _range(document: Mapping[str, Any]) -> tuple[float, float]:
    """The middle of every plot's scale and how far it goes up and down from there."""
    mean, std = np.array(document["channel_mean"]), np.array(document["channel_std"])
    low = float((mean - PLOT_DEVIATIONS * std).min())
    high = float((mean + PLOT_DEVIATIONS * std).max())
    margin = (high - low) / 2 or abs(high) or 1.0  # all values may be equal
    return (low + high) / 2, margin


def _heading_width(row: _Row) -> int:
    if not row.name:
        return 0
    return 12 + round(max(_font(14).getlength(row.name), _font(12).getlength(row.count)))


def _cut(name: str) -> str:
    """A class name that may hold anything, on one line of bounded width."""
    text = show(name, 100)
    while _font(14).getlength(text) > HEADING_PX:
        text = text.removesuffix("…")[:-1] + "…"
    return text


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has no letters beyond ASCII; this one has those of Europe.
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)
