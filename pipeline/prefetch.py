"""Fetching shards ahead of a reader: its plan, and the threads that work it off.

The plan is a sequence of uses (`ShardUse`) in the order of need, and its clock is the number of
items that the reader has read. The current uses are kept; beyond them as many bytes are fetched
ahead as are in use, so that while one part of the window is read the next comes.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence

from pipeline.shard_cache import CacheFullError, PassingError
from pipeline.shards import ShardUse

THREADS = 4  # one connection does not fill a network
FULL_DELAY_S = 1.0  # until it is tried again whether there is room
AWAY_DELAY_S = 5.0  # until a storage that did not answer is asked again
CLOSE_TIMEOUT_S = 5.0


class ShardPlan:
    """What a reader needs of its shards now and soon. Reader and threads may share one.

    A use is due from the read that can first ask for its shard to the last one that can. Shards
    are wanted in the order of their uses.

    Args:
        uses: in the order of need; endless or not, taken from as the reader gets there.
        sizes: bytes of each shard.
        max_bytes: that may be due and ahead together.
    """

    def __init__(self, uses: Iterable[ShardUse], sizes: Sequence[int], max_bytes: int) -> None:
        self.error: Exception | None = None  # what ended a thread
        self._uses = iter(uses)
        self._next = next(self._uses, None)
        self._current: list[ShardUse] = []  # known and not over
        self._taken: set[int] = set()  # of their shards, those that were given to be fetched
        self._fetching: set[int] = set()  # and of these, those on their way
        self._due: set[int] = set()
        self._staying: set[int] = set()
        self._ending: set[int] = set()  # of the shards being read, those not needed afterwards
        self._sizes, self._max_bytes = sizes, max_bytes
        self._num_read = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def read(self, num_items: int, touched: Iterable[int]) -> list[int]:
        """The reader is about to read so many more items, from these shards.

        Returns:
            The shards in the order in which to read them: first those that are not needed
            afterwards. The reader tells when it has read each by `leave`.
        """
        with self._changed:
            begin, self._num_read = self._num_read, self._num_read + num_items
            known, end = len(self._current), self._num_read
            while self._next is not None and self._next.since < end:
                self._pull()
            touched = set(touched)
            self._current = [
                use
                for use in self._current
                if use.until > end or (use.until > begin and use.shard in touched)
            ]
            due = [use for use in self._current if use.since < end]
            self._due = {use.shard for use in due}
            self._staying = staying = {use.shard for use in due if use.until > end}
            self._ending = touched - staying
            if len(self._current) != known or any(begin < u.since <= end for u in self._current):
                self._wake()
            return [*sorted(self._ending), *sorted(touched & staying)]

    def leave(self, shard: int) -> bool:
        """The reader has read from a shard; True if it needs no more of it for now."""
        with self._changed:
            if shard not in self._ending:
                return False
            self._ending.discard(shard)
            self._due.discard(shard)
            self._current = [
                use for use in self._current if use.shard != shard or use.until > self._num_read
            ]
            self._wake()
            return True

    def due(self) -> set[int]:
        """The shards in use now."""
        with self._changed:
            return set(self._due)

    def staying(self) -> set[int]:
        """Of these, those that are needed beyond the items being read."""
        with self._changed:
            return set(self._staying)

    def known(self) -> set[int]:
        """The shards in use now and those ahead that were or will be fetched."""
        with self._changed:
            return {use.shard for use in self._current}

    def take(self) -> int | None:
        """The next shard to fetch, as soon as there is one; None when there will be none."""
        with self._changed:
            while not self._is_closed and self.error is None:
                shard = self._take()
                if shard is not None:
                    self._fetching.add(shard)
                    return shard
                self._changed.wait()
            return None

    def fetched(self, shard: int) -> None:
        """A shard that was taken is there, or is not going to be."""
        with self._changed:
            self._fetching.discard(shard)
            self._changed.notify_all()

    def wait_for(self, shard: int) -> None:
        """Waits until no thread is fetching a shard."""
        with self._changed:
            while shard in self._fetching:
                self._changed.wait()

    def put_back(self, shard: int, delay_s: float, *, or_on_change: bool = False) -> None:
        """A shard that was taken did not come: it is taken again later.

        Args:
            shard: its number.
            delay_s: how long this waits before.
            or_on_change: whether not so long when the reader gets on, or another shard is there.
        """
        with self._changed:
            self._fetching.discard(shard)
            self._changed.notify_all()
            if or_on_change:
                self._changed.wait(delay_s)
            else:
                self._changed.wait_for(lambda: self._is_closed or self.error, delay_s)
            self._taken.discard(shard)

    def fail(self, error: Exception) -> None:
        """Ends the fetching; the reader meets the error when it needs what is not there."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the fetching."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _take(self) -> int | None:
        for use in self._current:
            if use.shard not in self._taken:
                self._taken.add(use.shard)
                return use.shard
        known = {use.shard for use in self._current}
        while self._next is not None and len(known) < len(self._sizes):
            shard = self._next.shard
            is_known = shard in known
            if not is_known and not self._has_room_for(shard):
                return None
            self._pull()
            if not is_known:
                self._taken.add(shard)
                return shard
        return None

    def _has_room_for(self, shard: int) -> bool:
        assert self._next is not None
        due = {use.shard for use in self._current if use.since <= self._num_read}
        due_bytes = sum(self._sizes[other] for other in due)
        ahead = {use.shard for use in self._current} - due
        ahead_bytes = sum(self._sizes[other] for other in ahead)
        size = self._sizes[shard]
        if due_bytes + ahead_bytes + size > self._max_bytes:
            return False
        is_due = self._next.since <= self._num_read
        return is_due or ahead_bytes + size <= max(due_bytes, size)

    def _pull(self) -> None:
        assert self._next is not None
        self._current.append(self._next)
        self._next = next(self._uses, None)

    def _wake(self) -> None:
        self._taken &= {use.shard for use in self._current}
        self._changed.notify_all()


class Prefetcher:
    """Threads that fetch what a plan wants; they end with `close`, and with the process.

    Args:
        plan: of the reader.
        fetch: gets a shard onto local disk; called by several threads.
        num_threads: that fetch side by side.
    """

    def __init__(
        self, plan: ShardPlan, fetch: Callable[[int], object], num_threads: int = THREADS
    ) -> None:
        self._plan, self._fetch = plan, fetch
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch-{k}", daemon=True)
            for k in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads; one that a storage keeps waiting is left to end by itself."""
        self._plan.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (shard := self._plan.take()) is not None:
            try:
                self._fetch(shard)
            except CacheFullError:
                self._plan.put_back(shard, FULL_DELAY_S, or_on_change=True)
            except PassingError:  # the reader tells, if it comes to need the shard before
                self._plan.put_back(shard, AWAY_DELAY_S)
            except Exception as error:  # whatever it is, the reader is to know
                self._plan.fail(error)
            finally:
                self._plan.fetched(shard)
