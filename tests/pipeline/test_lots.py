"""What is tested as one: shards, and new loose images without the old ones beside them."""

from collections.abc import Sequence
from typing import Any

from pipeline.identities import InputFile
from pipeline.lots import Lot, find_lots
from pipeline.sources import InputShard


def file(name: str, sha256: str, fault: str = "") -> InputFile:
    return InputFile(name, f"/{name}", num_bytes=1, identity=None, sha256=sha256, fault=fault)


def tar(name: str, sha256: str) -> InputShard:
    return InputShard(name, "tar", (file(name, sha256),))


def bucket(number: int, *files: InputFile) -> InputShard:
    return InputShard(f"files-{number}", "files", files)


def lots_of(
    shards: Sequence[InputShard],
    known: Sequence[str] = (),
    held: Sequence[dict[str, Any]] = (),
    **options: bool,
) -> list[Lot]:
    new = {shard.name for shard in shards if shard.name != "old.tar"}
    return find_lots(shards, new=new, known=set(known), held=held, **options)


def test_a_new_shard_is_a_lot_and_one_that_is_known_is_none() -> None:
    shards = [tar("old.tar", "o"), tar("known.tar", "k"), tar("new.tar", "n")]
    assert lots_of(shards, known=["k"]) == [Lot("new.tar", "n", ("new.tar",))]


def test_a_held_shard_is_a_lot_though_the_champion_was_trained_on_it() -> None:
    held = [{"shard": "old.tar", "sha256": "o"}]
    assert lots_of([tar("old.tar", "o")], held=held) == [Lot("old.tar", "o", ("old.tar",))]


def test_new_loose_images_are_one_lot_wherever_they_are() -> None:
    shards = [bucket(0, file("a", "1"), file("b", "2")), bucket(1, file("c", "3"), file("d", "4"))]
    (lot,) = lots_of(shards, known=["1", "4"])
    assert (lot.inputs, lot.files) == (("files-0", "files-1"), {"b": "2", "c": "3"})
    assert lot.name == f"loose-{lot.sha256[:8]}"
    moved = [bucket(2, *(f for shard in shards for f in shard.files))]
    (same,) = lots_of(moved, known=["1", "4"])
    assert (same.name, same.inputs) == (lot.name, ("files-2",))
    assert lots_of(shards, known=["1", "2", "3", "4"]) == []


def test_held_loose_images_stay_a_lot_of_their_own() -> None:
    shards = [bucket(0, file("a", "1"), file("b", "2"), file("c", "3"))]
    held = [{"shard": "loose-x", "sha256": "x", "files": {"b": "2", "gone": "9"}}]
    first, second = lots_of(shards, known=["1"], held=held)
    assert first == Lot("loose-x", "x", ("files-0",), {"b": "2"})
    assert second.files == {"c": "3"}
    gone = [{"shard": "loose-x", "sha256": "x", "files": {"gone": "9"}}]
    assert [lot.files for lot in lots_of(shards, known=["1", "2", "3"], held=gone)] == []


def test_what_is_no_file_is_not_tested() -> None:
    assert lots_of([bucket(0, file("a", "1", fault="a broken link"))]) == []


def test_loose_sequences_are_tested_by_the_bucket() -> None:
    shard = bucket(0, file("a", "1"), file("b", "2"))
    assert lots_of([shard], known=["1"], is_sequence=True) == [
        Lot("files-0", shard.sha256 or "", ("files-0",))
    ]
