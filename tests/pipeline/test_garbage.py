"""What is deleted below a storage root, what stays, and what a kill in between leaves."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import garbage
from pipeline.config import load_config
from pipeline.errors import BusyError, ConfigError, StorageError
from pipeline.extractors import extractor_key
from pipeline.garbage import Unit, check_root, collect_garbage
from pipeline.leases import LIFE_S, hold_lease
from pipeline.processes import process_place
from pipeline.reachable import find_reached
from pipeline.registry import Registry, list_models
from pipeline.report.home import make_home
from pipeline.runs import SWEEP, RunRecord, list_runs
from pipeline.sources import list_inputs
from pipeline.steps import make_steps
from pipeline.storage import (
    Content,
    LocalStorage,
    Storage,
    as_storage_error,
    hash_content,
    hashed_name,
    open_storage,
)
from pipeline.units import unit_directory, units_of_step
from pipeline.workflow import hash_json, plan

ALL = -10.0  # seconds of grace: everything is old enough
SHARD = {name: f"steps/shard/{hash_json(name)}" for name in "ab"}
SERIES = {number: f"steps/train/{hash_json(number)}" for number in (1, 2, 3)}


class Root:
    """A storage root as runs leave it, written by hand."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def put(
        self, step: str, inputs: Mapping[str, str] | None = None, **settings: Any
    ) -> tuple[dict[str, Any], str]:
        """A finished step; its identity and key."""
        identity = {"step": step, "version": 1, "settings": settings, "inputs": dict(inputs or {})}
        key = hash_json(identity)
        artifacts = {}
        for name, text in settings.get("artifacts", {"x.bin": step}).items():
            content = text.encode()
            sha256 = hash_content(content)
            file = hashed_name(name, sha256)
            self.storage.create(f"steps/{step}/{key}/{file}", content)
            artifacts[name] = {"file": file, "sha256": sha256}
        facts = {"extractor": "classifier", "num_features": 4, "code_sha256": None}
        manifest = {
            "step": step, "key": key, "identity": identity, "artifacts": artifacts,
            "metrics": facts if step == "features" else {},
        }  # fmt: skip
        self.storage.create(f"steps/{step}/{key}/manifest.json", json.dumps(manifest).encode())
        return identity, key

    def put_data(self, name: str) -> tuple[dict[str, Any], str]:
        """A data set of one shard, whose features are there."""
        self.storage.create(f"{SHARD[name]}/train.arrow", b"arrow")
        self.storage.create(f"{SHARD[name]}/manifest.json", b"{}")
        files = [{"file": "train.arrow", "sha256": hash_content(name.encode())}]
        document = {"shards": [{"directory": SHARD[name], "files": files}]}
        text = json.dumps(document)
        return self.put("preprocess", shards={name: "s"}, artifacts={"dataset.json": text})

    def put_run(self, name: str, number: int, data: str) -> dict[str, Any]:
        """A run from its data to its evaluation; the identities and keys of its steps."""
        made = {"preprocess": self.put_data(data)}
        keys = {"preprocess": made["preprocess"][1]}
        made["features"] = self.put("features", keys, artifacts={"extractor.safetensors": data})
        manifest = self.storage.read(f"steps/features/{made['features'][1]}/manifest.json")
        extractor = extractor_key(json.loads(manifest))
        sha256 = hash_content(data.encode())
        self.storage.create(f"features/{extractor}/{sha256}.safetensors", b"features")
        made["train"] = self.put("train", keys, num=number)
        for file in ("optimizer.pt", "manifest.json"):
            self.storage.create(f"{SERIES[number]}/checkpoints/000000100/{file}", b"{}")
        keys |= {step: made[step][1] for step in ("features", "train")}
        made["evaluate"] = self.put("evaluate", keys, num=number)
        keys["evaluate"] = made["evaluate"][1]
        run = f"{name}-{number:08x}"
        document = {
            "run": run,
            "name": name,
            "identities": {step: identity for step, (identity, _) in made.items()},
            "directories": {step: f"steps/{step}/{key}" for step, (_, key) in made.items()}
            | {"train": SERIES[number]},
            "executions": [
                {"started": float(number), "ended": None, "outcome": "", "steps": {"train": {}}}
            ],
        }
        self.storage.create(f"runs/{run}/report.html", b"page")
        self.storage.create(f"runs/{run}/run.json", json.dumps(document).encode())
        return {"keys": keys, "series": hash_json(number), "document": document}

    def add_version(self, name: str, made: Mapping[str, Any]) -> None:
        document = {
            "key": made["keys"]["train"],
            "lineage": made["keys"],
            "checkpoint": {"series": made["series"], "global_step": 1},
        }
        Registry(self.storage, name).add_version(document)

    def has(self, path: str) -> bool:
        return next(self.storage.files(path), None) is not None

    def all(self) -> set[str]:
        """What there is, but for leases."""
        tops = ("steps", "features", "runs", "models", "models-elsewhere", "probes", "cache")
        files = {file.path for top in tops for file in self.storage.files(top)}
        return {path for path in files if "/lease-" not in path}

    def check_whole(self) -> None:
        """No manifest names a file that is gone."""
        for path in self.all():
            if path.endswith("/manifest.json") and not path.startswith("steps/shard"):
                directory = path.rpartition("/")[0]
                manifest = json.loads(self.storage.read(path))
                for artifact in manifest.get("artifacts", {}).values():
                    assert self.storage.exists(f"{directory}/{artifact['file']}"), path
                if "checkpoints" in path:
                    assert self.storage.exists(f"{directory}/optimizer.pt"), path
            if path.startswith("steps/shard") and path.endswith("manifest.json"):
                assert self.storage.exists(path.replace("manifest.json", "train.arrow")), path


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(open_storage(str(tmp_path / "root")))


