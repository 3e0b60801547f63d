"""Where the time of training goes, without a gap between the parts."""

import time
from collections.abc import Callable
from typing import Literal, get_args

Part = Literal["compute", "data", "sync", "checkpoint", "metrics", "callbacks"]
PARTS: tuple[Part, ...] = get_args(Part)


class Stopwatch:
    """Adds up the time since the last mark to one part after another.

    `compute` is the network and the optimiser, `data` the wait for a batch, `sync` the wait for
    other ranks, `checkpoint` copying the state, waiting for the checkpoint before and going back to
    one, `metrics` adding them up and the validation loss, `callbacks` what the loop runs in:
    progress, samples.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._started = self._last = clock()

    def mark(self, part: Part, at: float | None = None) -> None:
        """All time since the last mark, until now or `at`, was this part."""
        now = self._clock() if at is None else max(at, self._last)
        self._seconds[part] += now - self._last
        self._last = now

    def move(self, seconds: float, source: Part, target: Part) -> None:
        """Counts some of one part as another: what only the device's clock could tell."""
        seconds = min(seconds, self._seconds[source])
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    @property
    def wall_s(self) -> float:
        """Seconds since `take` was last called."""
        return self._clock() - self._started

    def take(self) -> tuple[float, dict[Part, float]]:
        """The wall time since the last call and its parts, which starts them again."""
        now = self._clock()
        wall, parts = now - self._started, self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._started, self._last = now, max(now, self._last)
        return wall, parts
