"""The step `preprocess`: image shards to Arrow shards, with Ray Data.

The unit of work is the input shard: its result `steps/shard/<key>/` holds one Arrow file a
split and a manifest, and is keyed by the shard's content and the transform, so that an
unchanged shard is never read again. The step's own manifest adds the units up.
"""

import hashlib
import io
import json
import logging
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import ERRORS, ClusterError, DataError, RaydiffusionError, StorageError
from pipeline.settings import DataConfig
from pipeline.shards import ImageRow, write_arrow
from pipeline.sources import TAR_ERRORS, InputShard, as_data_error, list_input_shards, open_source
from pipeline.storage import Storage, open_storage
from pipeline.workflow import StepContext, hash_json

SPLITS = ("train", "validation", "test")
SHARD_VERSION = 1  # raise when the same shard and transform make other bytes
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 1 << 26  # more is a decompression bomb, refused before decoding
READ_BYTES = 1 << 20
_UNREADABLE = (  # what Pillow raises for what is no image, or not a whole one
    OSError,
    ValueError,
    SyntaxError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)


def preprocess(context: StepContext) -> dict[str, Any]:
    """Turns every input shard into Arrow shards by split; shards done before are kept.

    Raises:
        DataError: too many images cannot be used, a split is empty, a shard cannot be read, or the
            shards are no longer those of the plan.
        StorageError: results cannot be written, or nodes do not share the storage root.
        ClusterError: Ray lost the work.
    """
    data = context.config.data
    shards = list_input_shards(data.sources, context.storage)
    if {shard.name: shard.sha256 for shard in shards} != context.planned.step.settings["shards"]:
        raise DataError(
            "The shards changed since the run was planned. Run the same command again: it takes "
            "them as they are then."
        )
    units = {shard.name: f"steps/shard/{unit_key(shard, data)}" for shard in shards}
    missing = [
        shard
        for shard in shards
        if not context.storage.exists(f"{units[shard.name]}/manifest.json")
    ]
    if missing:
        _run_ray_data(context, missing, units)
    manifests = [_read_unit(context.storage, units[shard.name]) for shard in shards]
    summary = _summarise(data, units, manifests)
    context.note(
        f"{len(shards)} shards ({len(missing)} new), "
        + ", ".join(f"{summary['counts'][split]:,} {split}" for split in SPLITS)
        + f", {summary['refused']} refused"
    )
    return summary


def unit_key(shard: InputShard, data: DataConfig) -> str:
    """The key of one input shard's result."""
    transform = data.model_dump(mode="json", exclude={"sources", "max_bad_fraction"})
    return hash_json([SHARD_VERSION, shard.name, shard.sha256, transform])


