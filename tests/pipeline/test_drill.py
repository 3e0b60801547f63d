"""What a drill makes of a config, and what it refuses."""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import load_config
from pipeline.drill import Kind, _Training, link_data_set, run_drill, shorten
from pipeline.driver import make_plan
from pipeline.errors import ConfigError
from pipeline.storage import LocalStorage


def test_a_drill_is_short_and_elsewhere_and_keeps_the_rest(tiny_config: Path) -> None:
    settings = [
        "train.validate_every=5", "train.sample_every=5", "train.fid_every=5",
        "train.learning_rate=0.5", "cluster.address=a:1",
    ]  # fmt: skip
    config = load_config(tiny_config, settings)
    short = shorten(config, Kind.node, 40, "/elsewhere")
    assert (short.train.num_steps, short.train.checkpoint_every, short.train.log_every) == (
        40,
        4,
        1,
    )
    assert (short.storage.root, short.cluster.address) == ("/elsewhere", None)
    assert short.train.num_workers == (1, 2)
    extras = (short.train.validate_every, short.train.sample_every, short.train.fid_every)
    assert extras == (None, None, None)
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


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_an_outage_is_some_seconds(seconds: float, tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"--outage takes seconds from 0 on, got "):
        run_drill(load_config(tiny_config), Kind.storage, outage_s=seconds)


def test_a_data_set_that_is_preprocessed_is_linked_to(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, [f"storage.root={tmp_path / 'runs'}"])
    short = shorten(config, Kind.worker, 40, str(tmp_path / "scratch"))
    assert not link_data_set(config, short)
    assert not (tmp_path / "runs").exists()

    storage = LocalStorage(str(tmp_path / "runs"))
    planned = make_plan(config).steps[0]
    for part in planned.step.parts[1:]:
        storage.create(f"{part}/train.arrow", b"items")
    assert not link_data_set(config, short)
    assert not (tmp_path / "scratch").exists()

    key, parts = planned.key, planned.step.parts
    text = json.dumps({"shards": [{"directory": part} for part in parts]}).encode()
    artifact = {"file": "d.json", "sha256": hashlib.sha256(text).hexdigest()}
    manifest = {"step": "preprocess", "key": key, "artifacts": {"dataset.json": artifact}}
    storage.create(f"steps/preprocess/{key}/d.json", text)
    storage.create(f"steps/preprocess/{key}/manifest.json", json.dumps(manifest).encode())
    assert not link_data_set(config, short)  # one of its shards is gone
    storage.create(f"{parts[0]}/train.arrow", b"items")
    assert link_data_set(config, short)
    assert make_plan(short).steps[0].action == "cached"
    linked = LocalStorage(str(tmp_path / "scratch"))
    assert linked.read(f"{parts[0]}/train.arrow") == b"items"
    linked.delete("steps")
    assert storage.read(f"{parts[0]}/train.arrow") == b"items"


def test_the_root_comes_back_though_a_writer_has_made_directories_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    (root / "steps").mkdir(parents=True)
    (root / "steps" / "ours").touch()
    training = object.__new__(_Training)
    training._root, training._scratch, training._checkpoint_every = root, tmp_path, 4
    training.trace = SimpleNamespace(rows=[{"global_step": 4}])  # pyright: ignore

    def write(*_: int) -> bool:
        """A writer that makes its directories just when the file is away."""
        assert root.is_file()
        root.unlink()
        (root / "steps").mkdir(parents=True)
        (root / "steps" / "theirs").touch()
        return True

    monkeypatch.setattr(_Training, "_has_reached", write)
    training.take_storage_away(0.0)
    assert [path.name for path in (root / "steps").iterdir()] == ["ours"]
