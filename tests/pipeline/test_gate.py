"""The gate's rules, the evaluation it judges by, and the step `promote` that asks it."""

import json
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.gate import judge, promote
from pipeline.pinning import add_score, find_score
from pipeline.registry import Registry
from pipeline.settings import Config, PromoteConfig
from pipeline.storage import LocalStorage, open_storage
from pipeline.workflow import PlannedStep, Step, StepContext

BETTER = PromoteConfig()
PROTOCOL = {
    "seed": 0, "feature_width": 4, "num_samples": 30, "reference_count": 20,
    "interval_reference": "fixed",
}  # fmt: skip
FINE = {"is_memorising": False, "share": 0.005, "held_out_share": 0.005}


def score(value: float, reach: float | None = None, **fields: Any) -> dict[str, Any]:
    """A record; `reach` is that of its interval."""
    unbiased = None if reach is None else {"low": value - reach, "high": value + reach}
    protocol = fields.pop("protocol", {})
    return {
        "metric": "fid[x]",
        "value": value,
        "unbiased": unbiased,
        "copies": FINE,
        "protocol": PROTOCOL | protocol,
        **fields,
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "is_promoted", "says"),
    [
        ((9, 0.4), (10, 0.4), True, "fid[x] is 9.00 against 10.00 of the champion, and without"),
        ((9, 0.6), (10, 0.6), False, "without bias [8.40, 9.60] and [9.40, 10.60] overlap"),
        ((11, 0.1), (10, 0.1), False, "not lower"),
        ((9.999, None), (10, None), False, "an interval takes 40 and evaluate.num_samples is 30"),
        ((10, None), (10, None), False, "not lower"),
        ((9, None), (10, 0.1), False, "lower, which may be chance"),
    ],
)
def test_better_is_beyond_the_intervals(
    ours: tuple[float, float | None],
    theirs: tuple[float, float | None],
    is_promoted: bool,
    says: str,
) -> None:
    verdict = judge(score(*ours), score(*theirs), BETTER)
    assert verdict.is_promoted == is_promoted
    assert says in verdict.reason


def test_what_would_give_an_interval_is_said() -> None:
    verdict = judge(score(9.0), score(10.0), BETTER)
    assert "Raise evaluate.num_samples and run `raydiffusion accept-reference" in verdict.reason
    few_images = {"interval_reference": "sample", "num_samples": 50}
    verdict = judge(score(9.0, protocol=few_images), score(10.0, protocol=few_images), BETTER)
    assert "takes 40 and the number of test images is 20. Raise the number" in verdict.reason
    assert judge(score(9.0), score(10.0), PromoteConfig(rule="not_worse")).is_promoted


@pytest.mark.parametrize(("value", "is_promoted"), [(9.0, True), (10.5, True), (10.6, False)])
def test_not_worse_leaves_a_share(value: float, is_promoted: bool) -> None:
    settings = PromoteConfig(rule="not_worse", tolerance=0.05)
    verdict = judge(score(value, 1.0), score(10.0, 1.0), settings)
    assert verdict.is_promoted == is_promoted
    assert f"{'at most' if is_promoted else 'above'} 10.50, which is 5.0% worse" in verdict.reason


def test_asking_never_promotes_and_says_the_command() -> None:
    settings = PromoteConfig(rule="ask")
    for champion in (None, score(10.0)):
        verdict = judge(score(1.0), champion, settings, command="`promote m 2`")
        assert (verdict.is_promoted, verdict.asks) == (False, True)
        assert "`promote m 2`" in verdict.reason


COPIES = {"is_memorising": True, "share": 0.051, "held_out_share": 0.005}
BROKEN = {"count": 512, "constant": 16, "black": 0}


def test_what_memorises_is_refused_whatever_it_scores() -> None:
    for champion in (None, score(10.0)):
        verdict = judge(score(1.0, copies=COPIES), champion, BETTER)
        assert not verdict.is_promoted
        assert "it memorises: 5.1% of its samples are near-copies" in verdict.reason
    allowed = PromoteConfig(allow_memorising=True)
    assert judge(score(1.0, 0.1, copies=COPIES), score(10.0, 0.1), allowed).is_promoted
    fine = {**COPIES, "is_memorising": False}
    assert judge(score(1.0, 0.1, copies=fine), score(10.0, 0.1), BETTER).is_promoted


