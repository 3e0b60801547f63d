"""The gate: which version becomes the champion by itself, and the step `promote` that asks it.

A challenger is judged by its score under the evaluation that the model pins (`pinning.py`), against
the champion's under the same protocol. What memorises or makes broken samples is refused whatever
it scores. A person's `promote` does not ask the gate.
"""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BusyError
from pipeline.leases import hold_lease
from pipeline.lineage import describe_version
from pipeline.notify import UNTOLD
from pipeline.pinning import find_score, is_pinned, pin_first, score_differences, scores_of
from pipeline.protocol import compare_records
from pipeline.registry import ROLLBACK, Registry
from pipeline.scores import show_number
from pipeline.scores.copies import MIN_HELD_OUT, NEIGHBOURS
from pipeline.scores.interval import min_samples
from pipeline.settings.config import StorageConfig
from pipeline.settings.retrain import PromoteConfig
from pipeline.storage import open_storage
from pipeline.workflow import StepContext

UNCHECKED = (
    f"whether it memorises could not be checked, which takes {MIN_HELD_OUT} held-out images and "
    f"{NEIGHBOURS} training images"
)


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a version, in one sentence with the numbers."""

    is_promoted: bool
    reason: str
    asks: bool = False  # a person is to decide


def promote(context: StepContext) -> dict[str, Any]:
    """The step `promote`: records the version, pins the first one's evaluation, asks the gate."""
    registry = Registry(context.storage, context.config.name)
    document = describe_version(context.config, context.inputs, registry.versions())
    number = registry.add_version(document)["number"]
    verdict = ask(registry, number, context.config.promote)
    if verdict.is_promoted:  # before the manifest: a kill from here on leaves it to the next run
        context.storage.replace(f"{context.directory}/{UNTOLD}", b"")
    word = "promoted" if verdict.is_promoted else "kept"
    context.note(f"version {number} {word}: {verdict.reason}")
    return {
        "version": number,
        "promoted": verdict.is_promoted,
        "reason": verdict.reason,
        "asks": verdict.asks,
    }


def ask(registry: Registry, number: int, settings: PromoteConfig) -> Verdict:
    """Judges a version against the champion of the moment, and promotes it if it is to be.

    Asked again, it says the same as long as the champion is the same.

    Args:
        registry: of the model.
        number: of the version.
        settings: of the gate.
    """
    version = registry.version(number)
    with hold_lease(registry.storage, f"models/{registry.name}"):  # judge one at a time
        evaluation = pin_first(registry)
        while True:
            promotions = registry.promotions()
            verdict = decide(registry, version, promotions, evaluation, settings)
            last = promotions[-1] if promotions else {"number": 0, "version": None}
            if not verdict.is_promoted or last["version"] == number:
                return verdict
            with contextlib.suppress(BusyError):  # a person promoted another: judge against that
                registry.promote(number, verdict.reason, after=last["number"])
                return verdict


def decide(
    registry: Registry,
    version: Mapping[str, Any],
    promotions: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    settings: PromoteConfig,
) -> Verdict:
    """Judges a version against the champion of the moment; changes nothing.

    Args:
        registry: of the model.
        version: its record.
        promotions: all of the model, the oldest first.
        evaluation: the one that is pinned.
        settings: of the gate.
    """
    number, name = version["number"], registry.name
    if promotions and promotions[-1]["version"] == number:
        return Verdict(True, promotions[-1]["reason"])  # it is the champion, as the record says
    for promotion in reversed(promotions):
        if promotion.get("kind") == ROLLBACK and promotion["replaces"] == number:
            return Verdict(
                False,
                f"it was rolled back by {promotion['by']} ({promotion['reason']}), and only a "
                f"person promotes it again: {_command(registry, number)}",
            )
    if not is_pinned(evaluation, version["lineage"]):
        other = (
            "`raydiffusion accept-reference CONFIG` pins another"
            if promotions  # it scores a champion
            else f"{_command(registry, number)} asks no gate"
        )
        return Verdict(
            False,
            "its score is not comparable: it is under another reference or extractor than "
            f"evaluation {evaluation['number']}, which {name} pins. `raydiffusion retrain CONFIG` "
            f"scores under the pinned one, {other}",
        )
    if not promotions:
        return judge(version["score"], None, settings, command=_command(registry, number))
    champion = registry.version(promotions[-1]["version"])
    theirs = find_score(registry, champion, version["score"]["protocol"])
    if theirs is None:
        return Verdict(False, _not_comparable(registry, version, champion))
    names = (f"version {champion['number']}", f"version {number}")
    return judge(
        version["score"], theirs, settings, names=names, command=_command(registry, number)
    )


