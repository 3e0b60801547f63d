"""New input in the features of the pinned extractor: which lots of it have drifted.

What is compared with what is in `scores/drift.py`. Only items count whose content neither the data
set of the champion nor that of the reference has: new images among many old ones would otherwise be
measured as what these are. Lots of few new items are measured together. The features are those of
`feature_cache.py`, so that an Arrow file is forwarded once, and a reference that takes it in later
finds them; held in memory are those of the rows that are looked at.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import StorageError
from pipeline.feature_cache import FeatureCache, FeatureFile, list_files
from pipeline.lots import Lot
from pipeline.reference import forward, pick_features, read_sums
from pipeline.scores.drift import (
    MAX_ITEMS,
    MAX_TRAINING,
    MIN_ITEMS,
    Drift,
    draw_rows,
    measure_drift,
)
from pipeline.shards import locate
from pipeline.split_writer import HASH_BYTES, ITEM_HASH, read_digests
from pipeline.storage import Storage
from pipeline.units import STORAGE_THREADS
from pipeline.workflow import read_artifact

REFERENCE_SPLIT = "test"  # that distances are measured to, as those of samples are


@dataclass(frozen=True)
class Judged:
    """Lots whose new items were looked at together.

    Args:
        lots: of which one has no new items, or all have.
        count: of their new items.
        drift: how far these are; None where they are too few.
        items: of lots of few, the hashes of the new items in hexadecimal, by the lot's SHA-256.
        num_earlier: items looked at with them, of those that were let in before.
        earlier: the SHA-256 of the lots let in before whose items are all among these.
    """

    lots: tuple[Lot, ...]
    count: int
    drift: Drift | None
    items: Mapping[str, Sequence[str]]
    num_earlier: int = 0
    earlier: tuple[str, ...] = ()


class _Part(NamedTuple):
    """Some rows of an Arrow file, with the hashes of their items."""

    file: FeatureFile
    rows: np.ndarray
    hashes: np.ndarray


def judge_lots(
    storage: Storage,
    document: Mapping[str, Any],
    lots: Sequence[Lot],
    *,
    known: Sequence[Mapping[str, Any]],
    held: Set[str],
    earlier: Mapping[str, Sequence[str]],
    pinned: Mapping[str, Mapping[str, Any]],
    factor: float,
    cache_bytes: int,
) -> list[Judged]:
    """Measures lots against the pinned reference, those of few new items together.

    With these go the items that were let in before, for being few. Held lots of few are apart from
    the others, which are not held for their sake.

    Args:
        storage: the root.
        document: of the data set that holds them.
        lots: one or more.
        known: the documents of the data sets whose items need no test.
        held: the SHA-256 of the lots that are held now.
        earlier: items that were let in unjudged, by the SHA-256 of their lots, as `Judged.items`.
        pinned: the manifests of the steps `features` and `reference`.
        factor: `retrain.drift_factor`.
        cache_bytes: `data.cache_bytes`.

    Raises:
        EvaluationError: features are not finite.
        StorageError: a file is missing or damaged.
        ClusterError: Ray lost the work.
    """
    old = _join(_read_hashes(storage, [s for other in known for s in other["shards"]]).values())
    hashes = _read_hashes(storage, document["shards"])
    found = _find_items(document, hashes, lots, old)
    in_lots = _join(part.hashes for parts in found.values() for part in parts)
    let_in = {sha256: _from_hex(items) for sha256, items in earlier.items()}
    others = np.setdiff1d(_join(let_in.values()), in_lots)
    before = [
        part
        for shard in document["shards"]
        for part in _parts(shard, hashes, np.isin(hashes[shard["directory"]], others))
    ]
    counts = {sha256: _count(parts) for sha256, parts in found.items()}
    groups = []
    for group in _group(lots, counts, held):
        is_of_few = 0 < counts[group[0].sha256] < MIN_ITEMS
        own = [part for lot in group for part in found[lot.sha256]]
        groups.append((group, own, before if is_of_few else []))
    every = [[*own, *with_them] for _, own, with_them in groups]
    judged = []
    drifts = _measure(storage, every, pinned, factor=factor, cache_bytes=cache_bytes)
    for (group, own, with_them), parts, drift in zip(groups, every, drifts, strict=True):
        here = _join(part.hashes for part in parts)
        items = {
            lot.sha256: [h.hex() for part in found[lot.sha256] for h in part.hashes.tolist()]
            for lot in group
            if counts[lot.sha256] < MIN_ITEMS
        }
        covered = tuple(sha for sha, theirs in let_in.items() if np.isin(theirs, here).all())
        judged.append(Judged(tuple(group), _count(own), drift, items, _count(with_them), covered))
    return judged


def _group(lots: Sequence[Lot], counts: Mapping[str, int], held: Set[str]) -> Iterator[list[Lot]]:
    """What is measured together: a lot of enough items, or of none, by itself."""
    few: dict[bool, list[Lot]] = {False: [], True: []}
    for lot in lots:
        if 0 < counts[lot.sha256] < MIN_ITEMS:
            few[lot.sha256 in held].append(lot)
        else:
            yield [lot]
    yield from (group for group in few.values() if group)


def _read_hashes(storage: Storage, shards: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The hashes of all rows of units, by their directories."""
    directories = sorted({shard["directory"] for shard in shards})
    with ThreadPoolExecutor(STORAGE_THREADS) as pool:
        found = pool.map(lambda directory: read_digests(storage, directory), directories)
        return dict(zip(directories, found, strict=True))


