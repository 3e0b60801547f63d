"""What a strike cost, from a trace; what a drill makes of a config; what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.drill import Kind, measure, run_drill, shorten
from pipeline.errors import ConfigError
from pipeline.trace import TraceReader, trace_rank


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


def test_processes_that_go_on_lose_nothing_and_have_not_recovered_yet() -> None:
    found = measure([row(1, 1), row(6, 2)], struck_at=2)
    assert (found.resumed_from, found.steps_lost, found.seconds_to_recover) == (None, 0, None)
    assert found.longest_pause_s == 5


def test_what_never_gets_past_the_strike_has_not_recovered() -> None:
    found = measure([row(1, 5), row(9, 5, 2, first=4)], struck_at=2)
    assert (found.resumed_from, found.steps_lost, found.seconds_to_recover) == (4, 1, None)


def test_a_trace_is_read_as_it_grows(tmp_path: Path) -> None:
    path, told = tmp_path / "trace", []
    reader = TraceReader(path)
    reader.read()
    on_row = trace_rank(str(path), lambda *args: told.append(args), rank=1, world_size=2)
    on_row({"global_step": 3}, 2)
    with path.open("a") as file:
        file.write('{"kind": "ro')
    reader.read()
    assert [entry["rank"] for entry in reader.began] == [1]
    assert [(r["global_step"], r["first_step"]) for r in reader.rows] == [(3, 2)]
    assert told == [({"global_step": 3}, 2)]
    with path.open("a") as file:
        file.write('w", "global_step": 4}\n')
    reader.read()
    assert [r["global_step"] for r in reader.rows] == [3, 4]


def test_a_drill_is_short_and_elsewhere_and_keeps_the_rest(tiny_config: Path) -> None:
    settings = ["train.validate_every=5", "train.learning_rate=0.5", "cluster.address=a:1"]
    config = load_config(tiny_config, settings)
    short = shorten(config, Kind.node, 40, "/elsewhere")
    assert (short.train.num_steps, short.train.checkpoint_every, short.train.log_every) == (
        40,
        4,
        1,
    )
    assert (short.storage.root, short.cluster.address) == ("/elsewhere", None)
    assert short.train.num_workers == (1, 2)
    assert short.train.validate_every is None
    assert short.train.learning_rate == 0.5
    assert shorten(config, Kind.worker, 40, "/elsewhere").train.num_workers == 2


@pytest.mark.parametrize(
    ("settings", "num_steps", "message"),
    [
        ([], 9, "at least 10 steps, got 9"),
        (["train.use_gpu=true"], 40, "Add --set train.use_gpu=false"),
        (["train.num_workers=1", "train.global_batch_size=16"], 40, "global_batch_size=32"),
    ],
)
def test_what_cannot_be_drilled_is_refused_before_anything_starts(
    tiny_config: Path, settings: list[str], num_steps: int, message: str
) -> None:
    config = load_config(tiny_config, settings)
    with pytest.raises(ConfigError, match=message):
        run_drill(config, Kind.node, num_steps=num_steps)
