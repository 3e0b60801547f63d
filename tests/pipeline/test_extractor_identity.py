"""What is part of the key of the step `features` beside its settings."""

import hashlib
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.errors import ConfigError, DataError, EvaluationError
from pipeline.extractor_identity import (
    CODE,
    OF_THE_LIBRARY,
    UNREAD,
    WEIGHTS,
    hash_code,
    identify_extractor,
    read_weights,
)
from pipeline.settings import FeaturesConfig
from pipeline.storage import LocalStorage


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def inception(**settings: Any) -> FeaturesConfig:
    return FeaturesConfig(extractor="inception", **settings)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


def test_other_weights_at_the_same_path_are_another_extractor(
    storage: LocalStorage, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    features = inception(weights=str(path))
    for content in (b"first", b"other"):  # of one length
        path.write_bytes(content)
        assert identify_extractor(features, storage) == {WEIGHTS: sha256(content)}
        assert read_weights(features, sha256(content)) == content
    with pytest.raises(DataError, match="changed since the run was planned"):
        read_weights(features, sha256(b"first"))


def test_weights_with_another_hash_than_asked_for_are_refused(
    storage: LocalStorage, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    good, bad = sha256(b"weights"), sha256(b"what was meant")
    features = inception(weights=str(path), weights_sha256=good)
    assert identify_extractor(features, storage) == {WEIGHTS: good}
    features = inception(weights=str(path), weights_sha256=bad)
    for look in (
        lambda: identify_extractor(features, storage),
        lambda: read_weights(features, bad),
    ):
        with pytest.raises(EvaluationError, match=f"is {good}, where it must be {bad}"):
            look()


@pytest.mark.parametrize("name", ["missing.pth", "", "missing/w.pth"])
def test_weights_that_are_no_file_are_refused(
    storage: LocalStorage, tmp_path: Path, name: str
) -> None:
    features = inception(weights=str(tmp_path / name))
    with pytest.raises(DataError, match=r"features\.weights = .* is no file\. Give the path"):
        identify_extractor(features, storage)
    with pytest.raises(DataError, match="Cannot read"):
        read_weights(features, "0" * 64)


def test_remote_weights_are_read_once_to_be_known(object_store: Any, storage: LocalStorage) -> None:
    store, bucket = object_store
    uri = f"s3://{bucket}/w.pth"
    store.filesystem.pipe_file(uri, b"weights")
    features, known = inception(weights=uri), {WEIGHTS: sha256(b"weights")}
    assert identify_extractor(features, storage, read_remote=False) == {WEIGHTS: UNREAD}
    assert identify_extractor(features, storage) == known
    store.requests.clear()
    assert identify_extractor(features, storage, read_remote=False) == known
    assert store.read() == []
    assert read_weights(features, known[WEIGHTS]) == b"weights"
    asked = inception(weights=uri, weights_sha256="0" * 64)
    assert identify_extractor(asked, storage) == {WEIGHTS: "0" * 64}
    with pytest.raises(EvaluationError, match="where it must be 0000"):
        read_weights(asked, "0" * 64)


def test_what_learns_from_the_data_or_comes_with_the_library_has_no_files(
    storage: LocalStorage,
) -> None:
    assert identify_extractor(FeaturesConfig(), storage) == {}
    assert identify_extractor(inception(), storage) == {WEIGHTS: OF_THE_LIBRARY}
    assert identify_extractor(inception(weights_sha256="a" * 64), storage) == {WEIGHTS: "a" * 64}


def test_code_is_found_in_packages_without_being_run(
    storage: LocalStorage, tmp_path: Path, monkeypatch: Any
) -> None:
    inner = tmp_path / "outer_of_a_test" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer_of_a_test" / "__init__.py").write_text("raise RuntimeError('was run')")
    (inner / "nets.py").write_text("raise RuntimeError('was run')")  # inner: a namespace
    monkeypatch.syspath_prepend(str(tmp_path))
    features = FeaturesConfig(extractor="outer_of_a_test.inner.nets:make")
    code = sha256((inner / "nets.py").read_bytes())
    assert identify_extractor(features, storage) == {CODE: code}
    (inner / "nets.py").write_text("pass")
    assert identify_extractor(features, storage) != {CODE: code}


@pytest.mark.parametrize(
    "module", ["no_such", "json.no_such", "pipeline.steps.more", "sys", "made_of_a_test"]
)
def test_code_that_is_not_there_is_told(module: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "made_of_a_test", types.ModuleType("made_of_a_test"))
    with pytest.raises(ConfigError, match=f"needs a module {module}, and there is none"):
        hash_code(f"{module}:make")


def test_looking_at_an_extractor_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.extractor_identity as i; i.hash_code('pipeline.extractors.own:x'); "
        "print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_plan_tells_that_the_weights_changed(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"a")
    settings = [f"storage.root={tmp_path / 'root'}", "evaluate.num_samples=700"]
    settings += ["features.extractor=inception", "features.width=64", "features.weights=w.pth"]
    config = load_config(tiny_config, settings)
    first = {p.step.name: p.key for p in make_plan(config).steps}
    (tmp_path / "w.pth").write_bytes(b"b")
    second = {p.step.name: p.key for p in make_plan(config).steps}
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"features", "reference", "evaluate", "promote", "report"}
