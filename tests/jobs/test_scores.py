"""How scores are printed: what must be read beside a number stands beside it."""

import io
from typing import Any

import pytest

from jobs.console import make_console
from jobs.scores import show_comparison, show_score
from pipeline.protocol import Comparison


def record(value: float = 12.0, **changes: Any) -> dict[str, Any]:
    return {
        "metric": "fid[classifier]",
        "value": value,
        "floor": 6.5,
        "ceiling": 228.2,
        "unbiased": {
            "metric": "fid_unbiased[classifier]", "value": value - 5,
            "low": value - 8, "high": value - 2, "level": 0.95,
            "is_reference_fixed": True,
        },
        "kid": {"metric": "kid[classifier]", "value": 0.0123, "error": 0.001},
        "inception_score": {"metric": "inception_score[classifier]", "value": 8.765},
        "precision_recall": {
            "metrics": ["precision[classifier]", "recall[classifier]"],
            "precision": 0.912, "recall": 0.834, "count": 297,
        },
        "copies": {"share": 0.031, "held_out_share": 0.029, "is_memorising": False},
        "degenerate": {"count": 640, "constant": 0, "black": 0},
        **changes,
    }  # fmt: skip


def printed(show: Any, shown: Any) -> str:
    console = make_console()
    console.file, console.width = io.StringIO(), 160
    show(console, shown)
    return console.file.getvalue()


def compared(
    first: dict[str, Any], second: dict[str, Any], *, is_beyond_chance: bool | None = False
) -> str:
    difference = second["value"] - first["value"]
    comparison = Comparison(("one", "two"), (first, second), difference, is_beyond_chance)
    return printed(show_comparison, comparison)


def test_a_score_stands_with_floor_ceiling_and_all_others() -> None:
    lines = printed(show_score, record()).splitlines()
    assert lines[0].split("   ") == [
        "fid[classifier] 12.00", "floor 6.50 (real images)", "ceiling 228.20 (untrained)",
        "lower is better",
    ]  # fmt: skip
    assert lines[1:] == [
        "  fid_unbiased[classifier] 7.00 [4.00, 10.00]   with infinitely many samples, 95%, "
        "reference held fixed",
        "  kid[classifier] 0.0123 +- 0.001",
        "  inception_score[classifier] 8.77   higher is better",
        "  precision[classifier], recall[classifier] 0.912, 0.834   of 297 each",
        "  near-copies of training images 3.1%   of held-out images 2.9%",
    ]


def test_a_large_score_is_written_out() -> None:
    kid = {"metric": "kid[classifier]", "value": 5321.4, "error": 160.25}
    assert "kid[classifier] 5321.40 +- 160.25\n" in printed(show_score, record(kid=kid))


def test_what_was_not_computed_has_no_line() -> None:
    missing = ("ceiling", "unbiased", "kid", "inception_score", "precision_recall", "copies")
    assert printed(show_score, record(**dict.fromkeys(missing))).splitlines() == [
        "fid[classifier] 12.00   floor 6.50 (real images)   lower is better"
    ]


def test_memorising_and_constant_samples_are_said() -> None:
    text = printed(
        show_score,
        record(
            copies={"share": 0.3, "held_out_share": 0.02, "is_memorising": True},
            degenerate={"count": 1024, "constant": 17, "black": 4},
        ),
    )
    assert "30.0%   of held-out images 2.0%; it MEMORISES: more than chance allows" in text
    assert "samples of one value 17 of 1,024   4 of them black" in text


def test_scores_stand_side_by_side_with_a_dash_where_one_has_none() -> None:
    text = compared(record(12.0), record(9.0, kid=None, ceiling=None))
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    assert rows["fid[classifier]"][1:] == ["12", "9"]
    assert rows["ceiling"][1:] == ["228.2", "-"]
    assert rows["kid[classifier]"][-1] == "-"
    assert "two is lower by 3, which may be chance: the 95% intervals overlap" in text


@pytest.mark.parametrize(
    ("is_beyond_chance", "said"),
    [
        (True, "one is lower by 8, beyond chance: the 95% intervals lie apart"),
        (None, "one is lower by 8; there are too few samples to say whether that is chance"),
    ],
)
def test_a_difference_is_called_chance_or_not(is_beyond_chance: bool | None, said: str) -> None:
    assert said in compared(record(4.0), record(12.0), is_beyond_chance=is_beyond_chance)


def test_equal_scores_and_a_memorising_one_are_said() -> None:
    copies = {"share": 0.3, "held_out_share": 0.02, "is_memorising": True}
    text = compared(record(), record(copies=copies))
    assert "two MEMORISES: more of its samples are near-copies than chance allows" in text
    assert "one MEMORISES" not in text
    assert "The scores are equal." in text
