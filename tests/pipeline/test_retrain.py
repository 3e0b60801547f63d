"""What a cycle is decided by and begun with; the work is in `tests/test_retrain_story.py`."""

import contextlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import gate
from pipeline import retrain as module
from pipeline.config import load_config
from pipeline.cycles import hold_cycle, last_cycle
from pipeline.driver import Basis, Outcome, make_plan
from pipeline.errors import BusyError, ConfigError, StorageError, TrainingError
from pipeline.extractors.naming import ARTIFACT
from pipeline.gate import Verdict
from pipeline.holding import add_finding, describe_drift
from pipeline.lots import Lot
from pipeline.pinning import describe
from pipeline.protocol import make_protocol, sampling_protocol
from pipeline.registry import Registry
from pipeline.retrain import Cycle, cycle_key, retrain
from pipeline.scores.drift import Drift
from pipeline.settings import Config
from pipeline.sources import FILES_PER_BUCKET, InputShard, list_inputs
from pipeline.steps import Start, make_steps
from pipeline.storage import LocalStorage, hash_content

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits"
FAR = Drift(distance=90.0, largest=10.0, limit=15.0, count=300)


class Model:
    """A model whose first version was trained on the first of the digits' shards."""

    def __init__(self, config_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.root, self.monkeypatch = config_path, root, monkeypatch
        self.storage = LocalStorage(str(root))
        self.registry = Registry(self.storage, "tiny")
        self.notes: list[str] = []
        self.ran: list[tuple[Config, Basis]] = []
        self.used: list[dict[str, str]] = []  # the shards that each run was planned over
        self.verdict: Verdict | Exception = Verdict(True, "better")
        monkeypatch.setattr(module, "run_config", self._run)
        monkeypatch.setattr(module, "connect", lambda config: contextlib.nullcontext())
        monkeypatch.setattr(gate, "ask", lambda registry, number, settings: self._verdict())

    def config(self, *settings: str, shards: Sequence[int] = (0,)) -> Config:
        sources = json.dumps([str(DIGITS / f"digits-000{k}.tar") for k in shards])
        root = f"storage.root={self.root}"
        return load_config(self.path, [f"data.sources={sources}", root, *settings])

    def shards(self, config: Config) -> list[InputShard]:
        return list_inputs(config.data, self.storage).shards

    def make_version(self, number: int = 1, *settings: str, **protocol: Any) -> None:
        """A champion; the fields of the protocol are those in which its score is another one."""
        config = self.config(*settings)
        keys = {name: f"{name}-{number}" for name in ("preprocess", "train", "evaluate")}
        keys |= {"features": "f", "reference": "r"}
        steps: dict[str, dict[str, Any]] = {name: {} for name in keys}
        preprocess = make_steps(config, self.shards(config))[0]
        steps["preprocess"] = {"identity": {"settings": dict(preprocess.settings)}}
        steps["train"] = {"identity": {"inputs": {"preprocess": keys["preprocess"]}}}
        steps["features"] = {
            "identity": {"settings": {"features.width": 4}},
            "metrics": {"extractor": "classifier", "num_features": 4},
            "artifacts": {ARTIFACT: {"sha256": "x"}},
        }
        steps["reference"] = {
            "identity": {"inputs": {"preprocess": keys["preprocess"]}},
            "metrics": {"counts": {"train": 900, "test": 100}},
        }
        for name, manifest in steps.items():
            manifest |= {"step": name, "key": keys[name]}
            text = json.dumps(manifest)
            path = f"steps/{name}/{keys[name]}/manifest.json"
            self.storage.create(path, text.encode())
        self.protocol = make_protocol(
            config,
            steps["features"],
            steps["reference"],
            split="test",
            num_samples=128,
            sampling=sampling_protocol(config, is_told=config.model.class_conditional),
        )
        score = {"metric": "fid[classifier]", "value": 9.0, "protocol": self.protocol | protocol}
        version = {
            "key": str(number),
            "lineage": keys,
            "weights": f"w{number}",
            "config": config.model_dump(mode="json"),
            "score": score,
        }
        self.registry.add_version(version)
        self.registry.promote(number, "by hand")

    def retrain(self, config: Config, **options: Any) -> Cycle:
        def observe(event: Any) -> None:
            self.notes.append(event.fields["text"])

        return retrain(config, observer=observe, **options)

    def hold(self, *names: str, then: Callable[[], object] = lambda: None) -> None:
        """Has the drift test hold these shards, or loose images as one."""

        def hold_some(
            registry: Registry, config: Config, shards: Sequence[InputShard], *_: Any
        ) -> tuple[list[dict[str, Any]], list[str]]:
            lots = [Lot(s.name, s.sha256 or "", (s.name,)) for s in shards if s.name in names]
            loose = [f for s in shards if s.format == "files" for f in s.files if f.name in names]
            if loose:
                files = {file.name: file.sha256 or "" for file in loose}
                lots.append(Lot("loose-9", "9" * 64, (), files))
            reason = describe_drift(FAR)
            held = [
                add_finding(registry, lot, "held", reason, evaluation=1, cycle=1) for lot in lots
            ]
            then()
            return held, []

        self.monkeypatch.setattr(module, "screen", hold_some)

    def meanwhile(self, happens: Callable[[], object], hold: Sequence[str] = ()) -> None:
        """Has the input change when the drift test is done with it."""
        self.hold(*hold, then=happens)

    def _verdict(self) -> Verdict:
        assert isinstance(self.verdict, Verdict)
        return self.verdict

    def _run(self, config: Config, *, basis: Basis, **_: Any) -> Outcome:
        plan = make_plan(config, basis=basis)
        self.ran.append((config, basis))
        self.used.append(dict(plan.steps[0].step.settings["shards"]))
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return Outcome(plan, {"promote": {"metrics": {"version": 2}}}, None)


@pytest.fixture
def model(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model(tiny_config, tmp_path / "runs", monkeypatch)
    made.make_version()
    made.hold()
    return made


def test_without_new_shards_nothing_is_begun(model: Model) -> None:
    cycle = model.retrain(model.config())
    assert (cycle.state, cycle.number, cycle.is_refused) == ("nothing_new", None, False)
    assert "Nothing new: no input shard that the champion was not trained on." in cycle.sentence
    assert model.ran == []
    assert last_cycle(model.registry) is None


def test_a_shard_with_another_name_and_the_same_content_is_not_new(
    model: Model, tmp_path: Path
) -> None:
    copied = tmp_path / "renamed.tar"
    copied.write_bytes((DIGITS / "digits-0000.tar").read_bytes())
    assert model.retrain(model.config(f'data.sources=["{copied}"]')).state == "nothing_new"


def test_a_cycle_is_planned_from_what_the_registry_pins(model: Model) -> None:
    config = model.config("retrain.num_steps=40", shards=(0, 1))
    cycle = model.retrain(config)
    assert (cycle.state, cycle.number, cycle.version) == ("promoted", 1, 2)
    assert cycle.new == ("digits-0001.tar",)
    assert cycle.sentence == "Version 2 of tiny is the champion: better."
    ((ran, basis),) = model.ran
    assert ran.train.num_steps == 40
    assert basis.start == Start("train-1", "w1")
    assert {name: manifest["key"] for name, manifest in basis.pinned.items()} == {
        "features": "f",
        "reference": "r",
    }
    (evaluation,) = model.registry.evaluations()
    assert (evaluation["features"], evaluation["reference"]) == ("f", "r")
    assert evaluation["facts"]["reference_count"] == 100


def test_the_same_again_finds_that_it_was_done(model: Model) -> None:
    config = model.config(shards=(0, 1))
    model.verdict = Verdict(False, "not lower")
    kept = model.retrain(config)
    assert (kept.state, kept.is_refused) == ("kept", True)
    assert kept.sentence == "Version 2 of tiny is kept, and the champion stays: not lower."
    again = model.retrain(config)
    assert (again.state, again.is_refused) == ("nothing_new", False)
    assert again.sentence == (
        "Nothing new since cycle 1, when version 2 of tiny was kept; the champion is version 1."
    )
    assert len(model.ran) == 1
    # Where it runs changes nothing; what it learns, or how it is judged, does.
    assert model.retrain(model.config("train.cpus_per_worker=2", shards=(0, 1))).number is None
    for number, setting in enumerate(
        ("promote.rule=not_worse", "retrain.start=scratch", "train.learning_rate=2e-3"), start=2
    ):
        assert model.retrain(model.config(setting, shards=(0, 1))).number == number
    assert model.retrain(model.config(shards=(0, 1, 2))).number == 5


def test_a_version_that_waits_for_a_person_is_no_refusal(model: Model) -> None:
    model.verdict = Verdict(False, "look", asks=True)
    cycle = model.retrain(model.config(shards=(0, 1)))
    assert (cycle.state, cycle.is_refused) == ("asks", False)


def test_a_cycle_that_was_killed_goes_on_from_where_it_began(model: Model) -> None:
    config = model.config(shards=(0, 1))
    model.verdict = TrainingError("No. Try again.")
    with pytest.raises(TrainingError):
        model.retrain(config)
    # Killed after the promotion: the champion is now the very model that the cycle makes.
    first = model.registry.version(1)
    lineage = {**first["lineage"], "train": "train-2"}
    model.registry.add_version({**first, "key": "2", "weights": "w2", "lineage": lineage})
    model.registry.promote(2, "better")
    model.verdict = Verdict(True, "better")
    cycle = model.retrain(config)
    assert (cycle.number, cycle.state) == (1, "promoted")
    bases = [basis for _, basis in model.ran]
    assert bases[0] == bases[1]
    assert len(model.registry.records("cycles")) == 1


@pytest.fixture
def inbox(tmp_path: Path, make_png: Callable[..., bytes]) -> Path:
    """A directory with what the champion knows, and a new shard and a new loose image beside it."""
    made = tmp_path / "in"
    made.mkdir()
    for k in (0, 1):
        shutil.copy(DIGITS / f"digits-000{k}.tar", made)
    (made / "a.png").write_bytes(make_png(1))
    return made


def test_what_arrives_while_a_cycle_runs_is_left_to_the_next_one(
    model: Model, inbox: Path, make_png: Callable[..., bytes]
) -> None:
    config = model.config(f'data.sources=["{inbox}"]')
    before = {shard.name: shard.sha256 for shard in model.shards(config)}

    def arrive() -> None:
        shutil.copy(DIGITS / "digits-0002.tar", inbox / "poison.tar")
        (inbox / "b.png").write_bytes(make_png(2))

    model.meanwhile(arrive)
    assert model.retrain(config).state == "promoted"
    assert model.used == [before]
    model.meanwhile(lambda: None)
    after = model.retrain(config)
    assert (after.number, "poison.tar" in after.new) == (2, True)
    assert model.used[1].keys() == before.keys() | {"poison.tar"}
    assert model.used[1]["files-0000-of-0001"] != before["files-0000-of-0001"]


def test_what_changes_or_goes_while_a_cycle_runs_is_used_as_it_was_tested(
    model: Model, inbox: Path
) -> None:
    shutil.copy(DIGITS / "digits-0002.tar", inbox)
    config = model.config(f'data.sources=["{inbox}"]')
    before = {shard.name: shard.sha256 for shard in model.shards(config)}

    def change() -> None:
        shutil.copy(DIGITS / "digits-0003.tar", inbox / "digits-0001.tar")
        (inbox / "digits-0002.tar").unlink()

    model.meanwhile(change)
    assert model.retrain(config).state == "promoted"
    assert model.used == [before]


def test_a_shard_that_is_held_and_then_rewritten_is_not_used_under_its_name(
    model: Model, inbox: Path
) -> None:
    config = model.config(f'data.sources=["{inbox}"]')
    model.meanwhile(
        lambda: shutil.copy(DIGITS / "digits-0003.tar", inbox / "digits-0001.tar"),
        hold=["digits-0001.tar"],
    )
    assert model.retrain(config).state == "promoted"
    (used,) = model.used
    assert used.keys() == {"digits-0000.tar", "files-0000-of-0001"}


def test_a_cycle_that_was_killed_goes_on_with_its_own_shards_whatever_arrived(
    model: Model, inbox: Path, make_png: Callable[..., bytes]
) -> None:
    config = model.config(f'data.sources=["{inbox}"]')
    model.verdict = TrainingError("No. Try again.")
    with pytest.raises(TrainingError):
        model.retrain(config)
    shutil.copy(DIGITS / "digits-0002.tar", inbox)
    shutil.copy(inbox / "a.png", inbox / "twin.png")  # nor another file of the same content
    for k in range(FILES_PER_BUCKET):  # the buckets double
        (inbox / f"{k:05d}.png").write_bytes(make_png(2 + k % 2))
    model.verdict = Verdict(True, "better")
    cycle = model.retrain(config)
    assert (cycle.number, cycle.state) == (1, "promoted")
    assert model.used[0] == model.used[1]
    after = model.retrain(config)
    assert (after.number, "digits-0002.tar" in after.new) == (2, True)
    assert {"digits-0002.tar", "files-0001-of-0002"} <= model.used[2].keys()


def test_a_killed_cycle_that_nothing_is_left_of_is_said_to_be_superseded(model: Model) -> None:
    config = model.config(shards=(0, 1))
    model.verdict = TrainingError("No. Try again.")
    with pytest.raises(TrainingError):
        model.retrain(config)
    # Its shard goes, and the champion knows all that is left.
    assert model.retrain(model.config()).state == "nothing_new"
    last = last_cycle(model.registry)
    assert last is not None
    assert (last["number"], last["outcome"]["state"]) == (1, "superseded")
    assert "the input or the settings are others now" in last["outcome"]["sentence"]
    again = model.retrain(model.config())
    assert again.sentence.startswith("Nothing new: no input shard")
    # It comes back: it was never trained on.
    model.verdict = Verdict(True, "better")
    assert model.retrain(config).number == 2


@pytest.mark.parametrize("shards", [(0, 2), (0, 2, 3)])
def test_a_killed_cycle_whose_shard_is_gone_is_followed_by_another(
    model: Model, shards: Sequence[int]
) -> None:
    model.verdict = TrainingError("No. Try again.")
    for present in ((0, 1), shards):
        with pytest.raises(TrainingError):
            model.retrain(model.config(shards=present))
    assert [list(c["new"]) for c in model.registry.records("cycles")] == [
        ["digits-0001.tar"],
        [f"digits-000{k}.tar" for k in shards[1:]],
    ]
    (outcome,) = model.registry.records("outcomes")
    assert (outcome["number"], outcome["state"]) == (1, "superseded")


def test_held_shards_are_left_out_and_the_others_go_on(model: Model) -> None:
    model.hold("digits-0002.tar")
    config = model.config(shards=(0, 1, 2))
    cycle = model.retrain(config)
    assert cycle.state == "promoted"
    assert [record["shard"] for record in cycle.held] == ["digits-0002.tar"]
    (used,) = model.used
    assert list(used) == ["digits-0000.tar", "digits-0001.tar"]
    again = model.retrain(config)
    assert (again.state, [r["shard"] for r in again.held]) == ("nothing_new", ["digits-0002.tar"])


def test_where_all_that_is_new_is_held_nothing_is_trained(model: Model) -> None:
    model.hold("digits-0001.tar")
    config = model.config(shards=(0, 1))
    cycle = model.retrain(config)
    assert (cycle.state, cycle.is_refused, model.ran) == ("held", True, [])
    assert "digits-0001.tar: 300 of its items are 90.00 from the reference" in cycle.sentence
    assert not model.retrain(config).is_refused  # said once
    model.hold()
    taken = model.retrain(config, accept_held=["digits-0001.tar"], reason="new pens")
    assert (taken.state, taken.number) == ("promoted", 2)
    (record,) = model.registry.records("released")
    assert record["reason"] == "new pens"


def test_held_loose_images_are_left_out_without_those_beside_them(
    model: Model, tmp_path: Path, make_png: Callable[..., bytes]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.png").write_bytes(make_png(ord(name)))
    sources = json.dumps([str(DIGITS / "digits-0000.tar"), str(tmp_path / "in")])
    config = model.config(f"data.sources={sources}")
    sha256 = hash_content((tmp_path / "in" / "a.png").read_bytes())
    without_a = config.data.model_copy(update={"leave_out": (sha256,)})
    model.hold("a.png")
    assert model.retrain(config).state == "promoted"
    left = model.shards(config.model_copy(update={"data": without_a}))
    assert model.used == [{shard.name: shard.sha256 for shard in left}]
    assert [[file.name for file in shard.files] for shard in left] == [
        ["digits-0000.tar"], ["b.png"]
    ]  # fmt: skip
    model.hold("a.png", "b.png")
    other = model.config(f"data.sources={sources}", "promote.rule=not_worse")
    assert model.retrain(other).state == "held"
    assert len(model.ran) == 1
    model.hold()
    assert model.retrain(other, accept_held=["loose-9"]).number == 3


def test_who_wants_to_know_of_failures_is_told_that_all_is_held(
    model: Model, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    tell = f'notify.on_failure=["sh", "-c", "cat >> {told}; echo >> {told}"]'
    model.hold("digits-0001.tar")
    config = model.config(tell, shards=(0, 1))
    cycle = model.retrain(config)
    model.retrain(config)  # nothing new: told once
    (line,) = told.read_text().splitlines()
    document = json.loads(line)
    assert (document["event"], document["error"]["exit_code"]) == ("failure", 9)
    assert document["error"]["message"] == cycle.sentence
    assert [record["shard"] for record in document["held"]] == ["digits-0001.tar"]


def test_a_cycle_that_fails_before_its_run_is_told_and_another_at_work_is_not(
    model: Model, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    tell = f'notify.on_failure=["sh", "-c", "cat >> {told}; echo >> {told}"]'
    with pytest.raises(ConfigError):
        model.retrain(model.config(tell, "model.dim=16", shards=(0, 1)))
    with hold_cycle(model.registry), pytest.raises(BusyError):
        model.retrain(model.config(tell, shards=(0, 1)))
    (line,) = told.read_text().splitlines()
    assert json.loads(line)["error"]["kind"] == "ConfigError"
    model.storage.delete("steps/reference/r")
    with pytest.raises(StorageError):
        model.retrain(model.config(tell, shards=(0, 1)))
    assert json.loads(told.read_text().splitlines()[1])["error"]["kind"] == "StorageError"


def test_a_model_without_versions_is_trained_as_run_does(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tiny_config, tmp_path / "runs", monkeypatch)
    cycle = model.retrain(model.config("retrain.num_steps=40"))
    assert (cycle.number, cycle.state) == (1, "promoted")
    ((ran, basis),) = model.ran
    assert (ran.train.num_steps, basis.pinned, basis.start) == (300, {}, None)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.dim=16", "the config has another model.dim."),
        ("diffusion.objective=pred_noise", "another diffusion.objective."),
        ("evaluate.num_steps=5", "they differ in num_steps"),
        ("data.fit=pad", "they differ in data.fit. Set these back, or run"),
        ('data.background="#000000"', "they differ in data.background"),
        ('data.include_labels=["1"]', "they differ in data.include_labels"),
        ("data.drop_duplicates=true", "they differ in data.drop_duplicates"),
        ("data.test_fraction=0.06", "has images trained on that evaluation 1, which tiny pins"),
        ("tune.enabled=true", "retrain does not search"),
    ],
)
def test_what_could_not_be_judged_or_begun_is_refused_at_once(
    model: Model, setting: str, says: str
) -> None:
    settings = [setting, "tune.num_samples=64", "tune.train_steps=30", "train.num_workers=1"]
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        model.retrain(model.config(*settings, shards=(0, 1)))
    assert model.registry.records("cycles") == []


def test_from_scratch_the_network_may_be_another(model: Model) -> None:
    config = model.config("model.dim=16", "retrain.start=scratch", shards=(0, 1))
    assert model.retrain(config).state == "promoted"
    ((_, basis),) = model.ran
    assert basis.start is None


def test_an_extractor_that_is_not_used_is_said(model: Model) -> None:
    model.retrain(model.config("features.width=5", shards=(0, 1)))
    assert any("features.width is not that of evaluation 1" in note for note in model.notes)


def test_a_pinned_step_that_is_gone_is_named(model: Model) -> None:
    model.storage.delete("steps/reference/r")
    with pytest.raises(StorageError, match="steps/reference/r is gone, which the registry names"):
        model.retrain(model.config(shards=(0, 1)))


def test_a_plan_takes_what_is_pinned(model: Model) -> None:
    config = model.config(shards=(0, 1))
    plain = {p.step.name: p for p in make_plan(config).steps}
    pinned = {
        name: json.loads(model.storage.read(f"steps/{name}/{key}/manifest.json"))
        for name, key in (("features", "f"), ("reference", "r"))
    }
    planned = {p.step.name: p for p in make_plan(config, basis=Basis(pinned)).steps}
    assert [planned[n].action for n in ("features", "reference")] == ["cached", "cached"]
    assert planned["train"].key == plain["train"].key
    assert planned["evaluate"].identity["inputs"] == {
        "preprocess": plain["preprocess"].key,
        "features": "f",
        "reference": "r",
        "train": plain["train"].key,
    }


def test_a_warm_start_is_another_training_and_its_extension_the_same(model: Model) -> None:
    def planned(start: Start | None, *settings: str) -> Any:
        steps = make_plan(model.config(*settings), basis=Basis({}, start)).steps
        return next(p for p in steps if p.step.name == "train")

    plain, one, other = (planned(s) for s in (None, Start("t", "w1"), Start("t", "w2")))
    assert len({plain.key, one.key, other.key}) == 3
    assert len({plain.series, one.series, other.series}) == 3
    assert planned(Start("t", "w1"), "train.num_steps=400").series == one.series
    assert "start.weights" not in plain.step.settings
    assert one.step.settings["start.weights"] == "w1"


def test_another_evaluation_has_a_version_judged_again_and_the_first_does_not(
    model: Model,
) -> None:
    def key() -> str:
        return next(p.key for p in make_plan(model.config()).steps if p.step.name == "promote")

    def pin(reference: str) -> None:
        keys = {"features": "f", "reference": reference, "preprocess": "p"}
        evaluations = model.registry.evaluations()
        model.registry.add_record("evaluations", evaluations, describe(keys, {}, "because"))

    before = key()
    pin("r")
    assert key() == before
    pin("r2")
    assert key() != before


def test_the_command_line_tells_refusals_by_the_exit_code(
    model: Model, tmp_path: Path, call_cli: Callable[..., Any]
) -> None:
    settings = ["--set", f"storage.root={model.root}"]
    sources = json.dumps([str(DIGITS / "digits-0000.tar")])
    settings += ["--set", f"data.sources={sources}"]
    done = call_cli("retrain", str(model.path), *settings, cwd=tmp_path)
    assert (done.returncode, "Nothing new" in done.stdout) == (0, True)
    found = json.loads(
        call_cli("retrain", str(model.path), *settings, "--json", cwd=tmp_path).stdout
    )
    assert (found["state"], found["exit_code"], found["new"]) == ("nothing_new", 0, [])
    unknown = call_cli(
        "retrain", str(model.path), *settings, "--accept-held", "x.tar", cwd=tmp_path
    )
    assert unknown.returncode == 2
    assert "No held shard is called 'x.tar'" in unknown.stderr
    absent = call_cli("accept-reference", "other", "--root", str(model.root), cwd=tmp_path)
    assert absent.returncode == 2
    assert "There is no model 'other' below" in absent.stderr


def test_a_cycle_is_another_by_what_was_taken_in_of_its_input_alone(
    tiny_config: Path, tmp_path: Path
) -> None:
    config = load_config(tiny_config)
    shards = list_inputs(config.data, LocalStorage(str(tmp_path / "root"))).shards
    sha256 = shards[0].sha256
    assert sha256 is not None
    plain = cycle_key(config, shards, set(), 1)
    assert cycle_key(config, shards, {"of a shard that is gone"}, 1) == plain
    assert cycle_key(config, shards, {sha256}, 1) != plain
