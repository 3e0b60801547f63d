"""The plan of a reader, and the threads that work it off."""

import itertools
import threading

import pytest

from pipeline import prefetch
from pipeline.prefetch import Prefetcher, ShardPlan
from pipeline.shard_cache import CacheFullError, PassingError
from pipeline.shards import ShardUse

SECONDS = 10  # after which a test that waits has failed


def one_after_the_other(count: int) -> list[ShardUse]:
    """Ten items of each shard."""
    return [ShardUse(k, 10 * k, 10 * k + 10) for k in range(count)]


def make_plan(uses: list[ShardUse], num_shards: int = 12, max_bytes: int = 100) -> ShardPlan:
    """Shards of ten bytes."""
    return ShardPlan(uses, [10] * num_shards, max_bytes)


def working() -> list[str]:
    """The threads that fetch."""
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch-")]


def take_all(plan: ShardPlan) -> list[int]:
    """What threads would fetch now."""
    taken = []
    while (shard := plan._take()) is not None:
        taken.append(shard)
    return taken


def read(plan: ShardPlan, num_items: int, *touched: int) -> list[int]:
    """What the reader closes while it reads."""
    left = plan.due()
    order = plan.read(num_items, touched)
    return sorted(left - plan.due()) + [shard for shard in order if plan.leave(shard)]


