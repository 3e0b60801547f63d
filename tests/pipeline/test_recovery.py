"""What a strike cost: the arithmetic of steps and seconds."""

from typing import Any

from pipeline.recovery import measure


def row(at: float, step: int, pid: int = 1, first: int = 0, workers: int = 2) -> dict[str, Any]:
    return {"at": at, "global_step": step, "pid": pid, "first_step": first, "world_size": workers}


def test_steps_and_seconds_are_counted_to_the_first_new_step() -> None:
    rows = [
        *(row(k, k) for k in range(1, 8)),
        *(row(20 + k, k, pid=2, first=4, workers=1) for k in range(5, 10)),
    ]
    found = measure(rows, struck_at=7.5)
    assert (found.struck_at_step, found.resumed_from, found.steps_lost) == (7, 4, 3)
    assert found.seconds_to_recover == 28 - 7.5  # step 8 is the first that is new
    assert found.longest_pause_s == 25 - 7
    assert (found.workers_before, found.workers_after) == (2, 1)


def test_steps_that_survivors_still_made_count_as_made() -> None:
    rows = [row(1, 1), row(2, 2), row(3, 3), row(9, 3, 2, first=2), row(10, 4, 2, first=2)]
    found = measure(rows, struck_at=2.5)
    assert (found.struck_at_step, found.steps_lost, found.seconds_to_recover) == (3, 1, 7.5)


def test_a_group_that_dies_again_before_a_new_step_does_not_count() -> None:
    rows = [row(1, 5), row(3, 3, 2, first=2), row(9, 5, 3, first=4), row(10, 6, 3, first=4)]
    found = measure(rows, struck_at=2)
    assert (found.resumed_from, found.steps_lost, found.seconds_to_recover) == (4, 1, 8)


def test_rows_do_not_say_whether_processes_that_go_on_lost_anything() -> None:
    found = measure([row(1, 1), row(6, 2)], struck_at=2)
    assert found.struck_at_step == 1
    assert (found.resumed_from, found.steps_lost, found.seconds_to_recover) == (None, None, None)
    assert found.longest_pause_s == 5


def test_what_never_gets_past_the_strike_has_not_recovered() -> None:
    found = measure([row(1, 5), row(9, 5, 2, first=4)], struck_at=2)
    assert (found.resumed_from, found.steps_lost, found.seconds_to_recover) == (4, 1, None)
