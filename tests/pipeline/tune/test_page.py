"""The page of a search, from a made-up one: what it shows of the default and of the worst."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipeline.config import load_config
from pipeline.report.tune_page import make_page
from pipeline.storage import LocalStorage
from pipeline.tune.records import Rung, TrialStore
from pipeline.tune.verdict import RULE, judge

RUNGS = (10, 30)


def trial(number: int, outcome: str, *values: float) -> dict[str, Any]:
    rungs = [
        {"step": step, "images_seen": 32 * step, "value": value, "train_s": 1.0, "score_s": 1.0}
        for step, value in zip(RUNGS, values, strict=False)
    ]
    return {
        "name": f"{number:04d}", "number": number, "choice": {}, "overrides": [],
        "key": f"{number:032x}", "refused": {}, "outcome": outcome, "rungs": rungs,
        "seconds": 3.0, "reason": "it diverged" if outcome == "failed" else "",
    }  # fmt: skip


def document(trials: list[dict[str, Any]], scores: dict[int, list[float]]) -> dict[str, Any]:
    verdict = judge(scores)
    finalists = [
        {"number": n, "scores": s, "failed": 0, "mean": float(np.mean(s)), "std": 0.1,
         "low": min(s), "high": max(s), "count": len(s)}
        for n, s in scores.items()
    ]  # fmt: skip
    outcomes = [each["outcome"] for each in trials]
    return {
        "name": "tiny", "metric": "fid[classifier]", "rule": RULE, "finalists": finalists,
        "verdict": {
            "kind": verdict.kind, "recommended": verdict.recommended, "lowest": verdict.lowest,
            "tied": list(verdict.tied), "intervals": {},
        },
        "recommended": verdict.recommended, "overrides": [], "trials": trials, "refused": {},
        "protocol": {"num_samples": 64},
        "rungs": list(RUNGS), "full_steps": 300,
        "counts": {"trials": len(trials), **{o: outcomes.count(o) for o in outcomes}},
        "cost": {"images": 1, "train_s": 1.0, "score_s": 1.0, "trial_s": 2.0, "at_a_time": 1},
    }  # fmt: skip


@pytest.fixture
def render(tmp_path: Path, tiny_config: Path) -> Any:
    storage = LocalStorage(str(tmp_path / "root"))

    def make(trials: list[dict[str, Any]], scores: dict[int, list[float]], **more: Any) -> str:
        items = np.zeros((4, 1, 8, 8), np.uint8)
        for each in trials:
            for rung in each["rungs"]:
                store = TrialStore(storage, f"steps/trial/{each['key']}")
                store.add_rung(Rung(**rung), safetensors.numpy.save({"items": items}))
        return make_page(document(trials, scores) | more, load_config(tiny_config), storage)

    return make


def test_the_worst_is_drawn_though_it_was_stopped(render: Any) -> None:
    trials = [trial(0, "finished", 9.0, 5.0), trial(1, "finished", 8.0, 4.0),
              trial(2, "stopped", 150.5)]  # fmt: skip
    page = render(trials, {0: [5.0, 5.1], 1: [4.0, 4.1]})
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == [
        "lowest mean over seeds: trial 0001, fid[classifier] 4",
        "as configured: trial 0000, fid[classifier] 5",
        "highest score of the search: trial 0002, fid[classifier] 150.5, stopped at 320 images",
    ]


@pytest.mark.parametrize("others", [{1: [5.0, 5.1]}, {1: [5.0, 5.2], 2: [5.1, 5.3]}])
def test_a_default_that_failed_is_said_whatever_the_verdict(render: Any, others: Any) -> None:
    trials = [trial(0, "failed"), *(trial(n, "finished", 9.0, 5.0) for n in others)]
    assert "The config as it is could not be trained" in render(trials, others)
    trials[0] = trial(0, "finished", 9.0, 5.0)
    assert "could not be trained" not in render(trials, {0: [5.0, 5.1], **others})


def test_a_space_with_nothing_new_left_is_said(render: Any) -> None:
    """Also of a document that was written before it was recorded."""
    trials, scores = [trial(0, "finished", 9.0, 5.0)], {0: [5.0, 5.1]}
    found = {"num_trials": 3, "asked_for": 20, "refused": {"drawn before": 1000}}
    assert "nothing new after 3 of 20 trials" in render(trials, scores, exhausted=found)
    for more in ({}, {"exhausted": None}):
        assert "nothing new" not in render(trials, scores, **more)
