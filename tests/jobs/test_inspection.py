"""What `preprocess --inspect` prints of a data set."""

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.console import make_console
from jobs.inspection import show_dataset
from pipeline.config import load_config
from pipeline.convert import preprocess_shard
from pipeline.dataset_document import make_document
from pipeline.settings import DataConfig
from pipeline.sources import InputFile, InputShard, list_inputs
from pipeline.storage import LocalStorage
from pipeline.units import unit_directory

IMAGES = DataConfig(sources=("x",), resolution=8)


def facts(count: int, labels: dict[str, int], channels: int = 3) -> dict[str, Any]:
    """Of a split whose pixels are all 100."""
    sums = [[100 * 64 * count, 100**2 * 64 * count]] * channels
    return {
        "count": count,
        "labels": labels,
        "unlabelled": count - sum(labels.values()),
        "channel_sums": sums,
    }


def refusal(source: str, reason: str, detail: str, count: int = 1) -> dict[str, Any]:
    return {"source": source, "reason": reason, "detail": detail, "count": count}


@pytest.fixture
def show(tmp_path: Path) -> Callable[..., list[str]]:
    """The lines printed, where there is no terminal, of the data set of one tar shard."""

    def run(
        labels: dict[str, int] | None = None,
        *,
        data: DataConfig = IMAGES,
        channels: int = 3,
        ignored: tuple[str, ...] = (),
        files: int = 0,
        **unit: Any,
    ) -> list[str]:
        unit = {
            "input": "a.tar",
            "files": [{"split": "train", "file": "t.arrow", "count": 1234, "bytes": 3 << 20}],
            "refused": [],
            "left_out": {},
            "animated": 0,
            "splits": {
                "train": facts(1234, labels or {}, channels),
                "validation": facts(70, {}, channels),
                "test": facts(60, {}, channels),
            },
            **unit,
        }
        shards = [InputShard("a.tar", "tar", (InputFile("a.tar", "/a.tar", 1 << 20, None, "ab"),))]
        units = [unit]
        if files:
            loose = tuple(
                InputFile(f"{k}.png", f"/{k}.png", 1024, None, "cd") for k in range(files)
            )
            shards.append(InputShard("files-0000-of-0001", "files", loose))
            empty = facts(0, {}, channels)
            splits = dict.fromkeys(("train", "validation", "test"), empty)
            units.append({**unit, "files": [], "splits": splits, "left_out": {}, "refused": []})
        document = make_document(data, LocalStorage(str(tmp_path)), shards, units, ignored)
        output = io.StringIO()
        console = make_console()
        console.file, console.width = output, 40
        show_dataset(console, document, "here/sheet.png")
        return output.getvalue().splitlines()

    return run


def test_says_what_there_is_a_line_for_each_fact(show: Callable[..., list[str]]) -> None:
    shard = InputShard("a.tar", "tar", (InputFile("a.tar", "/a.tar", 1 << 20, None, "ab"),))
    assert show(files=5) == [
        "items          1,234 train, 70 validation, 60 test",
        "shape          3 x 8 x 8, uint8",
        "mean           100.0, 100.0, 100.0 by channel, of the training split",
        "deviation      0.0, 0.0, 0.0",
        "sources        1 tar, 5 loose files, 1.0 MiB",
        f"Arrow files    1, 3.0 MiB, in {unit_directory(shard, IMAGES)}, below the storage root",
        "transform      resolution 8, mode RGB, fit crop, resample lanczos, background #ffffff, "
        "jpeg_draft",
        "limits         validation 0.05, test 0.05, max_pixels 67,108,864, min_resolution_px 1",
        "refused        0",
        "contact sheet  here/sheet.png",
    ]


def test_sequences_have_no_settings_of_images(show: Callable[..., list[str]]) -> None:
    data = DataConfig(sources=("x",), sequence_shape=(2, 64), drop_duplicates=False)
    lines = show(data=data, channels=2)
    assert lines[1:4] == [
        "shape          2 x 64, float32",
        "mean           100, 100 by channel, of the training split",
        "deviation      0, 0",
    ]
    assert "transform      none, sequences are kept as they are" in lines
    assert "limits         validation 0.05, test 0.05" in lines


def test_settings_that_leave_out_are_named(show: Callable[..., list[str]]) -> None:
    settings = {
        "require_labels": True,
        "min_resolution_px": 32,
        "include_labels": (*range(6), "x"),
    }
    lines = show(data=IMAGES.model_copy(update=settings))
    (limits,) = (line for line in lines if line.startswith("limits"))
    assert limits.endswith(
        "min_resolution_px 32, require_labels, include_labels 0, 1, 2, 3, 4 and 2 more"
    )


