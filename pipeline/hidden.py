"""How many images lie behind what cannot be read: estimated over all units of a data set.

A damaged archive is one refusal, and may hide a thousand images. Were it counted as one, it would
pass any limit on what may be refused.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.sources import InputShard


def estimate_hidden(
    shards: Sequence[InputShard], units: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What the units refused, each with the number of images that it stands for.

    What `hides_more` images has the bytes of its file over the mean bytes per image of what was
    read of the same format, or of any where there is none; at least 1. A file without bytes has
    the mean number of images of a shard. The detail says the estimate.

    Args:
        shards: the input.
        units: the manifests of the shards' results, in the same order.
    """
    parts = [_Part(shard, unit) for shard, unit in zip(shards, units, strict=True)]
    return [_with_count(item, part, parts) for part in parts for item in part.unit["refused"]]


@dataclass
class _Part:
    """A shard with its unit, and the sizes that tell of others."""

    shard: InputShard
    unit: dict[str, Any]
    file_bytes: dict[str, int] = field(init=False)
    num_known: int = field(init=False)  # images stored, or refused and counted
    read_bytes: int = field(init=False)  # that hold these; 0 where that is not known

    def __post_init__(self) -> None:
        self.file_bytes = {file.name: file.num_bytes for file in self.shard.files}
        reasons, hiding = Counter[str](), 0
        for item in self.unit["refused"]:
            if item.get("hides_more"):
                hiding += self.bytes_of(item)
            else:
                reasons[item["reason"]] += item["count"]
        stored = sum(split["count"] for split in self.unit["splits"].values())
        self.num_known = stored + reasons.total()
        # The size of a damaged end is not known, and its number may be a hostile one.
        self.read_bytes = self.shard.num_bytes - hiding if "unreadable_tail" not in reasons else 0

    def bytes_of(self, item: dict[str, Any]) -> int:
        """The size of the file that a refusal is about: a loose one, or the shard."""
        if self.shard.format == "files":
            return self.file_bytes.get(item["source"], 0)
        return self.shard.num_bytes


def _with_count(item: dict[str, Any], part: _Part, parts: Sequence[_Part]) -> dict[str, Any]:
    item = dict(item)
    if not item.pop("hides_more", False):
        return item
    is_loose = part.shard.format == "files"
    good = [p for p in parts if p.read_bytes > 0 and p.num_known]
    good = [p for p in good if p.shard.format == part.shard.format] or good
    if not good:
        return item | {"detail": f"{item['detail']} (how many images is not known)"}
    known = sum(p.num_known for p in good)
    num_bytes = part.bytes_of(item)
    if num_bytes:
        estimate = num_bytes * known / sum(p.read_bytes for p in good)
        estimate -= 0 if is_loose else part.num_known
    else:
        estimate = 1 if is_loose else known / len(good)
    count = max(1, round(estimate))
    noun = "image" if count == 1 else "images"
    return item | {"count": count, "detail": f"{item['detail']} (about {count:,} {noun})"}
