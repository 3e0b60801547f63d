"""What the driver tells of a training, and how much of a batch a node has."""

import json
import queue
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline import train as pipeline_train
from pipeline import training_progress
from pipeline.batches import BatchMaker
from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.config import load_config
from pipeline.errors import DataError, StorageError
from pipeline.models import make_unet
from pipeline.patience import Patience
from pipeline.runs import RunRecord
from pipeline.settings import Config
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage, Storage
from pipeline.torchrun import torchrun_world
from pipeline.train import (
    _begin,
    _write_result,
    most_groups,
    train,
    train_in_process,
)
from pipeline.training_progress import tell_progress
from pipeline.workflow import Event, StepContext, plan


@pytest.mark.parametrize("num_groups", [3, 4, 5, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_node_has_at_most_so_many_groups(num_groups: int, world_size: int) -> None:
    class Config:
        global_batch_size = num_groups * 16

    shares = [
        len(BatchMaker(Config(), None, None, None, rank, world_size).groups)  # pyright: ignore
        for rank in range(world_size)
    ]
    for on_node in range(1, world_size + 1):
        most = max(sum(shares[k : k + on_node]) for k in range(world_size - on_node + 1))
        assert most <= most_groups(num_groups, on_node, world_size) <= num_groups


@pytest.mark.parametrize(
    ("torchrun", "num_workers", "refused_above", "checked", "noted"),
    [
        # 8 groups: of 4 ranks on 2 nodes a node has 4, of 4 workers on a node each 2, of one all.
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "1", 4, [4], False),
        ({}, "[1, 4]", 2, [2, 8], True),
        ({}, "[1, 4]", 8, [2, 8], False),
        ({}, "4", 8, [2], False),
    ],
)
def test_the_cache_is_checked_for_those_who_will_train(
    told: "Told",
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    torchrun: dict[str, str],
    num_workers: str,
    refused_above: int,
    checked: list[int],
    noted: bool,
) -> None:
    ranks = {"TORCHELASTIC_RUN_ID": "r", "RANK": "0", "LOCAL_RANK": "0"} if torchrun else {}
    for name, value in {**torchrun, **ranks}.items():
        monkeypatch.setenv(name, value)
    settings = ["train.global_batch_size=128", f"train.num_workers={num_workers}"]
    seen: list[int] = []

    def check(*_: Any, global_batch_size: int, num_groups: int) -> None:
        seen.append(num_groups)
        if num_groups > refused_above:
            raise DataError("The cache is too small. Raise data.cache_bytes.")

    monkeypatch.setattr(pipeline_train, "check_cache_fits", check)
    config = load_config(tiny_config, settings)
    context = replace(told.context, config=config, inputs={"preprocess": {}})
    pipeline_train._check_caches(context, torchrun_world())
    assert seen == checked
    notes = [told.told.get_nowait() for _ in range(told.told.qsize())]
    warning = "training would end if 1 of 4 workers were left: The cache is too small. Raise "
    assert notes == ([warning + "data.cache_bytes."] if noted else [])


class Told:
    """A driver whose storage can be told to fail."""

    def __init__(self, root: Path, config_path: Path) -> None:
        self.storage = LocalStorage(str(root))
        config = load_config(config_path)
        planned = {p.step.name: p for p in plan(make_steps(config, []), self.storage)}
        self.record = RunRecord(self.storage, "r", config, list(planned.values()))
        self.told: queue.Queue[str] = queue.Queue()
        self.context = StepContext(config, self.storage, planned["train"], {}, self.observe)

    def observe(self, event: Event) -> None:
        self.record.observe(event)
        if event.kind == "note":
            self.told.put(event.fields["text"])

    def write(self, step: int, began: float, notes: list[str], resumed_from: int = 0) -> None:
        document = {
            "global_step": step, "num_steps": 9, "resumed_from": resumed_from, "loss": 1.0,
            "seconds_to_first_step": began, "seconds_left": 1.0, "images_per_s": 1.0,
            "notes": notes,
        }  # fmt: skip
        path = f"{self.context.series_directory}/progress.json"
        self.storage.replace(path, json.dumps(document).encode())


@pytest.fixture
def told(tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(training_progress, "PROGRESS_EVERY_S", 0.001)
    return Told(tmp_path / "root", tiny_config)


def test_each_group_of_workers_has_its_own_notes(told: Told) -> None:
    with tell_progress(told.context, None):
        told.write(1, 2.0, ["storage is away"] * 3)
        seen = [told.told.get(timeout=10) for _ in range(4)]
        told.write(1, 5.0, ["the checkpoint is damaged"], resumed_from=0)
        seen += [told.told.get(timeout=10) for _ in range(2)]
    assert seen == [
        "first step after 2 s",
        *["storage is away"] * 3,
        "first step after 5 s",
        "the checkpoint is damaged",
    ]


def test_a_note_that_cannot_be_recorded_ends_nothing(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = LocalStorage.replace
    is_away = True

    def refuse(self: LocalStorage, path: str, content: Any) -> None:
        if is_away and path.startswith("runs/"):
            raise StorageError("Cannot write. Wait.")
        replace(self, path, content)

    monkeypatch.setattr(LocalStorage, "replace", refuse)
    told.context.note("no FID for now")
    with pytest.raises(StorageError):
        told.observe(Event("started", "train"))
    is_away = False
    told.observe(Event("started", "train"))
    events = told.storage.read("runs/r/events.jsonl").decode()
    assert "no FID for now" in events


@pytest.mark.parametrize("verb", ["read", "create"])
def test_a_finished_training_waits_for_a_storage_that_is_away(
    told: Told,
    write_data_set: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8)
    data = write_data_set(told.storage, pixels)
    config = told.context.config
    short = config.train.model_copy(update={"num_steps": 10, "checkpoint_every": 10})
    config = config.model_copy(update={"train": short})
    context = replace(told.context, config=config, inputs={"preprocess": data})
    pauses: list[float] = []
    patience = partial(Patience, sleep=pauses.append, clock=lambda: sum(pauses))
    monkeypatch.setattr(pipeline_train, "Patience", patience)
    original = getattr(LocalStorage, verb)

    def fail(self: LocalStorage, path: str, *more: Any) -> Any:
        if sum(pauses) < 60 and path.startswith("steps/train/"):
            raise StorageError("Cannot do it: no route to host. Wait.")
        return original(self, path, *more)

    def fit(config: Config, storage: Storage, directory: str, settings: dict[str, Any]) -> None:
        train_in_process(config, storage, directory, data)
        monkeypatch.setattr(LocalStorage, verb, fail)

    monkeypatch.setattr(pipeline_train, "fit_workers", fit)
    assert train(context)["num_steps"] == 10
    assert pauses == [1, 2, 4, 8, 15, 15, 15]
    assert context.artifacts.keys() == {"ema.safetensors", "metrics.jsonl"}
    for artifact in context.artifacts.values():
        assert told.storage.exists(f"{context.directory}/{artifact['file']}")


def test_training_begins_with_the_weights_of_its_seed(tiny_config: Path, tmp_path: Path) -> None:
    config, storage = load_config(tiny_config, ["train.seed=5"]), LocalStorage(str(tmp_path))
    begun, expected = _begin(config, storage, None, None), make_unet(config, 5)
    assert torch.equal(begun.init_conv.weight, expected.init_conv.weight)


def test_the_result_is_what_the_last_checkpoint_holds(tiny_config: Path, tmp_path: Path) -> None:
    config, storage = load_config(tiny_config, ["train.num_steps=8"]), LocalStorage(str(tmp_path))
    planned = {p.step.name: p for p in plan(make_steps(config, []), storage)}
    inputs: dict[str, Any] = {"preprocess": {}}
    context = StepContext(config, storage, planned["train"], inputs, lambda event: None)
    rows = [{"images_seen": 32 * step, "loss": 1 / step} for step in (4, 8)]
    average = {"w": torch.ones(3, 2)}
    environments = [{"world_size": 1}, {"world_size": 2}]
    CheckpointStore(storage, context.series_directory).save(
        Checkpoint(8, {"w": torch.zeros(3, 2)}, average, {}, rows, environments=environments)
    )
    found = _write_result(context, None)
    names = ("images_seen", "loss", "num_workers", "num_parameters")
    assert [found[name] for name in names] == [256, 1 / 8, 2, 6]
    file = context.artifacts["ema.safetensors"]["file"]
    weights = safetensors.torch.load(storage.read(f"{context.directory}/{file}"))
    assert torch.equal(weights["w"], average["w"])