def _find_items(
    document: Mapping[str, Any],
    hashes: Mapping[str, np.ndarray],
    lots: Sequence[Lot],
    old: np.ndarray,
) -> dict[str, list[_Part]]:
    """The new items of each lot, by its SHA-256."""
    shards = {shard["input"]: shard for shard in document["shards"]}
    names = sorted({name for lot in lots for name in lot.inputs})
    of_inputs = [hashes[shards[name]["directory"]] for name in names]
    is_new = ~np.isin(_join(of_inputs), old)
    ends = np.cumsum([len(part) for part in of_inputs])
    new = dict(zip(names, np.split(is_new, ends[:-1]), strict=True))
    found = {}
    for lot in lots:
        parts: list[_Part] = []
        of_files = _from_hex(sha256[: 2 * HASH_BYTES] for sha256 in lot.files.values())
        for name in lot.inputs:
            wanted = new[name]
            if lot.files:
                wanted = wanted & np.isin(hashes[shards[name]["directory"]], of_files)
            parts += _parts(shards[name], hashes, wanted)
        found[lot.sha256] = parts
    return found


def _parts(
    shard: Mapping[str, Any], hashes: Mapping[str, np.ndarray], is_wanted: np.ndarray
) -> Iterator[_Part]:
    """Those of the wanted rows of a shard that are of the data set, by Arrow file."""
    start, of_shard = 0, hashes[shard["directory"]]
    for file in list_files({"shards": [shard]}):
        rows = np.flatnonzero(is_wanted[start : start + file.count])
        rows = np.setdiff1d(rows, file.excluded)
        if len(rows):
            yield _Part(file, rows, of_shard[start + rows])
        start += file.count


def _measure(
    storage: Storage,
    groups: Sequence[Sequence[_Part]],
    pinned: Mapping[str, Mapping[str, Any]],
    *,
    factor: float,
    cache_bytes: int,
) -> list[Drift | None]:
    features, reference = pinned["features"], pinned["reference"]
    picked = [_draw(parts) if _count(parts) >= MIN_ITEMS else [] for parts in groups]
    cache = FeatureCache(storage, features)
    files = {file.sha256: file for parts in picked for file, _ in parts}
    missing = [file for file in files.values() if cache.read(file) is None]
    if missing:
        forward(storage, features, missing, cache_bytes)
    if not files:
        return [None] * len(groups)
    sums = read_sums(read_artifact(storage, reference, "sums.safetensors"), REFERENCE_SPLIT)
    numbers = draw_rows(reference["metrics"]["counts"]["train"], MAX_TRAINING)
    training = pick_features(storage, reference, "train", numbers)

    def measure(parts: Sequence[tuple[FeatureFile, np.ndarray]]) -> Drift | None:
        of_items = [_read(storage, cache, file, rows) for file, rows in parts]
        return measure_drift(np.concatenate(of_items), training, sums, factor=factor)

    return [measure(parts) if parts else None for parts in picked]


def _draw(parts: Sequence[_Part]) -> list[tuple[FeatureFile, np.ndarray]]:
    """The rows of each file that are looked at: all, or random ones of many."""
    numbers = draw_rows(_count(parts), MAX_ITEMS)
    places, rows = locate(np.cumsum([len(part.rows) for part in parts]), numbers)
    drawn = [(part.file, part.rows[rows[places == k]]) for k, part in enumerate(parts)]
    return [(file, of_file) for file, of_file in drawn if len(of_file)]


def _read(storage: Storage, cache: FeatureCache, file: FeatureFile, rows: np.ndarray) -> np.ndarray:
    features = cache.read(file)
    if features is None:
        raise StorageError(
            f"The features in {storage.uri}/{cache.path_of(file)} are gone or damaged. Run the "
            "same command again: they are made anew."
        )
    return features[rows]


def _count(parts: Iterable[_Part]) -> int:
    return sum(len(part.rows) for part in parts)


def _join(hashes: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, ITEM_HASH), *hashes])


def _from_hex(hashes: Iterable[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(hashes)), ITEM_HASH)
