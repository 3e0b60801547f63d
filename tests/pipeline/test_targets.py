"""What a config or a model's name stands for: which training, and which run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.checkpoints import to_safetensors
from pipeline.config import load_config
from pipeline.cycles import begin_cycle, end_cycle
from pipeline.drawing import draw_items
from pipeline.driver import make_plan
from pipeline.errors import ConfigError, StorageError
from pipeline.exchange import export_model, load_model_folder
from pipeline.models import make_diffusion, make_unet
from pipeline.registry import Registry
from pipeline.runs import RunRecord
from pipeline.sample_files import Sampled, write_samples
from pipeline.sampling import draw_labels
from pipeline.settings import Config
from pipeline.storage import LocalStorage, hash_content
from pipeline.subjects import Network
from pipeline.targets import find_run, find_trained

NUM_CLASSES = 3


class Model:
    """A registry with two versions of a model that is told the class; the first is the champion."""

    def __init__(self, path: Path, root: Path, write_data_set: Callable[..., Any]) -> None:
        self.path, self.root = path, root
        self.storage = LocalStorage(str(root))
        self.registry = Registry(self.storage, "tiny")
        settings = (f"storage.root={root}", "model.class_conditional=true")
        self.config = load_config(path, [*settings, "evaluate.guidance_scale=1.5"])
        items = np.zeros((NUM_CLASSES, 1, 8, 8), np.uint8)
        data = write_data_set(self.storage, items, labels=range(NUM_CLASSES))
        self._write("preprocess", "k", data)
        for seed in (1, 2):
            self._add_version(seed)
        self.registry.promote(1, "the first")

    def network(self, seed: int) -> Network:
        model = make_unet(self.config, seed, NUM_CLASSES)
        with torch.no_grad():  # which begins with zeros, and all samples would be alike
            model.final_conv.weight.normal_(generator=torch.Generator().manual_seed(seed))
        diffusion = make_diffusion(self.config, NUM_CLASSES)
        return Network(model.eval(), diffusion, dict.fromkeys(range(NUM_CLASSES), 1))

    def draw(self, seed: int, labels: list[int], config: Config | None = None) -> np.ndarray:
        numbers = range(len(labels))
        return draw_items(config or self.config, self.network(seed), numbers, torch.tensor(labels))

    def sample(self, target: str, output: Path, *overrides: str, **options: Any) -> Sampled:
        given: dict[str, Any] = {"num_samples": 3, "root": str(self.root), **options}
        ignored = {"observer": lambda event: None, "overrides": overrides}
        return write_samples(target, output, **given, **ignored)

    def _write(self, step: str, key: str, manifest: dict[str, Any]) -> None:
        path = f"steps/{step}/{key}/manifest.json"
        self.storage.create(path, json.dumps(manifest).encode())

    def _add_version(self, seed: int) -> None:
        weights = to_safetensors(self.network(seed).model.state_dict())
        self.storage.create(f"steps/train/t{seed}/ema.safetensors", weights)
        artifact = {"file": "ema.safetensors", "sha256": hash_content(weights)}
        manifest = {
            "step": "train",
            "key": f"t{seed}",
            "metrics": {"num_steps": 300, "num_classes": NUM_CLASSES},
            "artifacts": {"ema.safetensors": artifact},
            "versions": {"raydiffusion": "0.1.0"},
        }
        self._write("train", f"t{seed}", manifest)
        config = self.config.model_dump(mode="json")
        config["storage"]["root"] = "elsewhere/now/gone"
        lineage = {"preprocess": "k", "train": f"t{seed}"}
        self.registry.add_version({"key": str(seed), "lineage": lineage, "config": config})


@pytest.fixture
def model(tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., Any]) -> Model:
    return Model(tiny_config, tmp_path / "runs", write_data_set)


def read_pngs(folder: Path) -> np.ndarray:
    """The images [N, 1, H, W] of the numbered PNG files."""
    paths = sorted(folder.glob("0*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])[:, None]


@pytest.mark.parametrize(("target", "seed"), [("tiny", 1), ("tiny@1", 1), ("tiny@2", 2)])
def test_a_version_is_sampled_by_name(model: Model, tmp_path: Path, target: str, seed: int) -> None:
    done = model.sample(target, tmp_path / "s")
    assert done.name == f"tiny@{seed}"
    assert done.files == ["000000.png", "000001.png", "000002.png", "grid.png", "samples.arrow"]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == done.files
    table = pa.ipc.open_file(tmp_path / "s" / "samples.arrow").read_all()
    labels = table["label"].to_pylist()
    counts = dict.fromkeys(range(NUM_CLASSES), 1)
    assert labels == draw_labels(counts, model.config.evaluate.seed, range(3)).tolist()
    drawn = model.draw(seed, labels)
    np.testing.assert_array_equal(read_pngs(tmp_path / "s"), drawn)
    assert table["image"].combine_chunks().to_numpy_ndarray().tolist() == drawn.tolist()
    assert drawn.std() > 1


def test_samples_are_of_the_class_and_the_sampler_that_were_asked_for(
    model: Model, tmp_path: Path
) -> None:
    model.sample("tiny", tmp_path / "s", "evaluate.num_steps=4", label="2", num_samples=2)
    evaluate = model.config.evaluate.model_copy(update={"num_steps": 4})
    config = model.config.model_copy(update={"evaluate": evaluate})
    drawn = model.draw(1, [2, 2], config)
    np.testing.assert_array_equal(read_pngs(tmp_path / "s"), drawn)
    assert drawn.tolist() != model.draw(1, [2, 2]).tolist()
    assert drawn.tolist() != model.draw(1, [0, 0], config).tolist()


@pytest.mark.parametrize(
    ("target", "overrides", "label", "fault"),
    [
        ("tony", (), None, "There is no model 'tony'"),
        ("tiny@3", (), None, "has no version 3"),
        ("tiny@new", (), None, "names no version. Write NAME@3"),
        ("tiny", ("train.seed=1",), None, "--set train.seed cannot be set for a version"),
        ("tiny", (), "7", "There is no class '7'. Those there are: 0, 1, 2."),
        ("tiny", ("evaluate.use_gpu=true",), None, "torch finds no GPU on this machine"),
    ],
)
def test_what_cannot_be_sampled(
    model: Model, tmp_path: Path, target: str, overrides: tuple[str, ...], label: str, fault: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        model.sample(target, tmp_path / "s", *overrides, label=label)
    assert fault in str(refused.value)
    assert not (tmp_path / "s").exists()


def test_a_model_without_champion_or_training_says_so(model: Model, tmp_path: Path) -> None:
    for path in (model.root / "models" / "tiny" / "promotions").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"has no champion. Name a version, as tiny@2"):
        model.sample("tiny", tmp_path / "s")
    (model.root / "steps" / "train" / "t2" / "manifest.json").unlink()
    with pytest.raises(StorageError, match="is gone, which the registry names"):
        model.sample("tiny@2", tmp_path / "s")


def test_a_version_is_exported_by_name(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no directory is called so
    done = export_model("tiny@2", tmp_path / "e", root=str(model.root))
    assert (done.document.source.train, done.document.global_step) == ("t2", 300)
    found, _ = load_model_folder(tmp_path / "e")
    expected = model.network(2).model
    assert torch.equal(found.final_conv.weight, expected.final_conv.weight)


def test_a_config_that_was_only_retrained_names_its_champion(model: Model) -> None:
    root = f"storage.root={model.root}"
    with pytest.raises(ConfigError, match=r"is not finished: .*tiny is its champion, version 1 "):
        find_trained(str(model.path), [root])


def record_run(model: Model, run: str) -> None:
    RunRecord(model.storage, run, model.config, []).close("done")


def test_the_run_of_a_config_is_its_own_or_that_of_a_cycle(model: Model) -> None:
    own = make_plan(model.config).run
    assert find_run(model.config)[1:] == (own, None)  # of which there is no record
    first = begin_cycle(model.registry, {"key": "a"})
    assert find_run(model.config)[1] == own
    record_run(model, "tiny-cycle1")
    assert find_run(model.config)[1] == "tiny-cycle1"  # it goes on
    end_cycle(model.registry, first["number"], {"state": "kept", "run": "tiny-cycle1"})
    record_run(model, "tiny-other")  # of another config
    assert find_run(model.config)[1] == "tiny-cycle1"
    second = begin_cycle(model.registry, {"key": "b"})
    assert find_run(model.config)[1] == "tiny-cycle1"  # no run of the second yet
    end_cycle(model.registry, second["number"], {"state": "held", "run": None})
    _, run, cycle = find_run(model.config)
    assert cycle is not None
    assert (run, cycle["number"], cycle["outcome"]["state"]) == ("tiny-cycle1", 2, "held")
    record_run(model, own)
    assert find_run(model.config)[1] == own


def test_many_samples_are_of_the_classes_that_their_file_says(model: Model, tmp_path: Path) -> None:
    model.sample("tiny", tmp_path / "s", "evaluate.num_steps=2", num_samples=70)
    evaluate = model.config.evaluate.model_copy(update={"num_steps": 2})
    config = model.config.model_copy(update={"evaluate": evaluate})
    table = pa.ipc.open_file(tmp_path / "s" / "samples.arrow").read_all()
    drawn = model.draw(1, table["label"].to_pylist(), config)
    assert np.abs(read_pngs(tmp_path / "s").astype(int) - drawn).max() <= 1
