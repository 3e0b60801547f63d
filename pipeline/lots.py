"""What of the input is tested for drift, held and taken in as one: a lot.

A lot is an input shard, or all loose images that are new. These are preprocessed in buckets by the
hash of their names, so that the new ones lie among old ones in every bucket; they are tested apart
from the old ones, and can be left out without these. Loose sequences are tested by the bucket: the
hash of such an item is not that of its file.
"""

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from pipeline.sources import InputShard


@dataclass(frozen=True)
class Lot:
    """New input that is tested as one.

    Args:
        name: of the shard; `loose-<hash>` for files.
        sha256: of the content.
        inputs: names of the input shards that its items are in.
        files: SHA-256 of loose files by name; empty for a shard.
    """

    name: str
    sha256: str
    inputs: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)


def find_lots(
    shards: Sequence[InputShard],
    *,
    new: Set[str],
    known: Set[str],
    held: Sequence[Mapping[str, Any]],
    is_sequence: bool = False,
) -> list[Lot]:
    """The lots of the input that are to be tested; a held one is the lot that it was.

    Args:
        shards: the input with its hashes.
        new: names of the shards that the champion was not trained on.
        known: SHA-256 of shards and loose files that need no test.
        held: the records of lots that are held.
        is_sequence: whether the items are sequences.
    """
    held_hashes = {record["sha256"] for record in held}
    where: dict[str, tuple[str, str]] = {}  # name and bucket of the loose images by hash
    lots: list[Lot] = []
    for shard in shards:
        if shard.format == "files" and not is_sequence:
            where |= {
                file.sha256: (file.name, shard.name)
                for file in shard.files
                if file.sha256 and not file.fault
            }
        elif shard.sha256 in held_hashes or (shard.name in new and shard.sha256 not in known):
            lots.append(Lot(shard.name, shard.sha256 or "", (shard.name,)))
    fresh = where.keys() - known
    for record in held:
        present = where.keys() & set(record.get("files", {}).values())
        if present:
            lots.append(_lot_of_files(record["shard"], record["sha256"], present, where))
            fresh -= present
    if fresh:
        sha256 = hashlib.sha256("".join(sorted(fresh)).encode()).hexdigest()
        lots.append(_lot_of_files(f"loose-{sha256[:8]}", sha256, fresh, where))
    return lots


def _lot_of_files(
    name: str, sha256: str, hashes: Set[str], where: Mapping[str, tuple[str, str]]
) -> Lot:
    found = sorted((*where[each], each) for each in hashes)
    buckets = sorted({bucket for _, bucket, _ in found})
    return Lot(name, sha256, tuple(buckets), {file: each for file, _, each in found})
