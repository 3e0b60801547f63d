import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import driver
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.driver import Basis, bring_about, make_plan, run_config
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.pinning import read_document
from pipeline.sources import list_inputs
from pipeline.storage import open_storage

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits"


@pytest.mark.parametrize("name", ["validation_fraction", "test_fraction"])
def test_a_score_without_images_held_out_is_refused_before_any_work(
    tiny_config: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(tiny_config, [f"data.{name}=0", f"storage.root={tmp_path / 'root'}"])
    for targets in (("report",), ("preprocess", "features"), ("evaluate",)):
        with pytest.raises(ConfigError, match=rf"data\.{name} is 0, and the score needs images"):
            run_config(config, targets, observer=lambda event: None)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("extractor", ["classifier", "self_supervised", "inception"])
def test_sequences_are_scored_by_an_extractor_of_ones_own_alone(
    tmp_path: Path, extractor: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "x"\n[data]\nsources = ["a.npy"]\nsequence_shape = [2, 64]\n')
    settings = [f"storage.root={tmp_path / 'root'}", "evaluate.num_samples=20480"]

    def run(extractor: str) -> None:
        config = load_config(path, [*settings, f"features.extractor={extractor}"])
        run_config(config, ("evaluate",), observer=lambda event: None)

    message = f"The extractor {extractor} is one of images, and data.sequence_shape makes sequences"
    with pytest.raises(ConfigError, match=message):
        run(extractor)
    with pytest.raises(DataError, match="no sequences at"):  # it looks for them
        run("json:loads")


def test_work_keeps_to_the_input_that_it_is_given(
    tiny_config: Path, tmp_path: Path, make_png: Callable[..., bytes]
) -> None:
    source, other = tmp_path / "in", tmp_path / "other"
    source.mkdir()
    for k in (0, 1):
        shutil.copy(DIGITS / f"digits-000{k}.tar", source)
    (source / "a.png").write_bytes(make_png(1))
    settings = [f'data.sources=["{source}"]', f"storage.root={tmp_path / 'root'}"]
    config, storage = load_config(tiny_config, settings), open_storage(str(tmp_path / "root"))
    inputs = list_inputs(config.data, storage)
    for shard in inputs.shards:
        preprocess_shard(shard, config.data, storage)

    (source / "b.png").write_bytes(make_png(2))
    shutil.copy(DIGITS / "digits-0002.tar", source / "poison.tar")
    (source / "digits-0000.tar").unlink()
    shutil.copy(DIGITS / "digits-0003.tar", source / "digits-0001.tar")
    basis = Basis({}, inputs=inputs)
    made = bring_about(config, ("preprocess",), basis=basis, observer=lambda event: None)
    key = made["preprocess"]["key"]
    document = read_document(storage, key)
    assert [shard["input"] for shard in document["shards"]] == [s.name for s in inputs.shards]
    assert made["preprocess"]["identity"]["settings"]["shards"] == {
        shard.name: shard.sha256 for shard in inputs.shards
    }

    # What is not read yet and is no longer what it was ends the work.
    fresh = load_config(tiny_config, [*settings[:1], f"storage.root={other}"])
    with pytest.raises(DataError, match=r"digits-0001\.tar changed since the run was planned"):
        preprocess_shard(inputs.shards[1], fresh.data, open_storage(str(other)))


def test_the_preflight_is_told_which_training_goes_on(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, [f"storage.root={tmp_path / 'root'}"])
    train = next(p for p in make_plan(config, ("train",)).steps if p.step.name == "train")
    told: list[Any] = []

    def refuse(*_: Any, series: str | None = None, **more: Any) -> Any:
        told.append(series)
        raise StorageError("Looked far enough. Stop.")

    monkeypatch.setattr(driver, "before_ray", refuse)
    for targets in (("train",), ("preprocess",)):
        with pytest.raises(StorageError, match="far enough"):
            run_config(config, targets, observer=lambda event: None)
    assert told == [train.series_directory, None]
