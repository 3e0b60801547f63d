"""A clean-up beside a cycle of `retrain` or `accept-reference`, whose work has no run."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.cycles import hold_cycle
from pipeline.driver import Basis, bring_about
from pipeline.garbage import collect_garbage
from pipeline.leases import hold_lease
from pipeline.registry import Registry
from pipeline.runs import SWEEP
from pipeline.sources import list_inputs
from pipeline.storage import open_storage
from pipeline.units import missing_units
from pipeline.workflow import Event

ALL = -10.0  # seconds of grace: everything is old enough
DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits"


class Cycle:
    """Work without a run, whose one shard was done long ago."""

    def __init__(self, config_path: Path, root: Path) -> None:
        sources = json.dumps([str(DIGITS / "digits-0000.tar")])
        self.config = load_config(config_path, [f"data.sources={sources}", f"storage.root={root}"])
        self.storage = open_storage(str(root))
        self.shards = list_inputs(self.config.data, self.storage).shards
        preprocess_shard(self.shards[0], self.config.data, self.storage)

    def hold(self) -> AbstractContextManager[None]:
        return hold_cycle(Registry(self.storage, "tiny"))

    def work(self, on_event: Callable[[Event], None]) -> str:
        """Brings the data set about; its key."""
        basis = Basis({})
        made = bring_about(self.config, ("preprocess",), basis=basis, observer=on_event)
        return made["preprocess"]["key"]

    @property
    def is_whole(self) -> bool:
        return missing_units(self.shards, self.config.data, self.storage) == []


@pytest.fixture
def cycle(tiny_config: Path, tmp_path: Path) -> Cycle:
    return Cycle(tiny_config, tmp_path / "root")


def test_one_in_the_middle_of_a_cycle_takes_nothing_that_it_needs(
    cycle: Cycle, call_cli: Callable[..., Any]
) -> None:
    def clean_up(event: Event) -> None:
        if event.kind == "started":
            options = ("--grace-days", "0", "--keep-runs", "0")
            done = call_cli("gc", cycle.storage.uri, *options, cwd=DIGITS)
            assert done.returncode == 0, done.stderr
            assert cycle.is_whole
            cleaned.append(event.step)

    cleaned: list[str] = []
    with cycle.hold():
        key = cycle.work(clean_up)
        collect_garbage(cycle.storage, keep_runs=0, grace_s=ALL)
        assert cleaned == ["preprocess"]
        assert cycle.is_whole
        assert cycle.storage.exists(f"steps/preprocess/{key}/manifest.json")
    collect_garbage(cycle.storage, keep_runs=0, grace_s=ALL)  # the cycle is over
    assert not cycle.is_whole
    assert not cycle.storage.exists(f"steps/preprocess/{key}/manifest.json")


def test_a_cycle_that_starts_meanwhile_waits_and_plans_again(cycle: Cycle) -> None:
    events: list[str] = []
    with cycle.hold():
        key = cycle.work(lambda event: None)
        cycle.storage.delete("models/tiny/retrain/needs.json")
        thread = threading.Thread(
            target=cycle.work, args=(lambda event: events.append(event.kind),)
        )
        with hold_lease(cycle.storage, SWEEP):
            thread.start()
            while not cycle.storage.exists("models/tiny/retrain/needs.json"):
                time.sleep(0.01)
            cycle.storage.delete(f"steps/preprocess/{key}")
            assert events == []
        thread.join(timeout=60)
    assert "started" in events
    assert cycle.storage.exists(f"steps/preprocess/{key}/manifest.json")
