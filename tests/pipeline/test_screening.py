"""What of new input a cycle holds: real shards and records, with features that are easily told."""

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from pipeline import drift as drift_module
from pipeline import screening as module
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.dataset import read_dataset
from pipeline.dataset_document import make_document
from pipeline.driver import Basis
from pipeline.errors import StorageError
from pipeline.extractors.naming import ARTIFACT
from pipeline.feature_cache import FeatureCache, FeatureFile, list_files
from pipeline.holding import hashes_of, held_shards, latest_findings, release_shard
from pipeline.pinning import input_hashes
from pipeline.reference import _save_sums
from pipeline.registry import Registry
from pipeline.scores.drift import MIN_ITEMS
from pipeline.scores.frechet import sum_features
from pipeline.screening import screen
from pipeline.settings import Config
from pipeline.shards import open_table
from pipeline.sources import InputShard, leave_out, list_inputs
from pipeline.storage import LocalStorage, hash_content
from pipeline.units import SPLITS, missing_units, read_units
from pipeline.workflow import hash_json

FEW = MIN_ITEMS - 1
FEATURES = {
    "step": "features",
    "key": "f",
    "metrics": {"extractor": "x", "num_features": 2, "code_sha256": None},
    "artifacts": {ARTIFACT: {"sha256": "w"}},
}


