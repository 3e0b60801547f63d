"""One input shard to Arrow files: what a task of preprocessing does.

What comes out depends on the shard and the transform alone, not on how many threads or attempts
made it. Which shards there are is in `sources.py`, what is in one in `readers/`, what becomes of
an image in `images.py`.
"""

import functools
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from pipeline.images import decode_image
from pipeline.readers.entries import Entry, Ignored, Item, Label, Refusal, Refused
from pipeline.readers.labels import parse_label
from pipeline.readers.shard import iter_entries
from pipeline.sequences import decode_sequence
from pipeline.settings import DataConfig
from pipeline.shards import serialise
from pipeline.sources import InputShard
from pipeline.split_writer import SplitWriter, make_index
from pipeline.storage import Storage, hash_content, hashed_name
from pipeline.units import SPLITS, UNIT_VERSION, unit_directory

AHEAD = 4  # items in the hands of each decoding thread


def preprocess_shard(
    shard: InputShard, data: DataConfig, storage: Storage, threads: int = 1
) -> dict[str, Any]:
    """Reads one input shard, writes its Arrow files, index and manifest. Returns the manifest.

    See `begin_shard`, which this ends at once.
    """
    return begin_shard(shard, data, storage, threads)()


def begin_shard(
    shard: InputShard, data: DataConfig, storage: Storage, threads: int = 1
) -> Callable[[], dict[str, Any]]:
    """Reads and decodes one input shard; what is returned writes the rest and the manifest.

    Writing waits for the disk, so that a caller may begin the next shard meanwhile. What cannot be
    used is listed in the manifest with its reason, and not used.

    Args:
        shard: whose content must be that of its hash.
        data: the transform.
        storage: the root.
        threads: that decode; the result is the same for any number.

    Raises:
        DataError: the shard cannot be read, changed since the plan, or lacks a column that the
            config names.
        StorageError: the result cannot be written.
    """
    directory = unit_directory(shard, data)
    storage.clean(directory)
    writers = {split: SplitWriter(split, storage, directory, data) for split in SPLITS}
    ledger = _Ledger(shard)
    included = frozenset(map(parse_label, data.include_labels))
    decode = partial(_decode, data=data, included=included)
    for entry, outcome in _map_in_order(decode, iter_entries(shard, data), threads):
        match outcome:
            case _Accepted(split=split):
                assert isinstance(entry, Item)
                source = ledger.source(entry.member)
                writers[split].add(outcome.item, entry.label, source, outcome.digest)
                if outcome.is_animated:
                    ledger.counted["animated"] += 1
            case Refusal():
                ledger.refuse(outcome)
            case str():
                ledger.left_out[outcome] += 1

    def finish() -> dict[str, Any]:
        for writer in writers.values():
            writer.flush()
        return _write_manifest(shard, storage, directory, writers, ledger)

    return finish


def _write_manifest(
    shard: InputShard,
    storage: Storage,
    directory: str,
    writers: dict[str, SplitWriter],
    ledger: "_Ledger",
) -> dict[str, Any]:
    if not (ledger.refused or ledger.left_out["label"] or ledger.left_out["resolution"]) and not (
        any(writer.count for writer in writers.values())
    ):
        ledger.refuse(Refusal("", "empty", "there is nothing in it that is used, by its name"))
    index = serialise(make_index(list(writers.values())))
    sha256 = hash_content(index)
    manifest: dict[str, Any] = {
        "schema_version": UNIT_VERSION,
        "input": shard.name,
        "sha256": shard.sha256,
        "bytes": shard.num_bytes,
        "files": [file for writer in writers.values() for file in writer.files],
        "index": {"file": hashed_name("index.arrow", sha256), "sha256": sha256},
        "splits": {split: writer.facts() for split, writer in writers.items()},
        "refused": ledger.refused,
        "left_out": dict(sorted(ledger.left_out.items())),
        "animated": ledger.counted["animated"],
        "versions": dict(_versions()),
    }
    storage.create(f"{directory}/{manifest['index']['file']}", index)
    storage.create(f"{directory}/manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Of the libraries that decode and write; looked for once, which takes two milliseconds."""
    return tuple((name, version(name)) for name in ("pillow", "pyarrow", "numpy"))


class _Accepted(NamedTuple):
    """An item as it is stored."""

    item: np.ndarray
    split: str
    digest: bytes
    is_animated: bool


@dataclass
class _Ledger:
    """Where everything that is not stored is accounted for."""

    shard: InputShard
    refused: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    counted: Counter[str] = field(default_factory=Counter)

    def refuse(self, refusal: Refusal) -> None:
        self.refused.append(
            {
                "source": self.source(refusal.member),
                "reason": refusal.reason,
                "detail": refusal.detail,
                "count": refusal.count,
                **({"hides_more": True} if refusal.hides_more else {}),
            }
        )

    def source(self, member: str) -> str:
        """Where an item came from, to the member; loose files are their own shard."""
        if self.shard.format == "files":
            return member
        return f"{self.shard.name}/{member}" if member else self.shard.name


def _map_in_order(
    function: Callable[[Entry], "_Accepted | Refusal | str"], entries: Iterator[Entry], threads: int
) -> Iterator[tuple[Entry, "_Accepted | Refusal | str"]]:
    """Each entry with what becomes of it, in order."""
    if threads == 1:
        for entry in entries:
            yield entry, function(entry)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Entry, Future[Any]]] = deque()
        for entry in entries:
            pending.append((entry, pool.submit(function, entry)))
            if len(pending) >= threads * AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()


def _decode(
    entry: Entry, data: DataConfig, included: frozenset[Label]
) -> _Accepted | Refusal | str:
    """The item as it is stored, or why it is refused, or by which filter it is left out."""
    match entry:
        case Ignored():
            return "name"
        case Refusal():
            return entry
    if included and entry.label not in included:
        return "label"
    if data.require_labels and entry.label is None:
        return Refusal(entry.member, "label_missing", "it has no label, and labels are required")
    try:
        if data.is_sequence:
            item, is_animated = decode_sequence(entry.content, data), False
        else:
            decoded = decode_image(entry.content, data)
            if decoded is None:
                return "resolution"
            item, is_animated = decoded.pixels, decoded.is_animated
    except Refused as refused:
        return Refusal(entry.member, refused.reason, refused.detail)
    digest = _hash(item if data.is_sequence else entry.content)
    return _Accepted(item, _split_of(digest, data), digest, is_animated)


def _hash(content: bytes | np.ndarray) -> bytes:
    """The SHA-256 of a file, or of values alone: a sequence is the same in whatever it came."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()


def _split_of(digest: bytes, data: DataConfig) -> str:
    """The split of an item by the hash of its content: new data moves nothing."""
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < data.test_fraction:
        return "test"
    return "validation" if u < data.test_fraction + data.validation_fraction else "train"