def test_as_much_is_fetched_ahead_as_is_in_use() -> None:
    three_at_once = [ShardUse(k, k // 3 * 30, k // 3 * 30 + 30) for k in range(12)]
    plan = make_plan(three_at_once)
    assert take_all(plan) == [0, 1, 2, 3, 4, 5]
    assert read(plan, 10, 0) == []
    assert take_all(plan) == []
    assert read(plan, 20, 1, 2) == [0, 1, 2]
    assert take_all(plan) == [6, 7, 8]
    assert read(plan, 10, 3) == []
    assert plan.due() == {3, 4, 5}


def test_no_more_is_fetched_than_the_cache_holds() -> None:
    three_at_once = [ShardUse(k, k // 3 * 30, k // 3 * 30 + 30) for k in range(12)]
    assert take_all(make_plan(three_at_once, max_bytes=45)) == [0, 1, 2, 3]
    assert take_all(make_plan(three_at_once, max_bytes=30)) == [0, 1, 2]


def test_a_shard_is_over_when_its_last_item_was_read() -> None:
    plan = make_plan(one_after_the_other(4))
    assert read(plan, 9, 0) == []
    assert read(plan, 2, 0, 1) == [0]
    assert plan.due() == {1}


def test_what_ends_is_read_first_so_that_its_place_is_free_for_what_begins() -> None:
    plan = make_plan([ShardUse(5, 0, 16), ShardUse(2, 10, 40)])
    plan.read(8, [5])
    assert plan.read(8, [2, 5]) == [5, 2]


def test_what_ends_untouched_is_no_longer_due() -> None:
    plan = make_plan([ShardUse(0, 0, 16), ShardUse(1, 0, 40)])
    plan.read(8, [0, 1])
    assert plan.due() == {0, 1}
    plan.read(8, [1])
    assert plan.due() == {1}


def test_a_shard_that_is_needed_again_at_once_stays() -> None:
    plan = make_plan([ShardUse(0, 0, 16), ShardUse(0, 16, 32)])
    assert plan.read(16, [0]) == [0]
    assert plan.leave(0)  # its next use has not begun ...
    plan = make_plan([ShardUse(0, 0, 16), ShardUse(0, 10, 32)])
    assert read(plan, 16, 0) == []  # ... and here it has


def test_a_shard_that_is_needed_again_later_is_fetched_again() -> None:
    plan = make_plan([ShardUse(k, 10 * n, 10 * n + 10) for n, k in enumerate([0, 1, 2, 0])])
    assert take_all(plan) == [0, 1]
    assert read(plan, 10, 0) == [0]
    assert take_all(plan) == [2]
    assert read(plan, 10, 1) == [1]
    assert take_all(plan) == [0]


def test_a_shard_whose_next_use_is_known_is_not_fetched_again() -> None:
    plan = make_plan([ShardUse(k, 10 * n, 10 * n + 10) for n, k in enumerate([0, 1, 0])], 3)
    assert take_all(plan) == [0, 1]
    assert read(plan, 10, 0) == [0]  # closed, and kept
    assert plan.known() == {0, 1}
    assert take_all(plan) == []


def test_an_endless_plan_over_few_shards_is_not_followed_for_ever() -> None:
    uses = (ShardUse(k % 2, 10 * k, 10 * k + 10) for k in itertools.count())
    plan = ShardPlan(uses, [10, 10], 100)
    assert take_all(plan) == [0, 1]
    read(plan, 10, 0)
    read(plan, 10, 1)
    assert plan.known() <= {0, 1}


def test_shards_outside_the_plan_are_closed_after_reading() -> None:
    plan = make_plan([])
    assert plan.read(5, [3, 7]) == [3, 7]
    assert plan.leave(3)
    assert plan.leave(7)
    assert plan.due() == set()


def test_a_reader_that_skips_a_batch_still_finds_shards_fetched_ahead() -> None:
    plan = make_plan(one_after_the_other(6))
    assert take_all(plan) == [0, 1]
    assert read(plan, 10, 0) == [0]
    assert take_all(plan) == [2]
    assert read(plan, 10, 2) == [2]  # the clock is the items read: it is one shard late
    assert take_all(plan) == [3]
    assert plan.known() == {2, 3}
    assert read(plan, 10, 3) == [3]


def test_threads_fetch_in_the_order_of_the_plan_ahead_of_the_reader() -> None:
    fetched: list[int] = []
    news = threading.Semaphore(0)

    def fetch(shard: int) -> None:
        fetched.append(shard)
        news.release()

    plan = make_plan(one_after_the_other(6))
    prefetcher = Prefetcher(plan, fetch, num_threads=1)
    for shard in range(6):
        for _ in range(1 + (shard == 0)):
            assert shard == 5 or news.acquire(timeout=SECONDS)
        assert fetched == list(range(min(shard + 2, 6)))  # this one and the next
        plan.read(10, [shard])
        plan.leave(shard)
    prefetcher.close()
    assert fetched == [0, 1, 2, 3, 4, 5]


def test_a_fault_of_a_thread_ends_the_fetching_and_is_kept() -> None:
    def fail(shard: int) -> None:
        raise RuntimeError(f"no {shard}")

    plan = make_plan(one_after_the_other(6))
    prefetcher = Prefetcher(plan, fail, num_threads=2)
    plan.wait_for(0)
    prefetcher.close()
    assert str(plan.error) in ("no 0", "no 1")
    assert plan.take() is None


def test_a_storage_that_is_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "AWAY_DELAY_S", 0.001)
    tried = threading.Semaphore(0)
    is_away = True
    got: set[int] = set()

    def fetch(shard: int) -> None:
        if is_away:
            tried.release()
            raise PassingError(f"no {shard}")
        got.add(shard)
        tried.release()

    plan = make_plan(one_after_the_other(6))
    prefetcher = Prefetcher(plan, fetch, num_threads=2)
    for _ in range(20):  # of the two shards, again and again
        assert tried.acquire(timeout=SECONDS)
    assert plan.error is None
    assert len(working()) == 2
    is_away = False
    while got != {0, 1}:
        assert tried.acquire(timeout=SECONDS)
    for shard in (0, 1):
        plan.read(10, [shard])
        plan.leave(shard)
    while got != {0, 1, 2, 3}:
        assert tried.acquire(timeout=SECONDS)
    prefetcher.close()


def test_a_storage_that_is_away_is_not_asked_by_each_thread_in_turn() -> None:
    tried = threading.Semaphore(0)

    def fetch(shard: int) -> None:
        tried.release()
        raise PassingError(f"no {shard}")

    plan = make_plan(one_after_the_other(6))
    prefetcher = Prefetcher(plan, fetch, num_threads=4)
    for _ in range(2):  # there are two shards to fetch, and what one thread tells wakes the others
        assert tried.acquire(timeout=SECONDS)
    plan.wait_for(0)
    plan.wait_for(1)
    plan.fetched(7)
    assert not tried.acquire(timeout=0.2)
    prefetcher.close()  # and does not wait for the delay
    assert working() == []


def test_without_room_it_is_tried_again_when_something_is_over() -> None:
    tried = threading.Semaphore(0)
    has_room = threading.Event()
    got: list[int] = []

    def fetch(shard: int) -> None:
        tried.release()
        if shard == 1 and not has_room.is_set():
            raise CacheFullError(str(shard))
        got.append(shard)

    plan = make_plan(one_after_the_other(2))
    prefetcher = Prefetcher(plan, fetch, num_threads=1)
    assert tried.acquire(timeout=SECONDS)
    assert tried.acquire(timeout=SECONDS)
    assert got == [0]
    has_room.set()
    plan.read(10, [0])
    plan.leave(0)
    assert tried.acquire(timeout=SECONDS)
    plan.wait_for(1)
    prefetcher.close()
    assert got == [0, 1]
    assert plan.error is None


@pytest.mark.parametrize("num_threads", [1, 4])
def test_closing_ends_the_threads(num_threads: int) -> None:
    plan = make_plan(one_after_the_other(6))
    prefetcher = Prefetcher(plan, lambda shard: None, num_threads)
    assert len(working()) == num_threads
    prefetcher.close()
    assert working() == []