def preprocess_shard(
    shard: InputShard, data: DataConfig, storage: Storage, directory: str
) -> dict[str, Any]:
    """Reads one tar shard and writes its Arrow files and manifest. Returns the manifest.

    Images that cannot be read are listed with the reason in the manifest, not used.

    Raises:
        DataError: the shard cannot be opened or read to its end, changed meanwhile, holds no image
            or a label that is no number.
    """
    rows: dict[str, list[ImageRow]] = {split: [] for split in SPLITS}
    refused: list[dict[str, str]] = []
    with open_source(shard.uri) as file:
        reader = _HashingReader(shard.uri, file)
        for member, content, label in _iter_samples(shard, reader):
            try:
                image = _transform(content, data)
            except _UNREADABLE as error:
                refused.append({"source": f"{shard.name}/{member}", "reason": str(error)})
                continue
            split = _split_of(content, data)
            rows[split].append(ImageRow(image, label, f"{shard.name}/{member}"))
        if reader.read_all() != shard.sha256:
            raise DataError(
                f"The shard {shard.uri} changed while it was read. Run the same command again."
            )
    if not refused and not any(rows.values()):
        raise DataError(
            f"The shard {shard.uri} holds no image ({', '.join(IMAGE_SUFFIXES)}). Check what is "
            "in it or leave it out of data.sources."
        )
    shape = (data.channels, data.resolution, data.resolution)
    manifest: dict[str, Any] = {"input": shard.name, "sha256": shard.sha256, "splits": {}}
    for split in SPLITS:
        content = write_arrow(rows[split], shape)
        storage.replace(f"{directory}/{split}.arrow", content)
        manifest["splits"][split] = {
            "count": len(rows[split]),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "labels": Counter("none" if r.label is None else str(r.label) for r in rows[split]),
            "channel_sums": _channel_sums(rows[split], data.channels),
        }
    manifest["refused"] = refused
    storage.create(f"{directory}/manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _read_unit(storage: Storage, directory: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read(f"{directory}/manifest.json"))
    except FileNotFoundError as error:
        raise StorageError(
            f"{storage.uri}/{directory} was written on another node and is not to be seen here. "
            "Set storage.root to a place that every node of the cluster shares."
        ) from error


class _HashingReader:
    """A file to be read once from its beginning, hashing what passes."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file, self._digest = uri, file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Reads on."""
        with as_data_error(self._uri):
            content = self._file.read(size)
        self._digest.update(content)
        return content

    def read_all(self) -> str:
        """Reads to the end; the SHA-256 of the whole file."""
        while self.read(READ_BYTES):
            pass
        return self._digest.hexdigest()


def _run_ray_data(context: StepContext, missing: list[InputShard], units: dict[str, str]) -> None:
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is ours to tell
    options = ray.data.DataContext.get_current()
    options.enable_progress_bars = False
    options.print_on_execution_start = False
    started, images = time.monotonic(), 0
    tasks = [
        {
            "shard": json.dumps(shard.__dict__),
            "directory": units[shard.name],
            "data": context.config.data.model_dump_json(),
            "storage": context.storage.uri,
        }
        for shard in missing
    ]
    context.progress(0, len(tasks), "shards")
    try:
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(_preprocess_row)
        for done, row in enumerate(dataset.iter_rows(), start=1):
            if row["error"]:
                raise ERRORS[row["kind"]](row["error"])
            images += row["images"]
            rate = images / (time.monotonic() - started)
            context.progress(done, len(tasks), "shards", rate=rate, rate_unit="images/s")
    except RayError as error:
        raise ClusterError(
            f"Preprocessing stopped on the cluster: {str(error).strip().splitlines()[-1]}. "
            "Finished shards are kept; run the same command again."
        ) from error


def _preprocess_row(row: dict[str, Any]) -> dict[str, Any]:
    """One task of Ray Data: one input shard. Our errors return as values, to stay themselves."""
    shard = InputShard(**json.loads(row["shard"]))
    data = DataConfig.model_validate_json(row["data"])
    try:
        manifest = preprocess_shard(shard, data, open_storage(row["storage"]), row["directory"])
    except RaydiffusionError as error:
        return {"error": str(error), "kind": type(error).__name__, "images": 0}
    return {"error": "", "kind": "", "images": sum(s["count"] for s in manifest["splits"].values())}


def _iter_samples(shard: InputShard, file: Any) -> Iterator[tuple[str, bytes, int | None]]:
    """Yields (member name, encoded image, label) of each sample: files that share a key.

    Files of a sample follow one another, as WebDataset writes them.
    """
    key, member, image, label = None, "", None, None
    try:
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                directory, _, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if (directory, stem) != key:
                    if image is not None:
                        yield member, image, label
                    key, image, label = (directory, stem), None, None
                stream = tar.extractfile(info)
                assert stream is not None  # isfile() holds
                if f".{suffix.lower()}".endswith(IMAGE_SUFFIXES):
                    member, image = info.name, stream.read()
                elif suffix == "cls":
                    label = _parse_label(stream.read(), f"{shard.name}/{info.name}")
    except TAR_ERRORS as error:
        raise DataError(
            f"The shard {shard.uri} cannot be read to its end ({error}). Write it again or leave "
            "it out of data.sources."
        ) from error
    if image is not None:
        yield member, image, label


def _parse_label(text: bytes, source: str) -> int:
    try:
        label = int(text)
    except ValueError as error:
        raise DataError(
            f"The label in {source} must be a whole number, got {text[:20]!r}. Number the classes."
        ) from error
    if label < 0:
        raise DataError(f"The label in {source} must be 0 or more, got {label}. Number from 0.")
    return label


def _transform(content: bytes, data: DataConfig) -> np.ndarray:
    """Decodes, crops the centre square, resizes with antialiasing; uint8 [C, H, W]."""
    if not content:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = image.convert(data.mode)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != data.resolution:
        image = image.resize((data.resolution, data.resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _split_of(content: bytes, data: DataConfig) -> str:
    """The split of an image by the hash of its encoded content: new data moves nothing."""
    u = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    if u < data.test_fraction:
        return "test"
    return "validation" if u < data.test_fraction + data.validation_fraction else "train"


def _channel_sums(rows: list[ImageRow], channels: int) -> list[list[int]]:
    """Per channel the exact sum and sum of squares of its pixels."""
    if not rows:
        return [[0, 0]] * channels
    pixels = np.stack([row.image for row in rows]).astype(np.int64)
    return [[int(pixels[:, c].sum()), int((pixels[:, c] ** 2).sum())] for c in range(channels)]


def _summarise(
    data: DataConfig, units: dict[str, str], manifests: list[dict[str, Any]]
) -> dict[str, Any]:
    refused = [item for m in manifests for item in m["refused"]]
    counts = {s: sum(m["splits"][s]["count"] for m in manifests) for s in SPLITS}
    total = sum(counts.values()) + len(refused)
    if len(refused) > data.max_bad_fraction * total:
        first = "\n  ".join(f"{item['source']}: {item['reason']}" for item in refused[:10])
        raise DataError(
            f"{len(refused)} of {total} images cannot be used, more than data.max_bad_fraction = "
            f"{data.max_bad_fraction} allows. Mend them or raise the limit. The first:\n  {first}"
        )
    for split in SPLITS:
        if not counts[split]:
            raise DataError(
                f"The {split} split has no images (of {total} in all). Give more images, or "
                "change data.validation_fraction and data.test_fraction."
            )
    pixels = counts["train"] * data.resolution**2
    sums = np.sum([m["splits"]["train"]["channel_sums"] for m in manifests], axis=0)
    mean = sums[:, 0] / pixels
    labels: Counter[str] = Counter()
    for m in manifests:
        labels.update(m["splits"]["train"]["labels"])
    return {
        "counts": counts,
        "refused": len(refused),
        "refused_first": refused[:10],
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(sums[:, 1] / pixels - mean**2).tolist(),
        "labels": dict(sorted(labels.items())),
        "shape": [data.channels, data.resolution, data.resolution],
        "shards": [
            {
                "input": m["input"],
                "directory": units[m["input"]],
                "splits": {
                    split: {k: m["splits"][split][k] for k in ("count", "sha256")}
                    for split in SPLITS
                },
            }
            for m in manifests
        ],
    }