def honest(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return png(rng.normal(rng.uniform(60, 190), 20, (8, 8)))


def noise(seed: int) -> bytes:
    return png(np.random.default_rng(seed).uniform(0, 255, (8, 8)))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def measure_images(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    return np.stack([flat.mean(1), flat.std(1)], 1)


class World:
    """A directory of input, a champion that was trained on it, and cycles of screening."""

    def __init__(
        self, config_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, make_tar: Any
    ) -> None:
        self.input = directory / "input"
        self.input.mkdir()
        self.config_path, self.make_tar = config_path, make_tar
        self.storage = LocalStorage(str(directory / "runs"))
        self.registry = Registry(self.storage, "tiny")
        self.basis = Basis({})
        self.cycle, self.seed = 0, 0
        self.notes: list[str] = []
        self.forwarded: list[FeatureFile] = []
        monkeypatch.setattr(
            module, "bring_about", lambda config, *_, **__: {"preprocess": self.preprocess(config)}
        )
        monkeypatch.setattr(drift_module, "forward", self._forward)

    def add_tar(self, name: str, make: Callable[[int], bytes], count: int, old: int = 0) -> None:
        """Writes a tar of new images, behind some of the first ones there were."""
        images = [honest(k) for k in range(old)] + [make(seed) for seed in self._seeds(count)]
        self.make_tar(self.input / name, [(f"{k:05d}.png", i) for k, i in enumerate(images)])

    def add_files(self, make: Callable[[int], bytes], count: int) -> None:
        for seed in self._seeds(count):
            (self.input / f"{seed:05d}.png").write_bytes(make(seed))

    def config(self, *settings: str) -> Config:
        overrides = [f'data.sources=["{self.input}"]', f"storage.root={self.storage.uri}"]
        return load_config(self.config_path, [*overrides, *settings])

    def shards(self) -> list[InputShard]:
        return list_inputs(self.config().data, self.storage).shards

    def promote(self, held: Iterable[Mapping[str, Any]] = ()) -> None:
        """The champion is trained on what there is but for what is held; the first one pins it."""
        config = self.config()
        data = config.data.model_copy(update={"leave_out": tuple(hashes_of(held))})
        manifest = self.preprocess(config.model_copy(update={"data": data}))
        version = {"key": manifest["key"], "lineage": {"preprocess": manifest["key"]}}
        number = self.registry.add_version(version)["number"]
        self.registry.promote(number, "good")
        if not self.basis.pinned:
            self.registry.add_record("evaluations", (), {"reference": "r"})
            self.basis = Basis(
                {"features": FEATURES, "reference": self._refer_to(manifest)}, evaluation=1
            )

    def screen(self, *settings: str, again: bool = False) -> tuple[list[str], list[str]]:
        """A cycle; the names of what is held, and of what is used untested."""
        self.cycle += not again
        champion = self.registry.champion()
        assert champion is not None
        known = input_hashes(self.storage, champion["lineage"]["preprocess"])
        shards = self.shards()
        new = {shard.name: shard.sha256 for shard in shards if shard.sha256 not in known}
        cycle = {"number": self.cycle, "champion": champion["number"], "new": new}
        config = self.config(*settings)
        self.held, unjudged = screen(
            self.registry, config, shards, cycle, self.basis, self._observe
        )
        return sorted(record["shard"] for record in self.held), sorted(unjudged)

    def records(self) -> list[dict[str, Any]]:
        found = self.registry.records("drift")
        return [{k: v for k, v in r.items() if k not in ("by", "time")} for r in found]

    def states(self) -> dict[str, str]:
        return {r["shard"]: r["state"] for r in latest_findings(self.registry).values()}

    def preprocess(self, config: Config) -> dict[str, Any]:
        shards = list_inputs(config.data, self.storage).shards
        for shard in missing_units(shards, config.data, self.storage):
            preprocess_shard(shard, config.data, self.storage)
        units = read_units(self.storage, shards, config.data)
        document = make_document(config.data, self.storage, shards, units, ())
        hashes = {shard.name: shard.sha256 for shard in shards}
        return self._keep("preprocess", hash_json(hashes), {"settings": {"shards": hashes}}, {
            "dataset.json": json.dumps(document).encode()
        })  # fmt: skip

    def preprocess_document(self) -> dict[str, Any]:
        return read_dataset(self.storage, self.preprocess(self.config()))

    def _seeds(self, count: int) -> range:
        self.seed += count
        return range(self.seed - count, self.seed)

    def _observe(self, event: Any) -> None:
        self.notes.append(event.fields["text"])

    def _keep(
        self,
        step: str,
        key: str,
        identity: Mapping[str, Any],
        artifacts: Mapping[str, bytes],
        **metrics: Any,
    ) -> dict[str, Any]:
        manifest = {"step": step, "key": key, "identity": identity, "metrics": metrics}
        manifest["artifacts"] = {
            name: {"file": name, "sha256": hash_content(content)}
            for name, content in artifacts.items()
        }
        text = json.dumps(manifest).encode()
        for name, content in {**artifacts, "manifest.json": text}.items():
            self.storage.create(f"steps/{step}/{key}/{name}", content)
        return manifest

    def _refer_to(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The result of the step `reference`, with the features of the images of a data set."""
        files = list_files(read_dataset(self.storage, data))
        self._forward(self.storage, FEATURES, files, 0)
        self.forwarded.clear()
        cache = FeatureCache(self.storage, FEATURES)
        parts = [(file.split, cache.read(file)) for file in files]
        found = {
            split: np.concatenate([f for of, f in parts if of == split and f is not None])
            for split in SPLITS
        }
        artifacts = {"sums.safetensors": _save_sums({s: sum_features(f) for s, f in found.items()})}
        for number, part in enumerate(np.array_split(found["train"], 2)):
            content = safetensors.numpy.save({"features": part})
            artifacts[f"train-{number:05d}.safetensors"] = content
        counts = {split: len(part) for split, part in found.items()}
        identity = {"inputs": {"preprocess": data["key"]}}
        return self._keep("reference", "r", identity, artifacts, counts=counts)

    def _forward(
        self, storage: Any, features: Any, files: Iterable[FeatureFile], cache_bytes: int
    ) -> None:
        cache = FeatureCache(storage, features)
        for file in files:
            self.forwarded.append(file)
            table = open_table(storage.local_path(file.path))
            cache.write(file, measure_images(table.column(0).chunk(0).to_numpy_ndarray()))


@pytest.fixture
def world(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_tar: Callable[..., Path],
) -> World:
    return World(tiny_config, tmp_path, monkeypatch, make_tar)


@pytest.fixture
def of_tars(world: World) -> World:
    """A champion of 400 images in a tar."""
    world.add_tar("old.tar", honest, 400)
    world.promote()
    return world


def test_noise_among_the_loose_images_of_old_buckets_is_held_and_these_stay(world: World) -> None:
    world.add_files(honest, 1100)
    world.promote()
    assert len(world.shards()) == 4
    world.add_files(noise, 60)
    (name,), _ = world.screen()
    assert name.startswith("loose-")
    (record,) = world.held
    assert (record["count"], len(record["files"])) == (60, 60)
    first = "60 of its items (01100.png, 01101.png, 01102.png, ...) are "
    assert record["reason"].startswith(first)
    champion = world.registry.champion()
    assert champion is not None
    known = input_hashes(world.storage, champion["lineage"]["preprocess"])
    left = leave_out(world.shards(), hashes_of(world.held))
    assert {shard.sha256 for shard in left} == known  # all of the old images, and nothing else

    # Good ones that come later are judged by themselves, and used.
    world.add_files(honest, 60)
    assert world.screen() == ([name], [])
    world.promote(world.held)
    assert world.screen() == ([name], [])
    assert release_shard(world.registry, name, "they are meant so")["files"] == record["files"]
    assert world.screen() == ([], [])


def test_old_images_are_not_new_when_the_buckets_double(world: World) -> None:
    world.add_files(honest, 500)
    world.promote()
    world.add_files(noise, 40)
    assert [shard.name for shard in world.shards()] == ["files-0000-of-0002", "files-0001-of-0002"]
    (name,), _ = world.screen()
    assert world.held[0]["count"] == 40
    assert [s.name for s in leave_out(world.shards(), hashes_of(world.held))] == [
        "files-0000-of-0001"
    ]
    world.input.joinpath("00000.png").unlink()  # one that is gone is no reason either
    assert world.screen() == ([name], [])


def test_only_what_is_new_in_a_changed_shard_is_measured(of_tars: World) -> None:
    of_tars.add_tar("old.tar", noise, 40, old=400)
    assert of_tars.screen() == (["old.tar"], [])
    assert of_tars.held[0]["count"] == 40
    of_tars.add_tar("old.tar", honest, 40, old=400)
    assert of_tars.screen() == ([], [])
    of_tars.add_tar("again.tar", honest, 0, old=200)  # nothing but what the champion knows
    assert of_tars.screen() == ([], [])
    assert of_tars.states() == {"old.tar": "held"}  # by its content, which is gone


def test_shards_too_small_to_be_tested_are_tested_together(of_tars: World) -> None:
    of_tars.add_tar("a.tar", noise, 20)
    of_tars.add_tar("b.tar", noise, 20)
    of_tars.add_tar("c.tar", honest, 300)
    assert of_tars.screen() == (["a.tar", "b.tar"], [])
    assert of_tars.held[0]["reason"].startswith(
        "40 of the items of a.tar, b.tar, tested together, are "
    )
    # Held ones are tested again without the others, which are not held for their sake.
    of_tars.add_tar("d.tar", honest, 20)
    assert of_tars.screen() == (["a.tar", "b.tar"], ["d.tar"])
    of_tars.input.joinpath("b.tar").unlink()
    of_tars.input.joinpath("d.tar").unlink()
    assert of_tars.screen() == (["a.tar"], [])
    assert "a.tar held as before: too few new items to be tested again" in of_tars.notes
    assert of_tars.screen("retrain.check_drift=false") == ([], [])


def test_a_reference_of_too_few_images_to_test_with_is_said_with_the_number(world: World) -> None:
    world.add_tar("old.tar", honest, 65)
    world.promote()
    count = world.basis.pinned["reference"]["metrics"]["counts"]["train"]
    assert FEW < count < 64
    world.add_tar("x.tar", noise, 100)
    world.add_tar("y.tar", noise, FEW)
    assert world.screen() == ([], ["x.tar", "y.tar"])
    assert world.notes == [
        f"{name} used untested: the pinned reference has {count} training images, and the test "
        "takes 64; `raydiffusion accept-reference CONFIG` pins others"
        for name in ("x.tar", "y.tar")
    ]


def test_what_was_let_in_untested_is_remembered(of_tars: World) -> None:
    of_tars.add_tar("a.tar", noise, FEW)
    assert of_tars.screen() == ([], ["a.tar"])
    assert "a.tar used untested: too few new items" in of_tars.notes[-1]
    of_tars.promote()
    of_tars.add_tar("b.tar", noise, FEW)
    assert of_tars.screen() == (["b.tar"], [])
    assert (
        "62 of the items of b.tar, tested together with 31 let in untested before, are "
        in (of_tars.held[0]["reason"])
    )
    assert of_tars.states() == {"a.tar": "unjudged", "b.tar": "held"}


def test_what_was_let_in_untested_and_passes_later_is_done_with(of_tars: World) -> None:
    of_tars.add_tar("a.tar", honest, FEW)
    assert of_tars.screen() == ([], ["a.tar"])
    of_tars.add_tar("b.tar", honest, FEW)  # the challenger with the first was kept: both are new
    assert of_tars.screen() == ([], [])
    assert of_tars.states() == {"a.tar": "passed"}
    of_tars.promote()
    of_tars.add_tar("c.tar", honest, FEW)
    assert of_tars.screen() == ([], ["c.tar"])


def test_a_held_shard_that_passes_later_is_held_no_more(of_tars: World) -> None:
    of_tars.add_tar("x.tar", noise, 100)
    assert of_tars.screen() == (["x.tar"], [])
    assert [r["shard"] for r in held_shards(of_tars.registry)] == ["x.tar"]
    assert of_tars.screen() == (["x.tar"], [])
    assert len(of_tars.records()) == 1  # what has not changed is not recorded again
    assert of_tars.screen("retrain.drift_factor=1e9") == ([], [])
    assert held_shards(of_tars.registry) == []
    assert of_tars.screen() == (["x.tar"], [])
    assert [r["shard"] for r in held_shards(of_tars.registry)] == ["x.tar"]
    assert of_tars.screen("retrain.check_drift=false") == ([], [])
    assert held_shards(of_tars.registry) == []
    assert [r["state"] for r in of_tars.records()] == ["held", "passed", "held", "passed"]


def test_held_loose_images_that_are_taken_in_unchecked_are_held_no_more(world: World) -> None:
    world.add_files(honest, 400)
    world.promote()
    world.add_files(noise, 40)
    (name,), _ = world.screen()
    assert world.screen("retrain.check_drift=false") == ([], [])
    assert world.states() == {name: "passed"}


def test_a_cycle_that_was_killed_finds_the_same_again(of_tars: World) -> None:
    of_tars.add_tar("a.tar", noise, 20)
    of_tars.add_tar("b.tar", noise, 20)
    of_tars.screen()
    for settings in ((), ("retrain.drift_factor=1e9",)):
        of_tars.add_tar("c.tar", honest, FEW - 1)
        found, records = of_tars.screen(*settings), of_tars.records()
        assert of_tars.screen(*settings, again=True) == found
        assert of_tars.records() == records


def test_the_rows_of_the_test_are_all_that_is_held_in_memory(
    of_tars: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[int, int]] = []

    def measure(shard: np.ndarray, training: np.ndarray, *_: Any, **__: Any) -> None:
        counts.append((len(shard), len(training)))

    monkeypatch.setattr(drift_module, "measure_drift", measure)
    monkeypatch.setattr(drift_module, "MAX_ITEMS", 50)
    monkeypatch.setattr(drift_module, "MAX_TRAINING", 90)
    of_tars.add_tar("x.tar", honest, 200)
    of_tars.add_tar("y.tar", honest, FEW)
    assert of_tars.screen() == ([], ["x.tar", "y.tar"])
    assert counts == [(50, 90)]
    assert {file.path.split("/")[2] for file in of_tars.forwarded} == {
        shard["directory"].split("/")[2]
        for shard in of_tars.preprocess_document()["shards"]
        if shard["input"] == "x.tar"
    }
    assert of_tars.states() == {"y.tar": "unjudged"}  # the others could never be


def test_an_index_that_is_gone_is_named(of_tars: World) -> None:
    (shard,) = of_tars.preprocess_document()["shards"]
    (index,) = (n for n in of_tars.storage.list(shard["directory"]) if n.startswith("index"))
    of_tars.storage.delete(f"{shard['directory']}/{index}")
    of_tars.add_tar("x.tar", honest, 100)
    with pytest.raises(StorageError, match=r"index.* is missing or not what its manifest says"):
        of_tars.screen()


def test_of_what_was_let_in_untested_only_what_was_all_looked_at_is_done_with(
    of_tars: World,
) -> None:
    first = of_tars.seed
    of_tars.add_tar("a.tar", honest, FEW)
    assert of_tars.screen() == ([], ["a.tar"])
    of_tars.promote()
    some = [(f"{k:05d}.png", honest(k)) for k in range(first, first + 10)]
    of_tars.make_tar(of_tars.input / "a.tar", some)  # the others are gone
    of_tars.add_tar("b.tar", honest, FEW)
    assert of_tars.screen() == ([], [])
    assert "with 10 let in untested before" in of_tars.notes[-1]
    assert of_tars.states() == {"a.tar": "unjudged"}


def test_a_shard_of_many_is_tested_without_what_was_let_in_before(of_tars: World) -> None:
    of_tars.add_tar("a.tar", noise, FEW)
    assert of_tars.screen() == ([], ["a.tar"])
    of_tars.promote()
    of_tars.add_tar("b.tar", honest, 100)
    assert of_tars.screen() == ([], [])
    assert of_tars.notes[-1].startswith("b.tar passes: 100 of its items are ")


def test_twins_of_an_item_make_no_shard_large_enough_to_be_tested(of_tars: World) -> None:
    of_tars.add_tar("x.tar", lambda seed: noise(seed % 20), 40)
    assert of_tars.screen("data.drop_duplicates=true") == ([], ["x.tar"])
