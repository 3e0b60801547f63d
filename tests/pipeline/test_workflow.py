"""The workflow with steps of its own: keys, reasons, resuming, order, failure."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, StorageError
from pipeline.settings import Config, DataConfig
from pipeline.storage import Storage, open_storage
from pipeline.workflow import (
    Event,
    PlannedStep,
    Resources,
    Step,
    StepContext,
    execute,
    needed_for,
    plan,
    read_artifact,
    read_manifest,
)

CONFIG = Config(name="t", data=DataConfig(sources=("x",), resolution=8))
HERE = "tests.pipeline.test_workflow"
calls: list[str] = []
meeting = threading.Barrier(2)
has_failed = threading.Event()


def record(context: StepContext) -> dict[str, Any]:
    calls.append(context.planned.step.name)
    context.write_artifact("x.txt", context.planned.step.name.encode())
    return {"n": len(calls)}


def meet(context: StepContext) -> dict[str, Any]:
    """Finishes only if another step runs at the same time."""
    meeting.wait(timeout=10)
    return {}


def fail(context: StepContext) -> dict[str, Any]:
    context.storage.replace(f"{context.directory}/half", b"x")
    raise DataError("the images are gone. Bring them back.")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    calls.clear()
    return open_storage(str(tmp_path))


@pytest.fixture(autouse=True)
def steps_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step functions are named by module; this module is one under any import mode."""
    import sys

    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def make_parts(context: StepContext) -> dict[str, Any]:
    """Those of the step."""
    for part in context.planned.step.parts:
        context.storage.create(f"{part}/part", b"made")
    return record(context)


def make_step(name: str, inputs: Sequence[str] = (), function: str = "record", **more: Any) -> Step:
    fields = {"settings": {}, "version": 1} | more
    return Step(name=name, function=f"{HERE}:{function}", inputs=tuple(inputs), **fields)


def run(steps: Sequence[Step], storage: Storage, **more: Any) -> list[Event]:
    events: list[Event] = []
    options = {"capacity": Resources(cpus=1), "observer": events.append} | more
    execute(plan(steps, storage), CONFIG, storage, **options)
    return events


CHAIN = [make_step("a"), make_step("b", ["a"]), make_step("c", ["b"])]


def test_runs_once_in_order_then_finds_everything(storage: Storage) -> None:
    run(CHAIN, storage)
    assert calls == ["a", "b", "c"]
    assert [p.action for p in plan(CHAIN, storage)] == ["cached"] * 3
    events = run(CHAIN, storage)
    assert calls == ["a", "b", "c"]
    assert [e.kind for e in events] == ["cached"] * 3


def changed(steps: Sequence[Step], index: int, **changes: Any) -> list[Step]:
    copy = list(steps)
    copy[index] = dataclasses.replace(copy[index], **changes)
    return copy


@pytest.mark.parametrize("changes", [{"settings": {"k": 1}}, {"version": 2}])
def test_a_change_reruns_the_step_and_what_rests_on_it(
    storage: Storage, changes: dict[str, Any]
) -> None:
    run(CHAIN, storage)
    assert [p.action for p in plan(changed(CHAIN, 1, **changes), storage)] == [
        "cached",
        "run",
        "run",
    ]


def test_says_why(storage: Storage) -> None:
    before = {p.step.name: p.identity for p in plan(CHAIN, storage)}
    assert [p.reason for p in plan(CHAIN, storage)] == ["it never ran"] * 3
    assert [p.reason for p in plan(CHAIN, storage, before)] == ["it did not finish"] * 3
    run(CHAIN, storage)
    reasons = [p.reason for p in plan(changed(CHAIN, 1, settings={"k": 1}), storage, before)]
    assert reasons == ["its result is there", "k changed from None to 1", "b runs again"]
    reasons = [p.reason for p in plan(changed(CHAIN, 1, version=2), storage, before)]
    assert reasons[1] == "its code changed (version 1 to 2)"


def test_a_step_whose_parts_are_gone_runs_again_and_what_rests_on_it_does_not(
    storage: Storage,
) -> None:
    chain = changed(CHAIN, 0, parts=("parts/1", "parts/2"), function=f"{HERE}:make_parts")
    run(chain, storage)
    assert [p.action for p in plan(chain, storage)] == ["cached"] * 3
    storage.delete("parts/1")
    calls.clear()
    first, *others = plan(chain, storage)
    assert (first.action, first.reason) == ("run", "1 of the 2 shards of its result are gone")
    assert [p.action for p in others] == ["cached"] * 2
    run(chain, storage)
    assert calls == ["a"]
    assert storage.read("parts/1/part") == b"made"
    assert [p.action for p in plan(chain, storage)] == ["cached"] * 3


def test_a_step_waits_for_others_that_are_no_part_of_its_key(storage: Storage) -> None:
    alone = [make_step("a"), make_step("b"), make_step("c", ["a"])]
    after = changed(alone, 2, after=("b",))
    key = plan(alone, storage)[2].key
    assert plan(after, storage)[2].key == key
    assert [p.step.name for p in needed_for(plan(after, storage), ["c"])] == ["a", "b", "c"]
    with pytest.raises(DataError):
        run(changed(after, 1, function=f"{HERE}:fail"), storage, capacity=Resources(cpus=3))
    assert calls == ["a"]
    run(after, storage)
    assert calls == ["a", "b", "c"]
    manifest = read_manifest(storage, "c", key)
    assert manifest is not None
    assert list(manifest["identity"]["inputs"]) == ["a"]


