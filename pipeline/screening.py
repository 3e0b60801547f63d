"""The drift test in a cycle of `retrain`: what of the input is held, and what is let in.

What is tested as one is found in `lots.py`, measured in `drift.py`, and recorded in `holding.py`.
What was found in this cycle before it was killed is not looked at, so that it is found again.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.driver import Basis, bring_about
from pipeline.holding import (
    LotState,
    add_finding,
    describe_drift,
    in_state,
    latest_findings,
    released,
    said,
)
from pipeline.lots import Lot, find_lots
from pipeline.pinning import file_hashes, input_hashes, read_document
from pipeline.registry import Registry
from pipeline.settings import Config
from pipeline.sources import InputShard
from pipeline.workflow import Event, Observer

if TYPE_CHECKING:
    from pipeline.drift import Judged

UNCHECKED = "it was taken in with retrain.check_drift = false"
NOTHING_NEW = "none of its items is new any more"
TOO_FEW = "it has too few new items to be judged, alone and with others"


def screen(
    registry: Registry,
    config: Config,
    shards: Sequence[InputShard],
    cycle: Mapping[str, Any],
    basis: Basis,
    observer: Observer,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of what is held, and the names of what is used though it could not be judged.

    Args:
        registry: of the model.
        config: of the cycle.
        shards: the input with its hashes.
        cycle: the record of its beginning.
        basis: what the registry pins; where that is nothing, nothing can be tested.
        observer: told what is found.

    Raises:
        RaydiffusionError: with the sentence for the user and the exit code.
    """
    if not basis.pinned:
        return [], []
    read = functools.cache(functools.partial(read_document, registry.storage))
    of_reference = basis.pinned["reference"]["identity"]["inputs"]["preprocess"]
    data_sets = {of_reference}
    if cycle["champion"] is not None:
        data_sets.add(registry.version(cycle["champion"])["lineage"]["preprocess"])
    known = released(registry) | input_hashes(registry.storage, of_reference)
    if any(shard.format == "files" for shard in shards):
        known = known.union(*(file_hashes(read(key)) for key in data_sets))
    findings = latest_findings(registry, before=cycle["number"])
    held = in_state(registry, findings, "held", basis.evaluation)
    lots = find_lots(
        shards,
        new=set(cycle["new"]),
        known=known,
        held=held,
        is_sequence=config.data.is_sequence,
    )
    if not lots:
        return [], []
    count = basis.pinned["reference"]["metrics"]["counts"]["train"]
    book = _Book(registry, findings, basis.evaluation, count, cycle["number"], observer)
    if not config.retrain.check_drift:
        book.let_pass(lots, UNCHECKED)
        return [], []
    from pipeline.drift import judge_lots  # torch: not where nothing is new

    data = bring_about(config, ("preprocess",), basis=basis, observer=observer)["preprocess"]
    unjudged = in_state(registry, findings, "unjudged", basis.evaluation)
    for judged in judge_lots(
        registry.storage,
        read(data["key"]),
        lots,
        known=[read(key) for key in sorted(data_sets)],
        held={record["sha256"] for record in held},
        earlier={record["sha256"]: record["items"] for record in unjudged},
        pinned=basis.pinned,
        factor=config.retrain.drift_factor,
        cache_bytes=config.data.cache_bytes,
    ):
        book.enter(judged)
    return book.held, book.unjudged


@dataclass
class _Book:
    """What becomes of the lots of a cycle, recorded and told one after the other."""

    registry: Registry
    findings: Mapping[str, Mapping[str, Any]]  # of the cycles before
    evaluation: int
    num_training: int  # images in the pinned reference
    cycle: int
    observer: Observer
    held: list[dict[str, Any]] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)

    def enter(self, judged: "Judged") -> None:
        """Goes by what the test has found of some lots."""
        names = said([lot.name for lot in judged.lots])
        if judged.drift is None:
            self._enter_untested(judged, names)
            return
        reason = describe_drift(judged.drift, _whose(judged, names))
        if judged.drift.has_drifted:
            self._tell(f"{names} held: {reason}")
            for lot in judged.lots:
                self.held.append(self._add(lot, "held", reason, drift=judged.drift))
            return
        self._tell(f"{names} {'passes' if len(judged.lots) == 1 else 'pass'}: {reason}")
        before = [_lot_of(self.findings[sha256]) for sha256 in judged.earlier]
        self.let_pass([*judged.lots, *before], reason)

    def let_pass(self, lots: Sequence[Lot], reason: str) -> None:
        """Records of lots that were held, or let in unjudged, that they are so no more."""
        for lot in lots:
            last = self.findings.get(lot.sha256)
            if last is not None and last["state"] != "passed":
                self._add(lot, "passed", reason)

    def _enter_untested(self, judged: "Judged", names: str) -> None:
        if not judged.count:
            self.let_pass(judged.lots, NOTHING_NEW)
            return
        if self._is_held(judged.lots[0]):  # then all of them are
            self._tell(f"{names} held as before: too few new items to be tested again")
            self.held += [dict(self.findings[lot.sha256]) for lot in judged.lots]
            return
        from pipeline.scores.drift import MIN_TRAINING  # torch: not where nothing is new

        why = "too few new items"
        if self.num_training < MIN_TRAINING:
            why = (
                f"the pinned reference has {self.num_training:,} training images, and the test "
                f"takes {MIN_TRAINING}; `raydiffusion accept-reference CONFIG` pins others"
            )
        self._tell(f"{names} used untested: {why}")
        for lot in judged.lots:
            self.unjudged.append(lot.name)
            if items := judged.items.get(lot.sha256):
                self._add(lot, "unjudged", TOO_FEW, items=items)

    def _is_held(self, lot: Lot) -> bool:
        last = self.findings.get(lot.sha256)
        return last is not None and (last["state"], last["evaluation"]) == ("held", self.evaluation)

    def _add(self, lot: Lot, state: LotState, reason: str, **facts: Any) -> dict[str, Any]:
        return add_finding(
            self.registry,
            lot,
            state,
            reason,
            evaluation=self.evaluation,
            cycle=self.cycle,
            last=self.findings.get(lot.sha256),
            **facts,
        )

    def _tell(self, text: str) -> None:
        self.observer(Event("note", "retrain", {"text": text}))


def _whose(judged: "Judged", names: str) -> str:
    """Whose items were looked at, in words."""
    (first, *others), earlier = judged.lots, judged.num_earlier
    files = f" ({said(sorted(first.files))})" if first.files else ""
    if not others and not earlier:
        return f"its items{files}"
    let_in = f" with {earlier:,} let in untested before" if earlier else ""
    return f"the items of {names}{files if not others else ''}, tested together{let_in},"


def _lot_of(record: Mapping[str, Any]) -> Lot:
    return Lot(record["shard"], record["sha256"], (), record.get("files", {}))