def test_what_could_not_be_looked_for_is_said_and_keeps_what_would_replace_a_champion() -> None:
    ours, theirs = score(1.0, 0.1, copies=None), score(10.0, 0.1)
    says = "whether it memorises could not be checked, which takes 200 held-out images"
    first = judge(ours, None, BETTER)
    assert first.is_promoted
    assert says in first.reason
    kept = judge(ours, theirs, BETTER)
    assert not kept.is_promoted
    assert says in kept.reason
    assert 'or set promote.unchecked_copies = "allow"' in kept.reason
    allowed = judge(ours, theirs, PromoteConfig(unchecked_copies="allow"))
    assert allowed.is_promoted
    assert says in allowed.reason
    asked = judge(ours, theirs, PromoteConfig(rule="ask"))
    assert (asked.asks, says in asked.reason) == (True, True)
    assert says not in judge(ours, theirs, PromoteConfig(allow_memorising=True)).reason
    worse = judge(score(11.0, 0.1, copies=None), theirs, BETTER)
    assert "promote.unchecked_copies" not in worse.reason


def test_broken_samples_are_refused_above_a_share() -> None:
    verdict = judge(score(1.0, degenerate=BROKEN), None, BETTER)
    assert not verdict.is_promoted
    assert "16 of its 512 samples are of one value throughout, more than" in verdict.reason
    assert "promote.max_degenerate_fraction = 1.0%" in verdict.reason
    lenient = PromoteConfig(max_degenerate_fraction=16 / 512)
    assert judge(score(1.0, degenerate=BROKEN), None, lenient).is_promoted
    asks = PromoteConfig(rule="ask")
    assert not judge(score(1.0, degenerate=BROKEN), None, asks).asks


