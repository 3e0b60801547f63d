"""The items of a remote split, read through the shard cache: only what is needed is on this node.

With a plan (`prefetch`) the shards of the shuffle window are fetched ahead and stay until they are
done with. Without one a shard is opened when it is asked for and closed again, which suits those
who look at a few items, or at all from front to back.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.prefetch import THREADS, Prefetcher, ShardPlan
from pipeline.settings import NOISE_GROUP
from pipeline.shard_cache import CacheFullError, RemoteFile, ShardCache
from pipeline.shards import ArrowFile, ArrowItems, OpenShard, ShardUse, locate

TOUCH_EVERY_S = 5.0  # what is needed is marked so, for the other processes of the node


@dataclass(frozen=True)
class RemoteShard:
    """A remote shard file with its number of items; rows that are `excluded` are not among them."""

    file: RemoteFile
    count: int
    excluded: Sequence[int] = ()


class CachedItems:
    """The items of remote shards as one sequence; see `Items`. One thread reads.

    Args:
        shards: item ids count through them in this order.
        shape: of an item.
        dtype: of an item.
        cache: of the root; it is closed with the items.
        label_ids: class ids by name; None where labels are numbers.
    """

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        shape: Sequence[int],
        dtype: str,
        cache: ShardCache,
        label_ids: Mapping[str, int] | None,
    ) -> None:
        self._shards = [shard for shard in shards if shard.count]
        self._dtype, self._cache, self._label_ids = np.dtype(dtype), cache, label_ids
        self.shape = tuple(shape)
        self.counts = [shard.count for shard in self._shards]
        self._ends = np.cumsum(self.counts, dtype=np.int64)
        self._open: dict[int, OpenShard] = {}
        self._last = np.zeros(0, np.int64), np.zeros(0, np.int64)  # ids and labels last gathered
        self._touched_at = time.monotonic()
        self._prefetcher: Prefetcher | None = None
        self._plan = self._make_plan(())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The items with these ids, uint8 or float32 [len(ids), *shape].

        Raises:
            DataError: the cache cannot hold what is in use at once.
            StorageError: a shard cannot be read.
        """
        out = np.empty((len(ids), *self.shape), self._dtype)
        labels = np.empty(len(ids), np.int64)
        numbers, rows = locate(self._ends, ids)
        order = self._plan.read(len(ids), np.unique(numbers).tolist())
        due = self._plan.due()
        for number in self._open.keys() - due:
            del self._open[number]
        for number in order:
            here = numbers == number
            shard = self._opened(number)
            out[here] = shard.gather(rows[here])
            labels[here] = shard.labels[rows[here]]
            if self._plan.leave(number):
                # Before the next is opened: its place on the disk may be wanted for that.
                del shard, self._open[number]
        self._last = ids.copy(), labels
        if time.monotonic() - self._touched_at > TOUCH_EVERY_S:
            self._cache.touch(self._files(self._plan.known()))
            self._touched_at = time.monotonic()
        return out

    def labels_of(self, ids: np.ndarray) -> np.ndarray:
        """Their labels, int64, -1 where there is none: at once if these were gathered last."""
        gathered, labels = self._last
        if not np.array_equal(ids, gathered):
            numbers, rows = locate(self._ends, ids)
            labels = np.empty(len(ids), np.int64)
            for number in np.unique(numbers).tolist():
                here = numbers == number
                shard = self._open.get(number) or self._read(number)
                labels[here] = shard.labels[rows[here]]
        return labels.copy()

    def prefetch(self, uses: Iterable[ShardUse]) -> None:
        """Says which shards will be needed, in this order, and begins to fetch them."""
        self._stop()
        self._plan = plan = self._make_plan(uses)

        def fetch(number: int) -> None:
            file = self._shards[number].file
            # The reader is the one to be patient: it waits for a fetch that is under way.
            self._cache.fetch(file, lambda: self._files(plan.known()), tries_again=False)

        self._prefetcher = Prefetcher(plan, fetch)

    def close(self) -> None:
        """Ends the fetching and unmaps what is open; what is cached stays."""
        self._cache.close()
        self._stop()
        self._open.clear()

    def _stop(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _make_plan(self, uses: Iterable[ShardUse]) -> ShardPlan:
        sizes = [shard.file.num_bytes for shard in self._shards]
        return ShardPlan(uses, sizes, self._cache.max_bytes)

    def _opened(self, number: int) -> OpenShard:
        if number not in self._open:
            self._open[number] = self._read(number)
        return self._open[number]

    def _read(self, number: int) -> OpenShard:
        shard = self._shards[number]
        plan, cache = self._plan, self._cache
        plan.wait_for(number)
        if plan.error is not None and not cache.holds(shard.file):
            raise plan.error
        try:
            table = cache.open_table(shard.file, lambda: self._files(plan.known()))
        except CacheFullError:
            try:  # what was fetched ahead can be fetched again
                table = cache.open_table(shard.file, lambda: self._files(plan.staying()))
            except CacheFullError:
                raise self._too_small(number) from None
        return OpenShard(table, shard.excluded, self._label_ids)

    def _files(self, numbers: Iterable[int]) -> list[RemoteFile]:
        return [self._shards[number].file for number in numbers]

    def _too_small(self, number: int) -> DataError:
        needed = self._plan.staying() | {number}
        num_bytes = sum(file.num_bytes for file in self._files(needed))
        return DataError(
            f"The shuffle window has {len(needed):,} Arrow shards of {_mebibytes(num_bytes)} in "
            f"use at once, and data.cache_bytes = {self._cache.max_bytes} "
            f"({_mebibytes(self._cache.max_bytes)}) does not hold them. Raise data.cache_bytes "
            f"to {num_bytes} or more, or lower data.shuffle_window."
        )


def fetch_all(
    shards: Sequence[RemoteShard], cache: ShardCache, classes: Sequence[str] | None
) -> ArrowItems:
    """Brings all of some remote shards onto this node, to be read at random like local ones.

    Raises:
        DataError: they are larger than the cache.
        StorageError: one cannot be read.
    """
    check_whole_fits(shards, cache.max_bytes)
    files = [shard.file for shard in shards]
    pool = ThreadPoolExecutor(THREADS)
    try:
        tables = list(pool.map(lambda file: cache.open_table(file, lambda: files), files))
    finally:
        cache.close()  # no fetch goes on waiting when one has failed
        pool.shutdown(cancel_futures=True)
    local = [ArrowFile(cache.path_of(s.file), s.excluded) for s in shards]
    return ArrowItems(local, classes, tables)


def check_whole_fits(shards: Sequence[RemoteShard], cache_bytes: int) -> None:
    """Refuses shards that the cache cannot hold all at once.

    Raises:
        DataError: with the arithmetic.
    """
    total = sum(shard.file.num_bytes for shard in shards)
    if total > cache_bytes:
        raise DataError(
            f"The data set is to be shuffled as a whole, its remote Arrow shards have "
            f"{_mebibytes(total)}, and data.cache_bytes = {cache_bytes} is "
            f"{_mebibytes(cache_bytes)}. Set data.shuffle_window, which reads them in order, or "
            f"raise data.cache_bytes to {total} or more."
        )


def check_window_fits(
    shards: Sequence[RemoteShard],
    cache_bytes: int,
    *,
    shuffle_window: int,
    global_batch_size: int,
    num_groups: int,
) -> None:
    """Refuses a window that the cache of a node may not hold, before anything is fetched.

    The items that a group shuffles together are consecutive ones: whole shards, and a part of one
    at each end. Which these are changes with the epoch, so the largest are reckoned with.

    Args:
        shards: of the training split.
        cache_bytes: `data.cache_bytes`.
        shuffle_window: `data.shuffle_window`.
        global_batch_size: over all ranks.
        num_groups: groups of 16 positions that the ranks of this node have together.

    Raises:
        DataError: with the arithmetic.
    """
    per_group = max(1, shuffle_window // (global_batch_size // NOISE_GROUP))
    seen = [shard for shard in shards if shard.count]
    sizes = np.array([shard.file.num_bytes for shard in seen], np.float64)
    counts = np.array([shard.count for shard in seen], np.float64)
    order = np.argsort(-sizes / counts)
    whole = np.interp(
        per_group * num_groups,
        np.concatenate([[0], np.cumsum(counts[order])]),
        np.concatenate([[0], np.cumsum(sizes[order])]),
    )
    largest = int(sizes.max(initial=0))
    needed = int(min(whole + 2 * num_groups * largest, sizes.sum()))
    if needed > cache_bytes:
        raise DataError(
            f"data.shuffle_window = {shuffle_window} may have {_mebibytes(needed)} of Arrow "
            f"shards in use at once on a node ({num_groups} x {NOISE_GROUP} positions of the "
            f"batch, for each {NOISE_GROUP} of them {per_group:,} items and two shards of "
            f"{_mebibytes(largest)}), and data.cache_bytes = {cache_bytes} is "
            f"{_mebibytes(cache_bytes)}. Raise data.cache_bytes to {needed} or more, lower "
            "data.shuffle_window, or make shards smaller by data.shard_bytes."
        )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"
