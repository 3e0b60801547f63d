"""Items read through the shard cache, and training from remote storage with little of it."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import prefetch
from pipeline.cached_items import CachedItems, RemoteShard, check_window_fits, fetch_all
from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.dataset import open_split
from pipeline.errors import DataError, StorageError
from pipeline.order import make_order
from pipeline.prefetch import ShardPlan
from pipeline.shard_cache import RemoteFile, ShardCache, cache_directory
from pipeline.shards import ArrowItems, front_to_back, write_arrow
from pipeline.storage import LocalStorage, hash_content, open_storage, size_of_content
from pipeline.train import train_in_process

SECONDS = 30  # after which a test that waits has failed
ITEMS = 32  # of a shard
PIXELS = 8 * 8


class Bucket:
    """Shards of equal size below a root on the S3 server, each item of its number's value."""

    def __init__(self, store: Any, bucket: str, directory: Path) -> None:
        self.store, self.storage = store, open_storage(f"s3://{bucket}/root")
        self.directory = directory
        self.shards: list[RemoteShard] = []
        self.names: list[str | None] = []  # labels of all items

    def add(self, excluded: tuple[int, ...] = (), label: str | None = "a") -> None:
        number = len(self.shards)
        first = number * ITEMS
        values = (np.arange(first, first + ITEMS) % 251).astype(np.uint8)
        pixels = np.broadcast_to(values[:, None, None, None], (ITEMS, 1, 8, 8))
        content = write_arrow(np.ascontiguousarray(pixels), [label] * ITEMS, ["x"] * ITEMS)
        path = f"d/{number:02d}.arrow"
        self.storage.create(path, content)
        file = RemoteFile(path, hash_content(content), size_of_content(content))
        self.shards.append(RemoteShard(file, ITEMS - len(excluded), excluded))

    def open(
        self, room_for: float, shards: list[RemoteShard] | None = None, **options: Any
    ) -> CachedItems:
        """With room in the cache for so many shards."""
        max_bytes = int(room_for * self.shards[0].file.num_bytes)
        cache = ShardCache(self.storage, max_bytes, self.directory, **options)
        return CachedItems(shards or self.shards, (1, 8, 8), "uint8", cache, {"a": 0, "b": 1})

    def fetched(self) -> list[int]:
        """The numbers of the shards read from the root, in order."""
        return [int(path[-8:-6]) for path in self.store.read() if path.endswith(".arrow")]


@pytest.fixture
def bucket(object_store: Any, tmp_path: Path) -> Bucket:
    store, name = object_store
    return Bucket(store, name, tmp_path / "cache")


def test_reads_what_local_items_read(bucket: Bucket, tmp_path: Path) -> None:
    for excluded, label in (((), "a"), ((0, 5), "b"), (tuple(range(ITEMS)), "b"), ((31,), None)):
        bucket.add(excluded, label)
    items = bucket.open(room_for=9)
    cache = ShardCache(bucket.storage, 1 << 20, tmp_path / "other")
    local = fetch_all(bucket.shards, cache, ["a", "b"])
    assert isinstance(local, ArrowItems)
    assert len(items) == len(local) == 4 * ITEMS - 35
    assert items.counts == local.counts == [32, 30, 31]
    assert items.shape == local.shape == (1, 8, 8)
    ids = np.random.default_rng(0).integers(0, len(items), 100)
    assert np.array_equal(items.gather(ids), local.gather(ids))
    assert np.array_equal(items.labels_of(ids), local.labels_of(ids))
    everything = np.arange(len(items))
    assert np.array_equal(items.labels_of(everything), local.labels)
    items.close()


def test_only_what_is_looked_at_is_fetched(bucket: Bucket) -> None:
    for _ in range(6):
        bucket.add()
    with contextlib.closing(bucket.open(room_for=2)) as items:
        assert items.gather(np.array([70, 3, 65])).reshape(3, -1)[:, 0].tolist() == [70, 3, 65]
        assert items.labels_of(np.array([4])).tolist() == [0]
        assert bucket.fetched() == [0, 2]


def test_all_can_be_read_from_front_to_back_with_room_for_one(bucket: Bucket) -> None:
    for _ in range(5):
        bucket.add()
    with contextlib.closing(bucket.open(room_for=1)) as items:
        everything = np.arange(len(items))
        items.prefetch(front_to_back(items.counts))
        assert np.array_equal(items.gather(everything)[:, 0, 0, 0], everything % 251)
        assert items.labels_of(everything).tolist() == [0] * len(items)


