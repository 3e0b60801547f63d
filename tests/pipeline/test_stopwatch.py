import pytest

from pipeline.stopwatch import Stopwatch


def test_every_second_belongs_to_one_part() -> None:
    times = iter([0.0, 1.0, 4.0, 6.5, 7.0])
    watch = Stopwatch(lambda: next(times))
    watch.mark("data")
    watch.mark("compute", at=3.0)
    watch.mark("sync")
    watch.mark("compute", at=2.0)  # before the last mark: nothing
    watch.mark("checkpoint")
    watch.move(0.5, "checkpoint", "sync")
    wall, parts = watch.take()
    assert (wall, parts) == (
        7.0,
        {
            "data": 1.0,
            "compute": 2.0,
            "sync": 1.5,
            "checkpoint": 2.0,
            "metrics": 0.0,
            "callbacks": 0.0,
        },
    )
    assert sum(parts.values()) == pytest.approx(6.5)


def test_taking_starts_anew() -> None:
    times = iter([0.0, 1.0, 1.0, 3.0, 3.0])
    watch = Stopwatch(lambda: next(times))
    watch.mark("compute")
    watch.take()
    watch.mark("data")
    assert watch.take()[1] == {
        "compute": 0.0,
        "data": 2.0,
        "sync": 0.0,
        "checkpoint": 0.0,
        "metrics": 0.0,
        "callbacks": 0.0,
    }
