"""How scores look to a person."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipeline.scores import show_number

if TYPE_CHECKING:
    from pipeline.protocol import Comparison


def show_score(console: Console, score: Mapping[str, Any]) -> None:
    """Prints a score with what it is to be read beside, and the others below it."""
    line = f"{score['metric']} {show_number(score['value'])}   "
    line += f"floor {show_number(score['floor'])} (real images)   "
    if score["ceiling"] is not None:
        line += f"ceiling {show_number(score['ceiling'])} (untrained)   "
    _print(console, line + "lower is better")
    for name, value, meaning in _rows(score):
        _print(console, f"  {name} {value}" + (f"   {meaning}" if meaning else ""))


def show_comparison(console: Console, comparison: "Comparison") -> None:
    """Prints two scores side by side."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", *comparison.names):
        table.add_column(heading, overflow="fold")
    by_record = [{name: value for name, value, _ in _all_rows(r)} for r in comparison.records]
    names = [*by_record[0], *(name for name in by_record[1] if name not in by_record[0])]
    for name in names:
        values = (of_one.get(name, "-") for of_one in by_record)
        table.add_row(name, *values)
    console.print(table)
    for name, record in zip(comparison.names, comparison.records, strict=True):
        if record["copies"] is not None and record["copies"]["is_memorising"]:
            _print(
                console, f"{name} MEMORISES: more of its samples are near-copies than chance allows"
            )
    if comparison.difference == 0:
        _print(console, "The scores are equal.")
        return
    better = comparison.names[comparison.difference < 0]
    text = f"{better} is lower by {abs(comparison.difference):.4g}"
    if comparison.is_beyond_chance is None:
        text += "; there are too few samples to say whether that is chance"
    elif comparison.is_beyond_chance:
        text += ", beyond chance: the 95% intervals lie apart"
    else:
        text += ", which may be chance: the 95% intervals overlap"
    _print(console, text)


def _all_rows(score: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    first = [(score["metric"], score["value"]), ("floor", score["floor"])]
    if score["ceiling"] is not None:
        first.append(("ceiling", score["ceiling"]))
    return [(name, f"{value:.5g}", "") for name, value in first] + _rows(score)


def _rows(score: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of all scores but the first."""
    rows = []
    if (found := score["unbiased"]) is not None:
        ends = f"{show_number(found['low'])}, {show_number(found['high'])}"
        value = f"{show_number(found['value'])} [{ends}]"
        reference = "held fixed" if found["is_reference_fixed"] else "a sample too"
        meaning = f"with infinitely many samples, {found['level']:.0%}, reference {reference}"
        rows.append((found["metric"], value, meaning))
    if (found := score["kid"]) is not None:
        value = f"{show_number(found['value'])} +- {show_number(found['error'])}"
        rows.append((found["metric"], value, ""))
    if (found := score["inception_score"]) is not None:
        rows.append((found["metric"], f"{found['value']:.2f}", "higher is better"))
    if (found := score["precision_recall"]) is not None:
        value = f"{found['precision']:.3f}, {found['recall']:.3f}"
        rows.append((", ".join(found["metrics"]), value, f"of {found['count']:,} each"))
    if (found := score["copies"]) is not None:
        meaning = f"of held-out images {found['held_out_share']:.1%}"
        if found["is_memorising"]:
            meaning += "; it MEMORISES: more than chance allows"
        rows.append(("near-copies of training images", f"{found['share']:.1%}", meaning))
    broken = score["degenerate"]
    if broken["constant"]:
        value = f"{broken['constant']:,} of {broken['count']:,}"
        rows.append(("samples of one value", value, f"{broken['black']:,} of them black"))
    return rows


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)