def test_classes_are_a_table_of_counts(show: Callable[..., list[str]]) -> None:
    splits = {
        "train": facts(1234, {"cat": 1000, "dog": 200}),
        "validation": facts(70, {"cat": 60, "yak": 10}),
        "test": facts(60, {"dog": 60}),
    }
    lines = show(splits=splits)
    assert lines[lines.index("") + 1 :] == [
        "classes (3)  train  validation  test",
        "cat          1,000          60     0",
        "dog            200           0    60",
        "yak              0          10     0",
        "without label: 34 train, 0 validation, 0 test",
    ]


def test_many_classes_are_cut_short(show: Callable[..., list[str]]) -> None:
    lines = show({f"class {k:03d}": 1 for k in range(100)})
    table = lines[lines.index("") + 1 :]
    assert table[0].startswith("classes (100)")
    assert table[20].startswith("class 019")
    assert table[21] == "and 80 more"


def test_everything_not_used_is_accounted_for(show: Callable[..., list[str]]) -> None:
    refused = [refusal(f"a.tar/{k}.png", "truncated", "cut short") for k in range(12)]
    refused.append(refusal("a.tar", "unreadable_tail", "bad block", 5))
    lines = show(
        refused=refused,
        left_out={"label": 1000, "name": 1},
        ignored=("notes.txt", "b.md"),
        animated=2,
    )
    assert "left out       1,000 by label, 3 by name; by name such as notes.txt, b.md" in lines
    assert "animated       2, of each the first frame" in lines
    assert "refused        17" in lines
    assert lines[lines.index("") + 1 :] == [
        "refused          count",
        "truncated           12",
        "unreadable_tail      5",
        *(f"a.tar/{k}.png: truncated, cut short" for k in range(10)),
        "and 3 more, all in quarantine.jsonl, beside dataset-<hash>.json",
    ]


def test_hostile_names_are_shown_as_they_are_on_one_line(show: Callable[..., list[str]]) -> None:
    name = "[red]a[/red] :smile:"
    escape = "\x1b]0;owned\x07\n"
    refused = [refusal(escape + name, "unsafe_name", name), refusal("x" * 5000, "empty", "e")]
    lines = show({name: 1, escape: 1}, refused=refused, left_out={}, ignored=(escape,))
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\x07" not in text
    shown = r"\x1b]0;owned\x07\n"
    assert f"left out       1 by name; by name such as {shown}" in lines
    assert f"{shown}{name}: unsafe_name, {name}" in lines
    assert any(line.startswith(f"{name} ") for line in lines)
    assert max(map(len, lines)) < 200


def test_wide_letters_do_not_shift_the_table(show: Callable[..., list[str]]) -> None:
    lines = show({"猫": 1, "dog": 2})
    table = lines[lines.index("") + 1 :]
    assert table[1] == "dog              2           0     0"
    assert table[2] == "猫               1           0     0"  # takes two columns
    assert len(table[1]) == len(table[2]) + 1


def test_inspect_prints_and_draws(
    tiny_config: Path, call_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    config, storage = load_config(tiny_config), LocalStorage(str(tiny_config.parent / "runs"))
    for shard in list_inputs(config.data, storage).shards:
        preprocess_shard(shard, config.data, storage)
    # All units are there, so Ray is not asked: nothing listens at this address.
    options = ("--inspect", "--set", "cluster.address=127.0.0.1:1", "--output")
    done = call_cli("preprocess", str(tiny_config), *options, "a.png", cwd=tiny_config.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "classes (10)" in done.stdout
    assert "contact sheet  a.png" in done.stdout
    assert (tiny_config.parent / "a.png").read_bytes().startswith(b"\x89PNG")

    done = call_cli(
        "preprocess", str(tiny_config), "--json", *options, "b.png", cwd=tiny_config.parent
    )
    printed = json.loads(done.stdout)
    assert printed["contact_sheet"] == "b.png"
    assert printed["dataset"]["shape"] == [1, 8, 8]
    assert (tiny_config.parent / "b.png").read_bytes() == (
        tiny_config.parent / "a.png"
    ).read_bytes()

    done = call_cli("preprocess", str(tiny_config), *options[:-1], cwd=tiny_config.parent)
    (sheet,) = tiny_config.parent.glob("runs/steps/preprocess/*/contact_sheet.png")
    assert f"contact sheet  {sheet}" in done.stdout
    assert sheet.read_bytes() == (tiny_config.parent / "a.png").read_bytes()

    done = call_cli("preprocess", str(tiny_config), *options, "no/b.png", cwd=tiny_config.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot write no/b.png: No such file or directory.")
