"""The home page of a storage root: what it lists, what it links, and what it joins."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.registry import Registry
from pipeline.report.home import make_home, write_home
from pipeline.report.plots import score_history
from pipeline.storage import LocalStorage
from pipeline.workflow import hash_json

TRAIN, EVALUATE = ({"step": step, "settings": {}} for step in ("train", "evaluate"))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


def put_run(storage: LocalStorage, run: str, started: float, **fields: Any) -> None:
    steps = {"train": {"state": "finished"}, "promote": {}, "report": {}}
    execution = {"started": started, "ended": started + 90, "outcome": "done", "steps": steps}
    document = {
        "run": run, "name": "m", "identities": {}, "directories": {},
        "executions": [execution | fields.pop("execution", {})], **fields,
    }  # fmt: skip
    storage.create(f"runs/{run}/run.json", json.dumps(document).encode())


def add_version(storage: LocalStorage, key: str, value: float, eta: float = 0.0) -> None:
    protocol = {"num_samples": 500, "eta": eta}
    evaluate = hash_json(EVALUATE) if key == "a" else key
    document = {
        "key": key,
        "created": 1e9 + 86_400 * value,
        "score": {"metric": "fid[x]", "value": value, "protocol": protocol},
        "lineage": {"train": hash_json(TRAIN), "evaluate": evaluate},
        "checkpoint": {"series": key, "global_step": 1000},
        "parent": None,
    }
    Registry(storage, "m").add_version(document)


def links(page: str) -> list[str]:
    found = map(html.unescape, re.findall(r'href="([^"]+)"', page))
    return [link for link in found if not link.startswith(("data:", "#"))]


def test_lists_models_with_their_champion_and_links_what_is_there(storage: LocalStorage) -> None:
    put_run(storage, "m-1", 1e9, identities={"train": TRAIN, "evaluate": EVALUATE})
    storage.create("runs/m-1/report.html", b"page")
    put_run(storage, "m-2", 2e9)
    add_version(storage, "a", 12.5)
    add_version(storage, "b", 9.25)
    registry = Registry(storage, "m")
    registry.promote(1, "the first")
    registry.promote(2, "better <b>by far</b>")
    registry.rollback("too good")
    page = make_home(storage)
    assert "12.5" in page
    assert "fid[x], version 1 of 2" in page
    assert "rolled back to version 1" in page
    assert "better &lt;b&gt;by far&lt;/b&gt;" in page
    assert set(links(page)) == {"runs/m-1/report.html"}
    assert page.index("m-2") < page.index('<td class="free">m-1')  # the latest first
    assert "<script" not in page
    assert not re.search(r'(src|href)="(https?:)?//', page)  # it needs nothing from elsewhere


def test_failed_killed_and_running_runs_say_so(storage: LocalStorage) -> None:
    failed = {"train": {"state": "failed", "error": "no <space> left. Free some."}}
    put_run(storage, "m-1", 1e9, execution={"outcome": "failed", "steps": failed})
    put_run(storage, "m-2", 2e9, execution={"outcome": "running", "ended": None})
    page = make_home(storage)
    assert "no &lt;space&gt; left. Free some." in page
    assert '<td class="killed">killed</td>' in page  # it says that it runs, and nobody holds it


def test_searches_are_listed_with_their_verdict(storage: LocalStorage) -> None:
    put_run(storage, "m-1", 1e9)
    document = {
        "name": "m",
        "metric": "fid[x]",
        "counts": {"trials": 16},
        "recommended": 3,
        "overrides": ["diffusion.schedule=cosine"],
        "finalists": [{"number": 3, "mean": 8.0, "std": 0.5, "count": 3}],
        "verdict": {"kind": "best"},
    }
    storage.create("runs/m-1/tune.json", json.dumps(document).encode())
    storage.create("runs/m-1/tune.html", b"page")
    page = make_home(storage)
    assert "best beyond the spread of 3 seeds: trial 0003" in page
    assert "diffusion.schedule=cosine" in page
    assert "runs/m-1/tune.html" in links(page)


def test_only_scores_under_one_protocol_are_joined() -> None:
    points = [(0.0, 9.0, 0), (1e5, 8.0, 0), (2e5, 3.0, 1)]
    same = [(0.0, 1, {0: 9.0}), (1e5, 2, {0: 8.0})]
    other = [(0.0, 1, {0: 9.0}), (2e5, 3, {1: 3.0})]
    both = [(0.0, 1, {0: 9.0, 1: 4.0}), (2e5, 3, {1: 3.0})]

    def ends(reigns: list[Any]) -> list[int]:
        """How many points each line of a champion has."""
        text = score_history(points, reigns, "fid[x]")
        paths = re.findall(r'<path d="(M[^"]*)"[^>]*stroke-width: 1.8', text)
        return [len(re.findall(r"[ML]", path)) for path in paths]

    assert ends(same) == [3, 1]  # along, and down to the next
    assert ends(other) == [2, 1]  # along, and no further
    assert sorted(ends(both)) == [1, 2, 3]


def test_later_scores_of_a_version_count(storage: LocalStorage) -> None:
    add_version(storage, "a", 12.5)
    score = {"metric": "fid[x]", "value": 4.0, "protocol": {"num_samples": 9}}
    record = {"version": 1, "time": 1.1e9, "score": score}
    storage.create("models/m/scores/000001-k.json", json.dumps(record).encode())
    Registry(storage, "m").promote(1, "the first")
    assert "There are 2 protocols" in make_home(storage)


def test_an_empty_root_has_a_page_and_another_directory_has_none(
    storage: LocalStorage, tmp_path: Path
) -> None:
    storage.create(f"steps/preprocess/{hash_json(1)}/quarantine.jsonl", b"")
    assert write_home(storage) == f"{storage.uri}/index.html"
    assert "None as yet." in storage.read("index.html").decode()
    with pytest.raises(ConfigError, match="There is no storage root at"):
        write_home(LocalStorage(str(tmp_path / "photos")))


def test_a_page_that_is_not_ours_is_not_overwritten(storage: LocalStorage) -> None:
    put_run(storage, "m-1", 1e9)
    assert write_home(storage) == write_home(storage)  # its own is
    storage.replace("index.html", b"<h1>My site</h1>")
    with pytest.raises(ConfigError, match=r"index.html is no home page .*\. Move it elsewhere\."):
        write_home(storage)
    assert storage.read("index.html") == b"<h1>My site</h1>"


def test_the_directory_above_a_root_gets_no_page(storage: LocalStorage, tmp_path: Path) -> None:
    put_run(LocalStorage(f"{storage.uri}/runs"), "m-1", 1e9)
    with pytest.raises(ConfigError, match=r"but its directory runs\. Give .*runs\."):
        write_home(storage)
    assert not storage.exists("index.html")


def test_what_is_damaged_is_a_sentence_or_passed_over(storage: LocalStorage) -> None:
    put_run(storage, "m-1", 1e9)
    storage.create("runs/m-2/run.json", b"\0" * 64)
    assert "m-1" in make_home(storage)
    storage.create("runs/m-1/tune.json", b"\0" * 64)
    with pytest.raises(StorageError, match=r"tune.json is no JSON\. .* `raydiffusion report m-1 "):
        make_home(storage)
    storage.delete("runs/m-1/tune.json")
    add_version(storage, "a", 1.0)
    storage.create("models/m/scores/000001-k.json", b"\0" * 64)
    with pytest.raises(StorageError, match=r"scores/000001-k.json is missing or no JSON"):
        make_home(storage)