@pytest.fixture(params=["local", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "local":
        return Root(open_storage(str(tmp_path / "root")))
    _, bucket = request.getfixturevalue("object_store")
    return Root(open_storage(f"s3://{bucket}/some/root"))


def test_what_no_record_reaches_goes_and_the_rest_stays(any_root: Root) -> None:
    root = any_root
    old, new = root.put_run("m", 1, "a"), root.put_run("m", 2, "b")
    root.storage.create(f"probes/{hash_json(0)}/node", b"x")
    root.storage.create("cache/identities/0.json", b"{}")
    before = root.all()
    survey = collect_garbage(root.storage, keep_runs=1, grace_s=ALL)
    assert survey.runs == ["m-00000002"]
    for step, key in old["keys"].items():
        assert not root.has(f"steps/{step}/{key}"), step
    for step, key in new["keys"].items():
        assert root.has(f"steps/{step}/{key}"), step
    after = root.all()
    gone = {SHARD["a"], SERIES[1], "runs/m-00000001", f"probes/{hash_json(0)}"}
    assert not any(root.has(path) for path in gone)
    assert not any(hash_content(b"a") in path for path in after)
    stay = {SHARD["b"], SERIES[2], "runs/m-00000002", "cache/identities"}
    assert all(root.has(path) for path in stay)
    assert any(hash_content(b"b") in path for path in after)
    assert {unit.path for unit in survey.garbage} >= gone
    size = sum(unit.num_bytes for unit in survey.garbage)
    assert 0 < size < sum(unit.num_bytes for unit in survey.garbage + survey.reached)
    assert before - after  # and once more there is nothing
    assert collect_garbage(root.storage, keep_runs=1, grace_s=ALL).garbage == []


def test_a_dry_run_says_the_same_and_deletes_nothing(root: Root) -> None:
    root.put_run("m", 1, "a")
    before = root.all()
    said = collect_garbage(root.storage, keep_runs=0, grace_s=ALL, dry_run=True)
    assert root.all() == before
    assert not root.has(SWEEP)
    assert collect_garbage(root.storage, keep_runs=0, grace_s=ALL).garbage == said.garbage != []
    assert root.all() == set()


def test_versions_keep_their_results_and_the_champion_its_checkpoints(root: Root) -> None:
    for number, data in ((1, "a"), (2, "b")):
        root.add_version("m", root.put_run("m", number, data))
    Registry(root.storage, "m").promote(1, "first")
    survey = collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert survey.runs == ["m-00000001"]  # which made the champion
    assert root.has(SHARD["a"])
    assert root.has(SHARD["b"])
    assert root.has(SERIES[1])
    assert {unit.path for unit in survey.garbage} == {SERIES[2], "runs/m-00000002"}


def test_what_a_pinned_evaluation_names_stays_with_what_it_rests_on(root: Root) -> None:
    keys = root.put_run("m", 1, "a")["keys"]
    reference = root.put("reference", {"preprocess": keys["preprocess"]})[1]
    pinned = json.dumps({"reference": reference, "number": 1}).encode()
    root.storage.create("models/m/evaluations/000001.json", pinned)
    collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert root.has(f"steps/reference/{reference}")
    assert root.has(SHARD["a"])
    assert not root.has(f"steps/train/{keys['train']}")


def test_a_damaged_pin_is_to_be_brought_back_not_deleted(root: Root) -> None:
    root.put_run("m", 1, "a")
    root.storage.create("models/m/evaluations/000001.json", b"{")
    with pytest.raises(StorageError, match=r"000001\.json is .* Bring it back from a copy; a new"):
        collect_garbage(root.storage, keep_runs=0, grace_s=ALL)


def test_a_search_keeps_its_trials(root: Root) -> None:
    document = root.put_run("m", 1, "a")["document"]
    trial = root.put("trial")[1]
    root.storage.create(f"steps/trial/{trial}/checkpoints/1/model", b"left by a kill")
    identity, tune = root.put("tune")
    proposal = json.dumps({"name": "0000", "key": trial}).encode()
    root.storage.create(f"steps/tune/{tune}/trials/0000/proposal.json", proposal)
    document["identities"]["tune"] = identity
    root.storage.replace("runs/m-00000001/run.json", json.dumps(document).encode())
    other = root.put("trial", seed=1)[1]
    survey = collect_garbage(root.storage, grace_s=ALL)
    assert {unit.path: unit.kind for unit in survey.garbage} == {
        f"steps/trial/{other}": "steps/trial",
        f"steps/trial/{trial}/checkpoints": "left by kills",
    }


def test_begun_work_stays_and_what_was_of_use_only_meanwhile_goes(root: Root) -> None:
    document = root.put_run("m", 1, "a")["document"]
    done, begun = root.put("evaluate", num=7), {"settings": {"shards": {"x": "s"}}, "inputs": {}}
    document["identities"] |= {"evaluate": done[0], "preprocess": begun}
    root.storage.replace("runs/m-00000001/run.json", json.dumps(document).encode())
    unit = units_of_step(begun["settings"])[0]
    root.storage.create(f"{unit}/manifest.json", b"{}")
    half = f"steps/preprocess/{hash_json(begun)}"
    for path in (f"steps/evaluate/{done[1]}/chunks/1", f"{half}/chunks/1"):
        root.storage.create(path, b"x")
    collect_garbage(root.storage, grace_s=ALL)
    assert root.has(unit)
    assert root.has(f"{half}/chunks")
    assert root.storage.exists(f"steps/evaluate/{done[1]}/manifest.json")
    assert not root.has(f"steps/evaluate/{done[1]}/chunks")


def test_the_units_of_a_step_are_those_of_its_config(tiny_config: Path) -> None:
    config, storage = load_config(tiny_config), LocalStorage(str(tiny_config.parent / "root"))
    shards = list_inputs(config.data, storage).shards
    step = plan(make_steps(config, shards), storage)[0]
    units = tuple(unit_directory(shard, config.data) for shard in shards)
    assert units_of_step(step.identity["settings"]) == units


def age(root: Root, path: str, days: float) -> None:
    for file in list(root.storage.files(path)):
        then = time.time() - days * 86_400
        os.utime(Path(root.storage.uri, file.path), (then, then))


def test_what_is_young_stays_with_what_it_rests_on(root: Root) -> None:
    data = root.put_data("a")[1]
    old = root.put("train", {"preprocess": data})[1]
    young = root.put("train", {"preprocess": data}, num=2)[1]
    age(root, "steps", 10)
    age(root, f"steps/train/{young}", 6)
    survey = collect_garbage(root.storage)
    assert [unit.path for unit in survey.garbage] == [f"steps/train/{old}"]
    assert root.has(SHARD["a"])


def test_runs_stay_while_they_are_young_or_at_work(root: Root) -> None:
    for number in (1, 2, 3):
        root.put_run("m", number, "a")
    with hold_lease(root.storage, "runs/m-00000001"):
        age(root, "", 10)
        age(root, "runs/m-00000002", 6)
        assert collect_garbage(root.storage, keep_runs=0).runs == ["m-00000001", "m-00000002"]
    assert not root.has("runs/m-00000003")


def test_a_directory_whose_lease_is_held_stays(root: Root) -> None:
    root.put_run("m", 1, "a")
    key = root.put("train", num=9)[1]
    with hold_lease(root.storage, f"steps/train/{key}"):
        survey = collect_garbage(root.storage, grace_s=ALL)
    assert survey.garbage == []
    assert [unit.path for unit in survey.young] == [f"steps/train/{key}"]


class KilledError(Exception):
    """Where a SIGKILL would be."""


class Dying(LocalStorage):
    """A root at which the process dies after so many deletions."""

    left = 0

    def delete(self, path: str) -> None:
        if not path.startswith(SWEEP):
            if Dying.left == 0:
                raise KilledError
            Dying.left -= 1
        super().delete(path)


def test_killed_anywhere_no_manifest_names_what_is_gone_and_the_next_one_ends_it(
    tmp_path: Path,
) -> None:
    def make(place: Path) -> Root:
        root = Root(LocalStorage(str(place)))
        for number, data in ((1, "a"), (2, "b")):
            root.put_run("m", number, data)
        return root

    whole = make(tmp_path / "whole")
    collect_garbage(whole.storage, keep_runs=1, grace_s=ALL)
    deletions, was_killed = 0, True
    while was_killed:
        root = make(tmp_path / str(deletions))
        Dying.left = deletions
        try:
            collect_garbage(Dying(root.storage.uri), keep_runs=1, grace_s=ALL)
            was_killed = False
        except KilledError:
            root.check_whole()
            collect_garbage(root.storage, keep_runs=1, grace_s=ALL)
        assert root.all() == whole.all()
        deletions += 1
    assert deletions > 10


def test_a_run_that_starts_meanwhile_waits_until_it_is_over(root: Root, tiny_config: Path) -> None:
    config = load_config(tiny_config)
    records: list[RunRecord] = []
    with hold_lease(root.storage, SWEEP):
        thread = threading.Thread(
            target=lambda: records.append(RunRecord(root.storage, "m-1", config, []))
        )
        thread.start()
        while not root.storage.exists("runs/m-1/run.json"):
            time.sleep(0.01)
        assert records == []  # its record is there before it looks, and it looks before it works
    thread.join(timeout=10)
    assert records[0].has_waited
    assert not RunRecord(root.storage, "m-1", config, []).has_waited


def test_one_at_a_time(root: Root) -> None:
    root.put_run("m", 1, "a")
    with (
        hold_lease(root.storage, SWEEP),
        pytest.raises(BusyError, match=r"cleans up .*root already\. Wait until it has ended"),
    ):
        collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert root.has(SHARD["a"])


def test_one_that_was_held_up_stops(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    root.put_run("m", 1, "a")
    monkeypatch.setattr(garbage, "LIFE_S", 0.0)  # so that any pause is too long
    with pytest.raises(StorageError, match=r"was held up, and a run may have .* Run it again"):
        collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert root.has(SHARD["a"])


class Full(LocalStorage):
    """A root without space as long as a file is there."""

    def replace(self, path: str, content: bytes) -> None:
        self._check(path)
        super().replace(path, content)

    def create(self, path: str, content: Content) -> bool:
        self._check(path)
        return super().create(path, content)

    def _check(self, path: str) -> None:
        with as_storage_error("write", path):
            if any("full" in file.path for file in self.files("steps")):
                raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_left_by_a_kill", [True, False])
def test_on_a_full_disk_what_killed_writers_left_goes_first(
    root: Root, is_left_by_a_kill: bool
) -> None:
    root.put_run("m", 1, "a")
    # As of a process that had this one's number.
    name = f".staged-{process_place()}-{os.getpid()}-1-full" if is_left_by_a_kill else "full.arrow"
    Path(root.storage.uri, SHARD["a"], name).write_bytes(b"x")
    before = root.all()
    if is_left_by_a_kill:
        collect_garbage(Full(root.storage.uri), keep_runs=0, grace_s=ALL)
        assert root.all() == set()
    else:
        with pytest.raises(StorageError, match=r"no space left at .* Free some KiB there by hand"):
            collect_garbage(Full(root.storage.uri), keep_runs=0, grace_s=ALL)
        assert root.all() == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root, key: root.storage.replace(f"steps/preprocess/{key}/manifest.json", b"{"),
        lambda root, key: root.storage.replace("runs/m-00000001/run.json", b"{"),
        lambda root, key: [
            root.storage.delete(file.path)
            for file in list(root.storage.files(f"steps/preprocess/{key}"))
            if "dataset" in file.path
        ],
    ],
    ids=["a manifest", "a record", "a data set's document"],
)
def test_nothing_is_deleted_where_what_is_needed_cannot_be_told(
    root: Root, spoil: Callable[[Root, str], None]
) -> None:
    key = root.put_run("m", 1, "a")["keys"]["preprocess"]
    root.put("train", num=9)
    spoil(root, key)
    before = root.all()
    with pytest.raises(StorageError, match="is missing or not what its manifest says"):
        collect_garbage(root.storage, grace_s=ALL)
    assert root.all() == before


@pytest.mark.parametrize(
    "path",
    [
        "photos/a.jpg",
        "runs/Nov23_12-00-00/events.out.tfevents",
        "runs/20240101/lease-000001.json",
        "steps/train/one/x.pt",
        f"steps/deploy/{hash_json(1)}/manifest.json",
        "models/resnet/versions/1.json",
        "runs",
    ],
)
def test_a_directory_that_is_no_root_is_refused(any_root: Root, path: str) -> None:
    any_root.storage.create(path, b"x")
    with pytest.raises(ConfigError, match=r"There is no storage root at .* of ours"):
        collect_garbage(any_root.storage, grace_s=ALL)
    assert any_root.storage.read(path) == b"x"


@pytest.mark.parametrize(
    "path",
    [
        "runs/m-01234567/lease-000001.json",
        "runs/m-01234567/run.json",
        f"steps/shard/{hash_json(1)}/train.arrow",
        "models/m/retrain/lease-000001.json",
        "models/m/versions/000001.json",
        "garbage/lease-000001.json",  # all else was deleted
    ],
)
def test_a_root_is_one_from_its_first_file(root: Root, path: str) -> None:
    root.storage.create(path, b'{"name": "m"}')
    check_root(root.storage)


def test_names_of_directories_make_no_model_a_root(root: Root) -> None:
    for name in ("runs", "steps", "models", "garbage"):
        root.add_version(name, root.put_run("m", 1, "a"))
        for directory in (f"models/{name}", f"models/{name}/retrain"):
            root.storage.create(f"{directory}/lease-000001.json", b"{}")
    check_root(root.storage)


@pytest.mark.parametrize("name", ["runs", "steps", "models"])
def test_the_directory_above_a_root_is_refused_and_the_root_named(
    name: str, tmp_path: Path
) -> None:
    inner = Root(open_storage(str(tmp_path / name)))
    inner.add_version("m", inner.put_run("m", 1, "a"))
    Registry(inner.storage, "m").promote(1, "first")
    with hold_lease(open_storage(str(tmp_path)), SWEEP):
        pass  # as an earlier one has left it
    before = inner.all()
    with pytest.raises(ConfigError, match=rf"directory {name}\. Give {inner.storage.uri}\."):
        collect_garbage(open_storage(str(tmp_path)), keep_runs=0, grace_s=ALL)
    assert inner.all() == before


@pytest.mark.parametrize("name", ["runs", "models"])
def test_a_root_with_another_in_it_is_cleaned_and_the_other_stays(
    root: Root, name: str, tmp_path: Path
) -> None:
    root.put_run("m", 1, "a")
    inner = Root(open_storage(f"{root.storage.uri}/{name}"))
    inner.add_version("m", inner.put_run("m", 1, "a"))
    before = inner.all()
    collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert not root.has("runs/m-00000001")
    assert {path for path in before if path not in inner.all()} <= {
        path for path in before if path.startswith("m-00000001/")
    }


def test_what_other_programs_wrote_into_a_root_stays(any_root: Root) -> None:
    root, key = any_root, hash_json("other")
    root.put_run("m", 1, "a")
    foreign = {
        "runs/Nov23_12-00-00/events.out.tfevents",
        "runs/exp-20240101/weights.pt",  # eight hex digits
        "runs/notes.txt",
        "steps/train/mine/x.pt",
        "steps/train/notes.txt",
        f"steps/deploy/{key}/manifest.json",
        f"features/{key}/table.csv",
        "features/mine/x.safetensors",
        "models-elsewhere/mine/x.safetensors",
        "probes/mine.csv",
    }
    left_by_kills = {
        "runs/m-01234567/lease-000001.json",
        "runs/m-12345678/events.jsonl",
        f"features/{key}/{hash_content(b'gone')}.safetensors",
        f"probes/{key}",
    }
    for path in foreign | left_by_kills:
        root.storage.create(path, b"x")
    collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert root.all() == foreign


def test_what_a_file_manager_left_stops_nothing(any_root: Root) -> None:
    root = any_root
    root.add_version("m", root.put_run("m", 1, "a"))
    Registry(root.storage, "m").promote(1, "first")
    score = {"metric": "x", "value": 1.0, "protocol": {}}
    record = json.loads(root.storage.read("models/m/versions/000001.json"))
    record |= {"created": 1.0, "score": score}
    root.storage.replace("models/m/versions/000001.json", json.dumps(record).encode())
    left = (
        "runs", "models", "models/m", "models/m/versions", "models/m/promotions", "models/empty",
        "models/empty/versions", "models/m/evaluations", "models/m/scores", "steps/train",
        "steps/shard", "features",
    )  # fmt: skip
    names = (".DS_Store", "._000001.json", "Thumbs.db")
    foreign = {f"{directory}/{name}" for directory in left for name in names}
    for path in foreign:
        root.storage.create(path, b"\0\1")
    assert list_runs(root.storage) == ["m-00000001"]
    assert list_models(root.storage) == ["m"]
    with pytest.raises(ConfigError, match=r"no version 2\. The latest there: 1\."):
        Registry(root.storage, "m").version(2)
    assert "m-00000001" in make_home(root.storage)
    collect_garbage(root.storage, keep_runs=0, grace_s=ALL)
    assert foreign < root.all()


def test_the_latest_runs_of_each_name_stay(root: Root) -> None:
    for number, name in enumerate(("m", "n", "m"), 1):
        root.put_run(name, number, "a")
    survey = collect_garbage(root.storage, keep_runs=1, grace_s=ALL)
    assert survey.runs == ["m-00000003", "n-00000002"]


def test_a_run_is_as_late_as_its_last_execution(root: Root) -> None:
    document = root.put_run("m", 1, "a")["document"]
    document["executions"].append({"started": 9.0, "ended": None, "outcome": "", "steps": {}})
    root.storage.replace("runs/m-00000001/run.json", json.dumps(document).encode())
    root.put_run("m", 2, "b")
    assert collect_garbage(root.storage, keep_runs=1, grace_s=ALL).runs == ["m-00000001"]


def test_the_training_that_another_began_from_stays_with_it(root: Root) -> None:
    keys = root.put_run("m", 1, "a")["keys"]
    begun = {"start.training": keys["train"], "start.weights": "w"}
    data = root.put_data("b")[1]
    young = root.put("train", {"preprocess": data}, **begun)[1]
    age(root, "", 10)
    age(root, f"steps/train/{young}", 6)
    collect_garbage(root.storage, keep_runs=0)
    assert root.has(f"steps/train/{keys['train']}")
    assert root.has(SHARD["a"])
    assert not root.has(f"steps/evaluate/{keys['evaluate']}")


def test_what_was_just_written_into_an_old_directory_keeps_it(root: Root) -> None:
    root.put_run("m", 1, "a")
    key = root.put("train", num=9)[1]
    age(root, "", 10)
    root.storage.replace(f"steps/train/{key}/progress.json", b"{}")
    collect_garbage(root.storage, keep_runs=0)
    assert root.storage.exists(f"steps/train/{key}/manifest.json")
    assert not root.has(SHARD["a"])


def test_what_a_result_of_unknown_age_rests_on_stays(root: Root) -> None:
    data = root.put_data("a")[1]
    key = root.put("train", {"preprocess": data})[1]
    written = {f"steps/train/{key}": None, f"steps/preprocess/{data}": 0.0}
    reached = find_reached(root.storage, written, keep_runs=0, since=1.0)
    assert reached.holds(f"steps/preprocess/{data}")
    assert reached.holds(SHARD["a"])


@pytest.mark.parametrize("is_noticed_at_once", [True, False])
def test_one_that_was_held_up_for_most_of_its_lease_stops(
    root: Root, monkeypatch: pytest.MonkeyPatch, is_noticed_at_once: bool
) -> None:
    """Whether it looks when it wakes, or only after its watch has gone on for a while."""
    root.put_run("m", 1, "a")
    now, asked = [time.time()], [0]

    def clock() -> float:
        asked[0] += 1
        return now[0]

    def sleep(unit: Unit) -> None:
        now[0] += 0.6 * LIFE_S
        before = asked[0]
        while not is_noticed_at_once and asked[0] < before + 6:
            time.sleep(0.001)

    monkeypatch.setattr(garbage, "time", SimpleNamespace(time=clock))
    monkeypatch.setattr(garbage, "WATCH_EVERY_S", 3600.0 if is_noticed_at_once else 0.001)
    with pytest.raises(StorageError, match="was held up, and a run may have"):
        collect_garbage(root.storage, keep_runs=0, grace_s=ALL, on_delete=sleep)


def test_features_of_a_file_that_no_data_set_has_go_though_the_extractor_stays(
    root: Root,
) -> None:
    root.put_run("m", 1, "a")
    (kept,) = (path for path in root.all() if path.startswith("features/"))
    gone = kept.replace(hash_content(b"a"), hash_content(b"gone"))
    root.storage.create(gone, b"features")
    collect_garbage(root.storage, grace_s=ALL)
    assert (root.storage.exists(kept), root.storage.exists(gone)) == (True, False)


def test_a_pause_is_noticed_wherever_in_the_watch_it_comes(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = [time.time()], [0]

    def clock() -> float:
        if threading.current_thread() is not threading.main_thread():
            asked[0] += 1
            now[0] += 0.6 * LIFE_S if asked[0] == 2 else 0
        return now[0]

    monkeypatch.setattr(garbage, "time", SimpleNamespace(time=clock))
    monkeypatch.setattr(garbage, "WATCH_EVERY_S", 0.001)
    with garbage._alone(root.storage) as check:
        while asked[0] < 4:
            time.sleep(0.001)
        with pytest.raises(StorageError, match="was held up"):
            check()
