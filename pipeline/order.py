"""Which item is when: the data order of training as a function of (seed, batch, group).

Nothing here has state but small caches, and nothing is replayed: the items of any group of 16
positions of any global batch are computed from their numbers alone, whatever the number of
workers, so that a resumed run continues exactly and a split one sees the same. Why it is so is in
docs/decisions/0006-data-order.md; the randomness of training is in `loader.py`.

Small sets are in one order (`PermutedOrder`): every epoch is a permutation. Large and remote ones
are in another (`WindowedOrder`), in which each group reads shards of its own from front to back.
"""

import functools
import heapq
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.loader import keyed_seed
from pipeline.settings import NOISE_GROUP
from pipeline.shards import ShardUse


class Order(Protocol):
    """The order of one training set, as the loop sees it."""

    def ids(self, batch: int, groups: range) -> np.ndarray:
        """The items of some groups of a global batch, int64 [16 x len(groups)].

        Args:
            batch: number of the global batch, from 0.
            groups: consecutive groups of 16 positions of it.
        """
        ...

    def upcoming_shards(
        self, batch: int, groups: range, ahead: int | None = None
    ) -> Iterator[ShardUse]:
        """The shards that a rank with these groups needs, in the order of need, lazily.

        Args:
            batch: number of the global batch from which on the rank reads.
            groups: that the rank holds.
            ahead: batches to look at; without, there is no end.
        """
        ...


def make_order(
    *, seed: int, counts: Sequence[int], global_batch_size: int, shuffle_window: int | None
) -> Order:
    """The data order of a training set.

    Args:
        seed: of the order.
        counts: items of each Arrow shard, in the order in which ids count through them.
        global_batch_size: a multiple of 16.
        shuffle_window: items that are shuffled together over all groups; None: all of them.

    Raises:
        ValueError: there are no items.
    """
    if sum(counts) == 0:
        raise ValueError("An order needs items, got none. Give a training split that has some.")
    assert global_batch_size % NOISE_GROUP == 0
    if shuffle_window is None:
        return PermutedOrder(seed, counts, global_batch_size)
    return WindowedOrder(seed, counts, global_batch_size, shuffle_window)


def sample_ids(seed: int, positions: np.ndarray, num_samples: int) -> np.ndarray:
    """The sample at each position of the endless training order, epoch after epoch.

    Every epoch is a permutation of its own, drawn from (seed, epoch).

    Args:
        seed: of the order.
        positions: int64, counted from the beginning of training over all workers.
        num_samples: in an epoch.
    """
    epochs = positions // num_samples
    ids = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = _epoch_order(seed, int(epoch), num_samples)[positions[here] % num_samples]
    return ids


class PermutedOrder:
    """Every epoch is a permutation of all items; see `make_order` for the arguments."""

    def __init__(self, seed: int, counts: Sequence[int], global_batch_size: int) -> None:
        self._seed = seed
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._global_batch_size = global_batch_size

    def ids(self, batch: int, groups: range) -> np.ndarray:
        """See `Order`."""
        first = batch * self._global_batch_size + groups.start * NOISE_GROUP
        positions = np.arange(first, first + len(groups) * NOISE_GROUP)
        return sample_ids(self._seed, positions, int(self._ends[-1]))

    def upcoming_shards(
        self, batch: int, groups: range, ahead: int | None = None
    ) -> Iterator[ShardUse]:
        """See `Order`; a shard is needed again and again, so that its use has no end."""
        seen: set[int] = set()
        for number in range(batch, sys.maxsize if ahead is None else batch + ahead):
            if len(seen) == np.count_nonzero(np.diff(self._ends, prepend=0)):
                return
            shards = np.searchsorted(self._ends, self.ids(number, groups), side="right")
            for shard in dict.fromkeys(shards.tolist()):
                if shard not in seen:
                    seen.add(shard)
                    since = (number - batch) * len(groups) * NOISE_GROUP
                    yield ShardUse(shard, since, sys.maxsize)


