"""How many images are behind what cannot be read: the arithmetic of the estimate."""

from types import SimpleNamespace
from typing import Any

from pipeline.hidden import estimate_hidden

GOOD = 100  # images in as many bytes as each shard has


def estimate(*units: tuple[int, list[dict[str, Any]]]) -> list[int]:
    """The counts of what shards of 1,000 bytes refused, beside a good one."""
    made = [(GOOD, []), *units]
    shards: Any = [SimpleNamespace(format="zip", files=(), num_bytes=1000) for _ in made]
    manifests = [
        {"splits": {"train": {"count": stored}}, "refused": refused} for stored, refused in made
    ]
    return [item["count"] for item in estimate_hidden(shards, manifests)]


def refusal(reason: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"source": "x", "reason": reason, "detail": "", "count": count, **more}


def test_what_was_read_of_a_damaged_shard_is_not_hidden_and_tells_nothing_of_sizes() -> None:
    hides = refusal("unreadable_shard", hides_more=True)
    assert estimate((30, [hides])) == [GOOD - 30]
    assert estimate((30, [refusal("undecodable", 5), hides])) == [5, GOOD - 35]
    assert estimate((GOOD, [hides])) == [1]  # at least


def test_the_number_of_a_damaged_end_counts_and_tells_nothing_of_others() -> None:
    hides = refusal("unreadable_shard", hides_more=True)
    hostile = refusal("unreadable_tail", 10**9)
    assert estimate((0, [hides]), (40, [hostile])) == [GOOD, 10**9]