def test_two_epochs_of_twelve_shards_through_a_cache_of_three(bucket: Bucket) -> None:
    for k in range(12):
        bucket.add(excluded=(3, 4) if k == 7 else ())
    items = bucket.open(room_for=3)
    cache = items._cache
    sizes: list[int] = []

    def measure(method: str, path: str) -> bool:
        sizes.append(cache.num_bytes())
        return False

    bucket.store.fails = measure
    order = make_order(
        seed=1, counts=items.counts, global_batch_size=16, shuffle_window=ITEMS * 3 // 4
    )
    check_window_fits(
        bucket.shards,
        cache.max_bytes,
        shuffle_window=ITEMS * 3 // 4,
        global_batch_size=16,
        num_groups=1,
    )
    groups, total = range(1), len(items)
    items.prefetch(order.upcoming_shards(0, groups))
    seen: list[int] = []
    with contextlib.closing(items):
        while len(seen) < 2 * total:
            ids = order.ids(len(seen) // 16, groups)
            found = items.gather(ids)[:, 0, 0, 0]
            rows = ids + np.where(ids >= 7 * ITEMS + 3, 2, 0)  # two of shard 7 are not seen
            assert np.array_equal(found, rows % 251)
            seen += ids.tolist()
    for epoch in range(2):
        assert sorted(seen[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert max(sizes) <= cache.max_bytes
    assert cache.num_bytes() <= cache.max_bytes
    # Each once an epoch, but those at hand when the next began; and what was fetched ahead.
    fetched = bucket.fetched()
    assert 24 - 3 <= len(fetched) <= 24 + 2
    assert all(fetched.count(shard) <= 3 for shard in range(12))


def test_shards_come_before_they_are_needed(bucket: Bucket, monkeypatch: Any) -> None:
    for _ in range(8):
        bucket.add()
    items = bucket.open(room_for=4)
    events: list[tuple[str, int]] = []
    there = {shard: threading.Event() for shard in range(8)}
    fetch = ShardCache.fetch

    def record(self: ShardCache, file: RemoteFile, keep: Any, **more: Any) -> Path:
        shard = int(file.path[-8:-6])
        before = self.holds(file)
        path = fetch(self, file, keep, **more)
        if not before:
            events.append((threading.current_thread().name, shard))
            there[shard].set()
        return path

    monkeypatch.setattr(ShardCache, "fetch", record)
    with contextlib.closing(items):
        items.prefetch(front_to_back(items.counts))
        for batch in range(16):
            now = batch // 2
            for shard in range(now, min(now + 2, 8)):
                # The next one comes while this one is read, without being asked for.
                assert there[shard].wait(SECONDS)
            items.gather(np.arange(16 * batch, 16 * batch + 16))
            events.append(("reader", now))
    assert sorted(shard for who, shard in events if who != "reader") == list(range(8))
    assert all(who == "reader" or who.startswith("prefetch-") for who, _ in events)
    for shard in range(1, 8):
        fetched = next(k for k, (who, n) in enumerate(events) if who != "reader" and n == shard)
        last_of_the_one_before = max(k for k, e in enumerate(events) if e == ("reader", shard - 1))
        assert fetched < last_of_the_one_before


def test_a_window_that_does_not_fit_is_refused_with_the_arithmetic(bucket: Bucket) -> None:
    for k in range(6):
        bucket.add(excluded=tuple(range(ITEMS)) if k == 3 else ())  # one is never opened
    size = bucket.shards[0].file.num_bytes

    def check(window: int, batch: int, groups: int, room_for: int = 4) -> None:
        check_window_fits(
            bucket.shards,
            room_for * size,
            shuffle_window=window,
            global_batch_size=batch,
            num_groups=groups,
        )

    check(64, 16, 1)
    with pytest.raises(DataError) as caught:
        check(96, 16, 1)
    assert f"Raise data.cache_bytes to {5 * size} or more" in str(caught.value)
    assert "(1 x 16 positions of the batch, for each 16 of them 96 items and" in str(caught.value)
    # All of the data set is the most that can be needed.
    with pytest.raises(DataError, match=f"cache_bytes to {5 * size} or more"):
        check(1 << 20, 64, 4)
    check(1 << 20, 64, 4, room_for=5)
    check(64, 64, 1)


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    window=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_what_is_reckoned_with_is_never_exceeded(
    counts: list[int], slots: int, window: int, seed: int
) -> None:
    files = [RemoteFile(str(k), str(k), 10 + 3 * count) for k, count in enumerate(counts)]
    shards = [RemoteShard(f, count) for f, count in zip(files, counts, strict=True)]
    batch = slots * 16
    order = make_order(seed=seed, counts=counts, global_batch_size=batch, shuffle_window=window)
    sizes = [file.num_bytes for file in files]
    plan = ShardPlan(order.upcoming_shards(0, range(slots)), sizes, sum(sizes))
    most = 0
    for number in range(30):
        shards_of = np.searchsorted(np.cumsum(counts), order.ids(number, range(slots)), "right")
        touched = set(shards_of.tolist())
        plan.read(batch, touched)
        most = max(most, sum(sizes[shard] for shard in plan.staying()))
        for shard in touched:
            plan.leave(shard)
    check_window_fits(
        shards,
        sum(sizes),
        shuffle_window=window,
        global_batch_size=batch,
        num_groups=slots,
    )
    if most > 1:
        with pytest.raises(DataError, match=r"Raise data\.cache_bytes"):
            check_window_fits(
                shards,
                most - 1,
                shuffle_window=window,
                global_batch_size=batch,
                num_groups=slots,
            )


def test_a_cache_too_small_for_what_is_in_use_is_said(bucket: Bucket) -> None:
    for _ in range(6):
        bucket.add()
    size = bucket.shards[0].file.num_bytes
    order = make_order(seed=0, counts=[ITEMS] * 6, global_batch_size=16, shuffle_window=1000)
    with contextlib.closing(bucket.open(room_for=3)) as items:
        items.prefetch(order.upcoming_shards(0, range(1)))
        message = (
            rf"6 Arrow shards of .* MiB in use at once, and data\.cache_bytes = {3 * size} .* "
            rf"Raise data\.cache_bytes to {6 * size} or more, or lower data\.shuffle_window"
        )
        with pytest.raises(DataError, match=message):
            items.gather(order.ids(0, range(1)))


def test_a_fault_of_the_background_reaches_the_reader(bucket: Bucket, tmp_path: Path) -> None:
    for _ in range(6):
        bucket.add()
    bucket.storage.replace(bucket.shards[2].file.path, b"damaged")
    with contextlib.closing(bucket.open(room_for=4)) as items:
        items.prefetch(front_to_back(items.counts))
        items.gather(np.arange(32))
        items.gather(np.arange(32, 64))  # what is there is read
        with pytest.raises(StorageError, match=r"02\.arrow is missing or not what"):
            items.gather(np.arange(64, 96))
        assert bucket.fetched().count(2) == 1  # it was the thread's error


def test_an_outage_while_what_is_needed_is_cached_is_over_when_it_is_over(
    bucket: Bucket, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prefetch, "AWAY_DELAY_S", 0.01)
    for _ in range(6):
        bucket.add()
    tries = threading.Semaphore(0)

    def be_away(method: str, path: str) -> bool:
        if path.endswith(".arrow"):
            tries.release()
        return True

    with contextlib.closing(bucket.open(room_for=2, patience_s=0)) as items:
        items.prefetch(front_to_back(items.counts))
        items.gather(np.arange(32))
        items.gather(np.arange(32, 48))
        bucket.store.fails = be_away  # the third shard has no room before the second is read
        items.gather(np.arange(48, 64))
        for _ in range(8):
            assert tries.acquire(timeout=SECONDS)
        bucket.store.heal()
        everything = np.arange(64, len(items))
        for ids in np.split(everything, 8):
            assert np.array_equal(items.gather(ids)[:, 0, 0, 0], ids % 251)


def test_the_reader_is_as_patient_as_it_is_told(bucket: Bucket) -> None:
    for _ in range(3):
        bucket.add()
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if sum(waited) >= 100:
            bucket.store.heal()

    bucket.store.fails = lambda method, path: path.endswith(".arrow")
    options = {"patience_s": 120, "pause": pause, "clock": lambda: sum(waited)}
    with contextlib.closing(bucket.open(room_for=3, **options)) as items:
        items.prefetch(front_to_back(items.counts))
        assert items.gather(np.arange(16))[:, 0, 0, 0].tolist() == list(range(16))
    assert sum(waited) == 105


def test_a_plan_can_be_replaced(bucket: Bucket) -> None:
    for _ in range(6):
        bucket.add()
    items = bucket.open(room_for=3)
    order = make_order(seed=0, counts=items.counts, global_batch_size=16, shuffle_window=8)
    for first in (0, 9, 4):  # back to an earlier batch, as after a rewind
        items.prefetch(order.upcoming_shards(first, range(1)))
        for batch in range(first, first + 5):
            ids = order.ids(batch, range(1))
            assert np.array_equal(items.gather(ids)[:, 0, 0, 0], ids % 251)
    assert len(items._open) <= 2
    items.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch-")]


@pytest.fixture
def remote_and_local(
    object_store: Any, tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> Any:
    """The same data set of twelve shards below two roots, and its manifest."""
    _, name = object_store
    remote, local = open_storage(f"s3://{name}/root"), LocalStorage(str(tmp_path / "root"))
    pixels = np.random.default_rng(0).integers(0, 256, (384, 1, 8, 8), np.uint8)
    manifests = [write_data_set(storage, pixels, num_shards=12) for storage in (remote, local)]
    assert manifests[0] == manifests[1]
    return remote, local, manifests[0]


def test_a_remote_split_is_opened_as_it_is_going_to_be_read(
    remote_and_local: Any, object_store: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYDIFFUSION_CACHE", str(tmp_path / "cache"))
    store, _ = object_store
    remote, local, manifest = remote_and_local
    ids = np.random.default_rng(1).integers(0, 384, 64)
    expected = open_split(local, manifest, "train").gather(ids)
    in_order = open_split(remote, manifest, "train", whole=False, cache_bytes=20_000)
    assert isinstance(in_order, CachedItems)
    assert not [path for path in store.read() if path.endswith(".arrow")]
    assert np.array_equal(in_order.gather(ids), expected)
    whole = open_split(remote, manifest, "train", cache_bytes=100_000)
    assert isinstance(whole, ArrowItems)
    assert np.array_equal(whole.gather(ids), expected)
    with pytest.raises(DataError, match=r"Set data\.shuffle_window, which reads them in order, or"):
        open_split(remote, manifest, "train", cache_bytes=20_000)
    assert (cache_directory() / "shards").is_dir()


def test_training_from_s3_equals_training_from_disk(
    remote_and_local: Any, tiny_config: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RAYDIFFUSION_CACHE", str(tmp_path / "cache"))
    remote, local, manifest = remote_and_local
    settings = ["train.num_steps=14", "train.checkpoint_every=7", "data.shuffle_window=64"]
    config = load_config(tiny_config, [*settings, "data.cache_bytes=26000"])  # 12 have 36,000
    found = []
    for storage in (remote, local):
        train_in_process(config, storage, "t", manifest)
        found.append(CheckpointStore(storage, "t").load(14))
    assert found[0] is not None
    assert found[1] is not None
    remote_rows, local_rows = (
        [(row["global_step"], row["loss"], row["grad_norm"]) for row in checkpoint.history]
        for checkpoint in found
    )
    assert remote_rows == local_rows
    assert all(torch.equal(found[0].ema[name], found[1].ema[name]) for name in found[1].ema)
    opened: list[float] = []
    make = ShardCache.__init__

    def record(self: ShardCache, *arguments: Any, patience_s: float, **options: Any) -> None:
        opened.append(patience_s)
        make(self, *arguments, patience_s=patience_s, **options)

    monkeypatch.setattr(ShardCache, "__init__", record)
    patient = [*settings, "data.cache_bytes=26000", "train.storage_patience_s=77"]
    train_in_process(load_config(tiny_config, patient), remote, "patient", manifest)
    assert opened == [77]
    small = load_config(tiny_config, [*settings, "data.cache_bytes=9000"])
    with pytest.raises(DataError, match=r"data\.shuffle_window = 64 may have"):
        train_in_process(small, remote, "small", manifest)
    without = load_config(tiny_config, [*settings[:2], "data.cache_bytes=9000"])
    with pytest.raises(DataError, match=r"Set data\.shuffle_window"):
        train_in_process(without, remote, "without", manifest)