def judge(
    score: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    settings: PromoteConfig,
    *,
    names: tuple[str, str] = ("the champion", "the challenger"),
    command: str = "raydiffusion promote",
) -> Verdict:
    """Judges a score against the champion's under the same protocol.

    Args:
        score: of the challenger.
        champion: the champion's; None where there is none.
        settings: of the gate.
        names: of the champion and the challenger, for people.
        command: that promotes the challenger.
    """
    if fault := fault_of(score, settings):
        return Verdict(False, fault)
    if champion is None:
        reason, is_better, remedy = "there is no champion before it", True, None
    else:
        reason, is_better, remedy = _compare(score, champion, settings, names)
    is_unchecked = not score.get("copies") and not settings.allow_memorising
    if is_unchecked:
        reason = f"{reason}; {UNCHECKED}"
    if settings.rule == "ask":
        return Verdict(False, f'promote.rule = "ask", and {reason}. {command}', asks=True)
    if is_better and is_unchecked and champion and settings.unchecked_copies == "keep":
        is_better = False
        remedy = 'Raise data.test_fraction, or set promote.unchecked_copies = "allow"'
    return Verdict(is_better, reason if remedy is None else f"{reason}. {remedy}")


def fault_of(score: Mapping[str, Any], settings: PromoteConfig) -> str | None:
    """What keeps a model from being the champion whatever it scores; None where nothing does.

    Args:
        score: its record.
        settings: of the gate.
    """
    broken = score.get("degenerate")
    if broken and broken["constant"] > settings.max_degenerate_fraction * broken["count"]:
        return (
            f"{broken['constant']:,} of its {broken['count']:,} samples are of one value "
            f"throughout, more than promote.max_degenerate_fraction = "
            f"{settings.max_degenerate_fraction:.1%}"
        )
    copies = score.get("copies")
    if copies and copies["is_memorising"] and not settings.allow_memorising:
        return (
            f"it memorises: {copies['share']:.1%} of its samples are near-copies of training "
            f"images, where {copies['held_out_share']:.1%} of held-out images are, and "
            "promote.allow_memorising is false"
        )
    return None


def _compare(
    score: Mapping[str, Any],
    champion: Mapping[str, Any],
    settings: PromoteConfig,
    names: tuple[str, str],
) -> tuple[str, bool, str | None]:
    """The comparison in words, whether it is for the challenger, and what would decide it."""
    comparison = compare_records(names, (champion, score))
    ours, theirs = score["value"], champion["value"]
    numbers = (
        f"{score['metric']} is {show_number(ours)} against {show_number(theirs)} of {names[0]}"
    )
    if settings.rule == "not_worse":
        limit = theirs * (1 + settings.tolerance)
        relation = "at most" if ours <= limit else "above"
        share = f"{settings.tolerance:.1%}"
        reason = f"{numbers}, {relation} {show_number(limit)}, which is {share} worse"
        return reason, ours <= limit, None
    if comparison.is_beyond_chance is None:
        if ours >= theirs:
            return f"{numbers}: not lower", False, None
        too_few, remedy = _too_few(score["protocol"])
        return f"{numbers}: lower, which may be chance, for {too_few}", False, remedy
    intervals = " and ".join(
        f"[{show_number(record['unbiased']['low'])}, {show_number(record['unbiased']['high'])}]"
        for record in (score, champion)
    )
    if ours >= theirs:
        return f"{numbers}: not lower; without bias {intervals}", False, None
    if comparison.is_beyond_chance:
        return f"{numbers}, and without bias {intervals} lie apart", True, None
    return f"{numbers}, but without bias {intervals} overlap", False, None


def _too_few(protocol: Mapping[str, Any]) -> tuple[str, str]:
    """Why a score under a protocol has no interval, and what would give one."""
    needed = min_samples(protocol["feature_width"])
    counts = {"evaluate.num_samples": protocol["num_samples"]}
    if protocol["interval_reference"] != "fixed":
        counts["the number of test images"] = protocol["reference_count"]
    short = {name: count for name, count in counts.items() if count < needed}
    there = " and ".join(f"{name} is {count:,}" for name, count in short.items())
    return (
        f"an interval takes {needed:,} and {there}",
        f"Raise {' and '.join(short)} and run `raydiffusion accept-reference CONFIG`, or set "
        "promote.rule to another",
    )


def _not_comparable(
    registry: Registry, version: Mapping[str, Any], champion: Mapping[str, Any]
) -> str:
    """Why the champion has no score to compare with: the fields of the nearest one."""
    protocol = version["score"]["protocol"]
    found = [score_differences(champion, s, protocol) for s in scores_of(registry, champion)]
    nearest = min(found, key=len)
    return (
        f"its score is not comparable with version {champion['number']}'s: the protocols differ in "
        f"{', '.join(nearest)}. Set them back, or score the champion in this way as well: "
        "`raydiffusion accept-reference CONFIG`"
    )


def _command(registry: Registry, version: int) -> str:
    """What promotes a version by hand; it finds the default root without being told."""
    words = ["raydiffusion", "promote", registry.name, str(version), "--reason", "WHY"]
    root = registry.storage.uri
    if root != open_storage(StorageConfig().root).uri:
        words += ["--root", root]
    return f"`{shlex.join(words)}`"
