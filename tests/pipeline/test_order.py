"""The order of items: every item once an epoch, the same for any number of workers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import Order, make_order, sample_ids
from pipeline.settings import NOISE_GROUP

counts_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum)
num_slots = st.integers(1, 5)
windows = st.integers(1, 300)


def windowed(counts: list[int], slots: int, window: int, seed: int = 0) -> Order:
    return make_order(
        seed=seed,
        counts=counts,
        global_batch_size=slots * NOISE_GROUP,
        shuffle_window=window,
    )


def streams(order: Order, slots: int, num_batches: int) -> np.ndarray:
    """What each slot takes, one after the other, [slots, 16 x batches]."""
    batches = [order.ids(batch, range(slots)) for batch in range(num_batches)]
    by_slot = np.stack(batches).reshape(num_batches, slots, NOISE_GROUP)
    return by_slot.swapaxes(0, 1).reshape(slots, -1)


@given(seed=st.integers(0, 2**40), num_samples=st.integers(1, 200), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(seed: int, num_samples: int, epoch: int) -> None:
    positions = np.arange(num_samples) + epoch * num_samples
    assert sorted(sample_ids(seed, positions, num_samples)) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    first, second = (sample_ids(0, np.arange(100) + e * 100, 100) for e in (0, 1))
    assert first.tolist() != second.tolist()
    assert sample_ids(1, np.arange(100), 100).tolist() != first.tolist()


def test_without_a_window_batches_follow_each_other_in_the_permutation() -> None:
    order = make_order(seed=3, counts=[50, 0, 21], global_batch_size=32, shuffle_window=None)
    together = np.concatenate([order.ids(batch, range(2)) for batch in range(9)])
    assert np.array_equal(together, sample_ids(3, np.arange(9 * 32), 71))


@given(counts=counts_of_shards, slots=num_slots, window=windows, epochs=st.integers(1, 4))
def test_each_item_is_seen_once_an_epoch(
    counts: list[int], slots: int, window: int, epochs: int
) -> None:
    total = sum(counts)
    num_batches = -(-epochs * total // (slots * NOISE_GROUP))
    # The items of an epoch are dealt to the slots in turn; each takes its own in its own order.
    in_turn = streams(windowed(counts, slots, window), slots, num_batches).T.ravel()
    for epoch in range(epochs):
        seen = in_turn[epoch * total : (epoch + 1) * total]
        assert sorted(seen) == list(range(total))


@given(
    counts=counts_of_shards,
    window=st.none() | windows,
    batch=st.integers(0, 10**9),
    per_rank=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 3, 4]),
)
def test_any_number_of_workers_sees_the_same_batch(
    counts: list[int], window: int | None, batch: int, per_rank: int, world_size: int
) -> None:
    slots = per_rank * world_size

    def order() -> Order:
        return make_order(
            seed=7,
            counts=counts,
            global_batch_size=slots * NOISE_GROUP,
            shuffle_window=window,
        )

    ranks = [range(r * per_rank, (r + 1) * per_rank) for r in range(world_size)]
    together = np.concatenate([order().ids(batch, groups) for groups in ranks])
    assert np.array_equal(together, order().ids(batch, range(slots)))


@given(counts=counts_of_shards, slots=num_slots, window=windows)
def test_a_block_of_a_slot_touches_only_neighbouring_shards(
    counts: list[int], slots: int, window: int
) -> None:
    order, size = windowed(counts, slots, window), max(1, window // slots)
    ends = np.cumsum(counts)
    first_epoch = [(sum(counts) + slots - 1 - slot) // slots for slot in range(slots)]
    taken = streams(order, slots, -(-max(first_epoch) // NOISE_GROUP) or 1)
    for slot, length in enumerate(first_epoch):
        shards = np.searchsorted(ends, taken[slot, :length], side="right")
        for start in range(0, length, size):
            touched = set(shards[start : start + size].tolist())
            # All but the first and the last are used up by it.
            inside = sum(sorted(counts[shard] for shard in touched)[: len(touched) - 2])
            assert inside <= min(size, length - start) - min(2, len(touched))


@given(counts=counts_of_shards, slots=num_slots, window=windows, batch=st.integers(0, 50))
def test_shards_are_announced_for_the_time_in_which_they_are_asked_for(
    counts: list[int], slots: int, window: int, batch: int
) -> None:
    order, ahead = windowed(counts, slots, window), 6
    groups = range(slots // 2, slots)
    uses = list(order.upcoming_shards(batch, groups, ahead))
    assert [use.since for use in uses] == sorted(use.since for use in uses)
    ends, a_batch = np.cumsum(counts), len(groups) * NOISE_GROUP
    touched = [
        set(np.searchsorted(ends, order.ids(batch + k, groups), side="right").tolist())
        for k in range(ahead)
    ]
    for k in range(ahead):
        now = k * a_batch
        assert touched[k] <= {u.shard for u in uses if u.since < now + a_batch and u.until > now}
    for use in uses:
        if use.since > 0 and use.until <= ahead * a_batch:
            first, last = use.since // a_batch, use.until // a_batch
            assert any(use.shard in touched[k] for k in range(first, last))


@given(counts=counts_of_shards, slots=num_slots, window=st.none() | windows)
def test_the_announcement_goes_on_and_can_be_cut(
    counts: list[int], slots: int, window: int | None
) -> None:
    order = make_order(
        seed=0, counts=counts, global_batch_size=slots * NOISE_GROUP, shuffle_window=window
    )
    endless = order.upcoming_shards(5, range(slots))
    cut = list(order.upcoming_shards(5, range(slots), 3))
    assert list(itertools.islice(endless, len(cut))) == cut
    assert all(use.since < 3 * slots * NOISE_GROUP for use in cut)
    assert all(counts[use.shard] for use in cut)


def test_far_away_batches_are_computed_at_once() -> None:
    # Replaying even a millionth of what comes before would not end.
    order = windowed([10_000] * 1000, 64, 1 << 16)
    far = order.ids(10**9, range(64))
    assert len(far) == 1024
    uses = order.upcoming_shards(10**9, range(64))
    first = {next(uses).shard for _ in range(64 * 4)}
    assert set(np.unique(far // 10_000).tolist()) <= first


def test_an_item_has_other_neighbours_in_the_next_epoch() -> None:
    order = windowed([64] * 16, 2, 128)
    taken = streams(order, 2, 64)[0]
    first, second = set(taken[:512].tolist()), set(taken[512:].tolist())
    assert 0 < len(first & second) < 400  # about half of them: shards are dealt anew
    assert not np.array_equal(np.sort(taken[:64]), np.sort(taken[512:576]))
    assert np.any(np.diff(taken[:64]) < 0)


def test_no_items_are_refused() -> None:
    with pytest.raises(ValueError, match="needs items, got none"):
        make_order(seed=0, counts=[0, 0], global_batch_size=16, shuffle_window=None)


@pytest.mark.parametrize(
    ("counts", "window"), [([256], 256), ([16] * 16, 1)], ids=["within a window", "of the shards"]
)
def test_each_seed_and_each_epoch_has_an_order_of_its_own(counts: list[int], window: int) -> None:
    def epochs(seed: int) -> list[list[int]]:
        taken = streams(windowed(counts, 1, window, seed), 1, 2 * 256 // NOISE_GROUP)[0]
        return [taken[:256].tolist(), taken[256:].tolist()]

    (first, second), (other, _) = epochs(0), epochs(1)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(256))
    assert first != second
    assert first != other
