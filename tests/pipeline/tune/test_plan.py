"""What `run` plans around a search, before it is done and after."""

import json
from pathlib import Path

from jobs.tune import command_of
from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.publish import training_command

SETTINGS = ["train.num_workers=1", "tune.num_samples=64", "tune.train_steps=30"]
FOUND = [
    "diffusion.schedule=linear",
    "diffusion.schedule_options={beta_start = 1e-4, beta_end = 0.05}",
]


def test_a_search_comes_before_training_and_chooses_its_config(
    tiny_config: Path, tmp_path: Path
) -> None:
    root = f"storage.root={tmp_path / 'runs'}"
    plain = make_plan(load_config(tiny_config, [*SETTINGS, root]))
    assert "tune" not in [p.step.name for p in plain.steps]
    config = load_config(tiny_config, [*SETTINGS, root, "tune.enabled=true"])
    before = make_plan(config)
    names = [
        "preprocess",
        "features",
        "reference",
        "tune",
        "train",
        "evaluate",
        "promote",
        "report",
    ]
    assert [p.step.name for p in before.steps] == names
    assert before.searches
    reasons = {p.step.name: p.reason for p in before.steps}
    for name in names[4:]:
        assert reasons[name] == "its config is what tune recommends: planned again then"

    search = next(p for p in before.steps if p.step.name == "tune")
    metrics = {"overrides": FOUND}
    manifest = {"step": "tune", "key": search.key, "metrics": metrics, "seconds": 1.0}
    before.storage.create(f"{search.directory}/manifest.json", json.dumps(manifest).encode())
    after = make_plan(config)
    assert after.run == before.run != plain.run
    assert not after.searches
    assert after.config.diffusion.schedule == "linear"
    by_hand = make_plan(load_config(tiny_config, [*SETTINGS, root, *FOUND, "tune.enabled=false"]))
    keys = {p.step.name: p.key for p in after.steps}
    assert keys.pop("tune") == search.key
    assert keys == {p.step.name: p.key for p in by_hand.steps}
    assert keys["train"] != {p.step.name: p.key for p in plain.steps}["train"]


def test_the_verb_plans_the_search_alone(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, [*SETTINGS, f"storage.root={tmp_path / 'runs'}"])
    planned = make_plan(config, ("tune",))
    assert [p.step.name for p in planned.steps] == ["preprocess", "features", "reference", "tune"]
    assert not planned.searches
    assert planned.trains
    enabled = make_plan(load_config(tiny_config, [*SETTINGS, "tune.enabled=true"]), ("tune",))
    assert not enabled.searches  # nothing follows that would be planned again


def test_a_longer_training_keeps_the_search(tiny_config: Path, tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        root = f"storage.root={tmp_path / 'runs'}"
        config = load_config(tiny_config, [*SETTINGS, root, *overrides])
        return make_plan(config, ("tune",)).steps[-1].key

    assert key() == key("train.num_steps=9000") == key("tune.enabled=true")
    assert key() == key("tune.max_concurrent=1") == key("train.checkpoint_every=7")
    assert key() != key("tune.train_steps=31")
    assert key() != key("tune.seed=1")
    assert key() != key("evaluate.num_steps=5")
    assert key("tune.num_steps=5") == key("evaluate.num_steps=5")
    assert key() != key("evaluate.num_samples=256")  # whose noise the trials' follows
    for changed in (
        "eta=0.5",
        "spacing=leading",
        "clip_x_start=false",
        "interval_reference=sample",
    ):
        assert key() != key(f"evaluate.{changed}")
    told = "model.class_conditional=true"
    assert key(told) != key(told, "evaluate.guidance_scale=3.0")
    bits = "tune.metric=bits_per_dim"
    assert key(bits) != key(bits, "evaluate.clip_x_start=false")
    assert key(bits) != key(bits, "evaluate.seed=1")
    assert key(bits) == key(bits, "evaluate.num_samples=256")


def test_the_command_is_as_it_can_be_typed(tiny_config: Path) -> None:
    command = command_of(Path("my config.toml"), ["data.sources=['a b']"])
    assert command == """run 'my config.toml' --set 'data.sources=['"'"'a b'"'"']'"""
    assert training_command(FOUND[1:], "run c.toml") == (
        "raydiffusion run c.toml --set 'diffusion.schedule_options={beta_start = 1e-4, "
        "beta_end = 0.05}' --set tune.enabled=false"
    )