def test_what_is_done_needs_nothing_of_what_it_would_wait_for(storage: Storage) -> None:
    run([make_step("a"), make_step("c", ["a"])], storage)
    planned = plan([make_step("a"), make_step("b"), make_step("c", ["a"], after=("b",))], storage)
    needed = needed_for(planned, ["c"])
    assert [p.step.name for p in needed] == ["a", "c"]
    execute(needed, CONFIG, storage, capacity=Resources(), observer=lambda event: None)
    assert calls == ["a", "c"]


def test_raising_the_extensible_setting_keeps_the_series(storage: Storage) -> None:
    def step(num_steps: int, rate: float) -> Step:
        settings = {"num_steps": num_steps, "rate": rate}
        return make_step("a", settings=settings, extensible="num_steps")

    short, longer = plan([step(10, 1.0)], storage)[0], plan([step(20, 1.0)], storage)[0]
    assert short.key != longer.key
    assert short.series == longer.series
    assert plan([step(10, 2.0)], storage)[0].series != short.series
    storage.replace(f"{short.series_directory}/checkpoints/000000010/manifest.json", b"{}")
    storage.replace(f"{short.series_directory}/checkpoints/000000015/half", b"")
    storage.replace(f"{short.series_directory}/checkpoints/.DS_Store", b"x")
    assert plan([step(20, 1.0)], storage)[0].action == "extend"
    assert "step 10" in plan([step(20, 1.0)], storage)[0].reason
    assert plan([step(5, 1.0)], storage)[0].action == "run"


def test_a_failure_leaves_no_manifest_and_stops(storage: Storage) -> None:
    steps = changed(CHAIN, 1, function=f"{HERE}:fail")
    with pytest.raises(DataError, match="Bring them back"):
        run(steps, storage)
    assert calls == ["a"]
    b = plan(steps, storage)[1]
    assert read_manifest(storage, "b", b.key) is None
    assert [p.action for p in plan(steps, storage)] == ["cached", "run", "run"]


def test_steps_that_fit_run_side_by_side(storage: Storage) -> None:
    half = Resources(cpus=1)
    steps = [make_step(name, function="meet", resources=half) for name in "ab"]
    run(steps, storage, capacity=Resources(cpus=2))
    assert all(p.action == "cached" for p in plan(steps, storage))


@pytest.mark.parametrize("each", [Resources(cpus=2), Resources(gpus=1)])
def test_steps_that_do_not_fit_wait_for_each_other(storage: Storage, each: Resources) -> None:
    steps = [make_step(name, resources=each) for name in "ab"]
    events = run(steps, storage, capacity=Resources(cpus=2, gpus=1))
    assert [(e.kind, e.step) for e in events] == [
        ("started", "a"),
        ("finished", "a"),
        ("started", "b"),
        ("finished", "b"),
    ]


def test_needed_for_takes_what_a_target_rests_on(storage: Storage) -> None:
    planned: list[PlannedStep] = plan(CHAIN, storage)
    assert [p.step.name for p in needed_for(planned, ["b"])] == ["a", "b"]


def test_a_late_zombie_changes_nothing_that_is_published(storage: Storage) -> None:
    run(CHAIN[:1], storage)
    p = plan(CHAIN, storage)[0]
    manifest = read_manifest(storage, "a", p.key)
    assert manifest is not None
    zombie = StepContext(CONFIG, storage, p, {}, lambda event: None)
    zombie.write_artifact("x.txt", b"something else")
    assert not storage.create(f"{p.directory}/manifest.json", b"{}")
    assert read_artifact(storage, manifest, "x.txt") == b"a"


def test_a_damaged_artifact_is_noticed(storage: Storage) -> None:
    run(CHAIN[:1], storage)
    p = plan(CHAIN, storage)[0]
    manifest = read_manifest(storage, "a", p.key)
    assert manifest is not None
    assert read_artifact(storage, manifest, "x.txt") == b"a"
    storage.replace(f"{p.directory}/{manifest['artifacts']['x.txt']['file']}", b"b")
    with pytest.raises(StorageError, match="delete the directory steps/a/"):
        read_artifact(storage, manifest, "x.txt")


def wait_for_a_failure(context: StepContext) -> dict[str, Any]:
    assert has_failed.wait(timeout=10)
    calls.append(context.planned.step.name)
    if context.planned.step.settings.get("fails"):
        raise DataError("so are these. Bring them back.")
    return {}


@pytest.mark.parametrize("settings", [{}, {"fails": True}], ids=["one", "two"])
def test_after_the_first_failure_nothing_starts_and_that_one_is_raised(
    storage: Storage, settings: dict[str, Any]
) -> None:
    has_failed.clear()
    one = Resources(cpus=1)
    steps = [
        make_step("a", function="fail", resources=one),
        make_step("b", function="wait_for_a_failure", resources=one, settings=settings),
        make_step("c", resources=one),
    ]
    planned = plan(steps, storage)

    def observe(event: Event) -> None:
        if event.kind == "failed":
            has_failed.set()

    with pytest.raises(DataError, match="the images are gone"):
        execute(planned, CONFIG, storage, capacity=Resources(cpus=2), observer=observe)
    assert calls == ["b"]