def manifests(num_steps: int, value: float, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Of the steps before `promote`: a training of so many steps, and its score."""

    def manifest(name: str, **fields: Any) -> dict[str, Any]:
        identity = {"step": name, "version": 3, "settings": {}, "inputs": {}}
        key = f"{name}-{num_steps}-{seed}"
        return {"key": key, "identity": identity, "metrics": {}, "artifacts": {}, **fields}

    train = manifest(
        "train",
        metrics={"num_steps": num_steps, "images_seen": 32 * num_steps},
        artifacts={"ema.safetensors": {"sha256": f"weights-{num_steps}"}},
    )
    train["identity"]["settings"] = {"train.num_steps": num_steps, "train.seed": seed}
    return {
        **{name: manifest(name) for name in ("preprocess", "features", "reference")},
        "train": train,
        "evaluate": manifest("evaluate", metrics=score(value, 0.1)),
    }


def step_promote(config: Config, root: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    step = Step("promote", 2, "pipeline.gate:promote", {})
    planned = PlannedStep(step, "k", {}, "k", "run", "it never ran")
    return promote(
        StepContext(config, open_storage(root), planned, inputs, observer=lambda event: None)
    )


def test_a_version_knows_what_it_came_from(tiny_config: Path, tmp_path: Path) -> None:
    config, root = load_config(tiny_config), str(tmp_path / "runs")
    for made in (manifests(100, 9.0), manifests(50, 8.0, seed=1), manifests(200, 7.0)):
        step_promote(config, root, made)
    first, other, third = Registry(open_storage(root), "tiny").versions()
    assert (first["parent"], other["parent"], third["parent"]) == (None, None, 1)
    assert third["lineage"]["preprocess"] == "preprocess-200-0"
    assert third["weights"] == "weights-200"
    assert third["checkpoint"]["global_step"] == 200
    assert third["checkpoint"]["series"] == first["checkpoint"]["series"]
    assert third["checkpoint"]["series"] != other["checkpoint"]["series"]
    assert third["config"] == config.model_dump(mode="json")
    assert third["score"]["protocol"] == PROTOCOL
    assert third["code"]["sha256"]
    assert third["code"]["steps"]["train"] == 3
    again = step_promote(config, root, manifests(200, 7.0))
    assert again["version"] == 3  # the same training, scored in the same way


def test_a_promotion_is_untold_until_someone_tells_it(tiny_config: Path, tmp_path: Path) -> None:
    config, root = load_config(tiny_config), str(tmp_path / "runs")
    note = tmp_path / "runs" / "steps" / "promote" / "k" / "untold"
    assert step_promote(config, root, manifests(100, 9.0))["promoted"]
    assert note.exists()
    note.unlink()
    assert not step_promote(config, root, manifests(200, 99.0))["promoted"]
    assert not note.exists()


def promote_until_killed(config: Config, root: str, kill_after: int) -> None:
    """In a process of its own: the step, with SIGKILL right after the n-th file is in place."""
    link, count = os.link, [0]

    def counting_link(source: Any, target: Any) -> None:
        link(source, target)
        count[0] += 1
        if count[0] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    os.link = counting_link
    step_promote(config, root, manifests(100, 9.0))


@pytest.mark.parametrize("kill_after", [1, 2, 3, 4])  # the version, lease, pin, promotion
def test_a_kill_between_the_writes_leaves_nothing_half_written(
    kill_after: int, tiny_config: Path, tmp_path: Path
) -> None:
    config, root = load_config(tiny_config), str(tmp_path / "runs")
    process = multiprocessing.get_context("spawn").Process(
        target=promote_until_killed, args=(config, root, kill_after)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    registry = Registry(open_storage(root), "tiny")
    assert [v["number"] for v in registry.versions()] == [1]
    assert len(registry.promotions()) == (kill_after == 4)
    assert step_promote(config, root, manifests(100, 9.0))["promoted"]
    assert [v["number"] for v in registry.versions()] == [1]
    assert [p["version"] for p in registry.promotions()] == [1]
    assert [e["reference"] for e in registry.evaluations()] == ["reference-100-0"]
    files = sorted((tmp_path / "runs" / "models" / "tiny").rglob("*.json"))
    assert all(json.loads(path.read_text()) for path in files)


def made(value: float, key: str, reference: str = "r", **protocol: Any) -> dict[str, Any]:
    """The manifests of a training of its own, scored under a reference."""
    inputs = manifests(100, value, seed=ord(key))
    inputs["train"]["key"], inputs["evaluate"]["key"] = f"train-{key}", f"evaluate-{key}"
    inputs["reference"]["key"], inputs["features"]["key"] = reference, "f"
    protocol["reference"] = reference
    inputs["evaluate"]["metrics"] = score(value, 0.1, protocol=protocol)
    return inputs


@pytest.fixture
def ask(tiny_config: Path, tmp_path: Path) -> Any:
    """Runs the step on manifests; and the registry it writes."""
    config, root = load_config(tiny_config), str(tmp_path / "runs")
    registry = Registry(LocalStorage(root), "tiny")
    return lambda inputs: step_promote(config, root, inputs), registry


def test_the_first_version_pins_its_evaluation_and_no_other_does(ask: Any) -> None:
    run, registry = ask
    assert run(made(10.0, "a"))["promoted"]
    assert run(made(9.0, "b"))["promoted"]
    kept = run(made(1.0, "c", reference="other"))
    assert not kept["promoted"]
    assert "under another reference or extractor than evaluation 1" in kept["reason"]
    assert "raydiffusion retrain CONFIG" in kept["reason"]
    (evaluation,) = registry.evaluations()
    assert (evaluation["reference"], evaluation["features"]) == ("r", "f")
    assert evaluation["data"] == "preprocess-100-" + str(ord("a"))
    assert evaluation["by"]
    assert [p["version"] for p in registry.promotions()] == [1, 2]


def test_without_a_champion_another_reference_is_not_judged_either(ask: Any) -> None:
    run, registry = ask
    broken = made(10.0, "a")
    broken["evaluate"]["metrics"]["degenerate"] = BROKEN
    assert not run(broken)["promoted"]
    kept = run(made(1.0, "b", reference="other"))
    assert not kept["promoted"]
    assert "under another reference or extractor than evaluation 1" in kept["reason"]
    root = registry.storage.uri
    assert (
        f"`raydiffusion promote tiny 2 --reason WHY --root {root}` asks no gate" in kept["reason"]
    )
    assert registry.promotions() == []
    assert run(made(9.0, "c"))["promoted"]


def test_a_champion_told_its_own_mix_of_labels_is_not_compared_with(ask: Any) -> None:
    _, registry = ask
    told = {"config": {"model": {"class_conditional": True}}, "number": 1}
    before, since = PROTOCOL | {}, PROTOCOL | {"label_mix": "m"}
    assert find_score(registry, told | {"score": {"protocol": before}}, since) is None
    assert find_score(registry, told | {"score": {"protocol": since}}, since) is not None
    assert find_score(registry, told | {"score": {"protocol": since}}, before) is not None
    untold = {"config": {"model": {"class_conditional": False}}, "number": 1}
    assert find_score(registry, untold | {"score": {"protocol": before}}, since) is not None


def test_other_settings_of_the_score_are_named(ask: Any) -> None:
    run, _ = ask
    run(made(10.0, "a"))
    kept = run(made(1.0, "b", eta=1.0))
    assert not kept["promoted"]
    assert "the protocols differ in eta" in kept["reason"]
    assert "accept-reference" in kept["reason"]


def test_a_score_that_the_champion_got_later_is_compared_with(ask: Any) -> None:
    run, registry = ask
    run(made(10.0, "a"))
    later = {"key": "e2", "metrics": score(5.0, 0.1, protocol={"reference": "r", "eta": 1.0})}
    add_score(registry, 1, later, "other sampling")
    add_score(registry, 1, later, "again")
    assert not run(made(6.0, "b", eta=1.0))["promoted"]
    assert run(made(4.0, "c", eta=1.0))["promoted"]
    assert [r["reason"] for r in registry.records("scores")] == ["other sampling"]


def test_what_was_rolled_back_is_not_promoted_again(ask: Any) -> None:
    run, registry = ask
    run(made(10.0, "a"))
    run(made(9.0, "b"))
    registry.rollback("bad eyes")
    kept = run(made(9.0, "b"))
    assert (kept["version"], kept["promoted"]) == (2, False)
    assert "it was rolled back by" in kept["reason"]
    command = "raydiffusion promote tiny 2 --reason WHY"
    assert f"`{command} --root {registry.storage.uri}`" in kept["reason"]
    assert run(made(8.0, "c"))["promoted"]
    assert [p["version"] for p in registry.promotions()] == [1, 2, 1, 3]


def test_a_command_names_no_root_where_it_is_the_default(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, registry = ask
    monkeypatch.chdir(Path(registry.storage.uri).parent)
    broken = made(10.0, "a")
    broken["evaluate"]["metrics"]["degenerate"] = BROKEN
    run(broken)
    kept = run(made(1.0, "b", reference="other"))
    assert "`raydiffusion promote tiny 2 --reason WHY` asks" in kept["reason"]


def test_the_champion_judged_again_says_why_it_was_promoted(ask: Any) -> None:
    run, registry = ask
    first = run(made(10.0, "a"))
    assert run(made(10.0, "a")) == first
    assert len(registry.promotions()) == 1


def test_a_verdict_is_of_the_champion_of_the_moment(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, registry = ask
    run(made(10.0, "a"))
    run(made(20.0, "b"))  # kept
    seen = []
    real = Registry.promote

    def promote_another_first(self: Registry, version: int, reason: str, **more: Any) -> Any:
        if not seen:
            seen.append(version)
            real(self, 2, "a person's")
        return real(self, version, reason, **more)

    monkeypatch.setattr(Registry, "promote", promote_another_first)
    verdict = run(made(9.0, "c"))
    assert verdict["promoted"]
    assert "against 20.00 of version 2" in verdict["reason"]
    assert [p["version"] for p in registry.promotions()] == [1, 2, 3]


def test_what_was_replaced_and_not_rolled_back_is_judged_by_its_score(ask: Any) -> None:
    run, _ = ask
    assert run(made(10.0, "a"))["promoted"]
    assert run(made(9.0, "b"))["promoted"]
    again = run(made(10.0, "a"))
    assert not again["promoted"]
    assert "is 10.00 against 9.00 of version 2: not lower" in again["reason"]