class WindowedOrder:
    """Each group of 16 positions reads its own shards, shuffled within a window.

    With C groups in a global batch, the shards of an epoch are permuted and laid end to end, and
    the N items of this row are cut into C ranges, one for each group. Group c takes its range from
    front to back, 16 items a batch, in blocks of `shuffle_window` // C items that are shuffled.
    Its ranges follow each other without a gap: its p-th item is number p C + c of all that are
    seen, so that the epoch of that item is (p C + c) // N, and one group's epoch is at most an item
    longer than another's. See `make_order` for the arguments.
    """

    def __init__(
        self, seed: int, counts: Sequence[int], global_batch_size: int, shuffle_window: int
    ) -> None:
        self._seed = seed
        self._counts = np.array(counts, np.int64)
        self._first_ids = np.cumsum(self._counts) - self._counts
        self._num_items = int(self._counts.sum())
        self._num_slots = global_batch_size // NOISE_GROUP
        self._block_size = max(1, shuffle_window // self._num_slots)
        # The current block and the next of every slot, so twice the window at most.
        self._block_ids = functools.lru_cache(2 * self._num_slots)(self._shuffle_block)
        self._epoch_row = functools.lru_cache(4)(self._lay_out_epoch)

    def ids(self, batch: int, groups: range) -> np.ndarray:
        """See `Order`."""
        ids = np.empty(len(groups) * NOISE_GROUP, np.int64)
        filled = 0
        for slot in groups:
            position, end = batch * NOISE_GROUP, (batch + 1) * NOISE_GROUP
            while position < end:
                block = self._block_at(slot, position)
                stop = min(end, block.end)
                part = self._block_ids(block)[position - block.begin : stop - block.begin]
                ids[filled : filled + len(part)] = part
                filled, position = filled + len(part), stop
        return ids

    def upcoming_shards(
        self, batch: int, groups: range, ahead: int | None = None
    ) -> Iterator[ShardUse]:
        """See `Order`; of the blocks begun before `batch`, all shards are named."""
        a_batch = len(groups) * NOISE_GROUP
        slots = [self._slot_shards(slot, batch * NOISE_GROUP) for slot in groups]
        for first_batch, last_batch, shard in heapq.merge(*slots, key=lambda use: use[0]):
            if ahead is not None and first_batch >= batch + ahead:
                return
            since = max(0, first_batch - batch) * a_batch
            yield ShardUse(shard, since, (last_batch + 1 - batch) * a_batch)

    def _slot_shards(self, slot: int, position: int) -> Iterator[tuple[int, int, int]]:
        """First batch, last batch and shard of each use by a slot, from a position on."""
        epoch = (position * self._num_slots + slot) // self._num_items
        while True:
            begin, size, first = self._range_of(slot, epoch)
            row, ends = self._epoch_row(epoch)
            # Whole blocks: shuffled together, all of a block's shards are needed until its end.
            offset = max(0, position - begin) // self._block_size * self._block_size
            if offset < size:
                of_row = np.searchsorted(ends, [first + offset, first + size - 1], side="right")
                for k in range(int(of_row[0]), int(of_row[1]) + 1):
                    stop = min(int(ends[k]) - first, size)
                    start = max(int(ends[k]) - int(self._counts[row[k]]) - first, offset)
                    if start == stop:
                        continue  # a shard without items
                    since = start // self._block_size * self._block_size
                    until = min(-(-stop // self._block_size) * self._block_size, size)
                    first_batch = (begin + since) // NOISE_GROUP
                    yield first_batch, (begin + until - 1) // NOISE_GROUP, int(row[k])
            epoch += 1

    def _block_at(self, slot: int, position: int) -> "_Block":
        """The block that holds a position of a slot's endless stream of items."""
        epoch = (position * self._num_slots + slot) // self._num_items
        begin, size, first = self._range_of(slot, epoch)
        offset = (position - begin) // self._block_size * self._block_size
        end = min(offset + self._block_size, size)
        return _Block(slot, epoch, begin + offset, begin + end, first + offset)

    def _range_of(self, slot: int, epoch: int) -> tuple[int, int, int]:
        """A slot's part of an epoch: its first position in the slot's stream, its size, and its
        first place in the epoch's row of items.
        """
        total, slots = self._num_items, self._num_slots

        def of_slot(number: int) -> int:
            """Of the first so many items that are seen over all slots, those of this one."""
            return (number + slots - 1 - slot) // slots

        def of_slots_before(number: int) -> int:
            """And those of the slots before it."""
            return number // slots * slot + min(number % slots, slot)

        begin, end = epoch * total, (epoch + 1) * total
        first = of_slots_before(end) - of_slots_before(begin)
        return of_slot(begin), of_slot(end) - of_slot(begin), first

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch as they lie in its row, and where each ends there."""
        bits = np.random.Philox(key=keyed_seed("shards", self._seed, epoch))
        row = np.random.Generator(bits).permutation(len(self._counts))
        return row, np.cumsum(self._counts[row])

    def _shuffle_block(self, block: "_Block") -> np.ndarray:
        """The items of a block, shuffled."""
        row, ends = self._epoch_row(block.epoch)
        places = np.arange(block.first, block.first + block.end - block.begin)
        key = keyed_seed("window", self._seed, block.epoch, block.slot, block.first)
        np.random.Generator(np.random.Philox(key=key)).shuffle(places)
        k = np.searchsorted(ends, places, side="right")
        shards = row[k]
        return self._first_ids[shards] + places - (ends[k] - self._counts[shards])


class _Block(NamedTuple):
    """Consecutive items of a slot's stream that are shuffled together, [begin, end)."""

    slot: int
    epoch: int
    begin: int
    end: int
    first: int  # place of the first in the epoch's row of items


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    bits = np.random.Philox(key=keyed_seed("order", seed, epoch))
    return np.random.Generator(bits).permutation(num_samples)
