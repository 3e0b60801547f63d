"""One cycle of `retrain`: new shards are tested and trained on, and the model is judged.

A cycle is idempotent. It is recorded when it begins (`cycles.py`): what there was then, and the
champion that it starts from, so that a killed one goes on in the same way whatever happened since;
the record of its end is made last. It keeps to the input that it began with: what arrives or
changes later was not tested, and belongs to the next cycle.

Its steps are those of the workflow, but that the results of `features` and `reference` are the ones
that the model pins, and that `train` may begin with the champion's weights. Shards that are unlike
the pinned reference are held and left out (`screening.py`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.cluster import connect
from pipeline.comparable import check_classes, check_comparable, start_from
from pipeline.cycles import begin_cycle, end_cycle, hold_cycle, last_cycle
from pipeline.driver import Basis, Outcome, Plan, make_plan, run_config
from pipeline.errors import ConfigError
from pipeline.holding import hashes_of, held_shards, release_shard, released
from pipeline.identities import OnHash
from pipeline.notify import failure_is_told, tell_refusal
from pipeline.pinning import input_hashes, pin_first, pinned_manifests
from pipeline.preflight import before_ray, require
from pipeline.publish import UNKNOWN_COMMAND
from pipeline.registry import Registry
from pipeline.rescore import score_champion
from pipeline.screening import screen
from pipeline.settings import Config
from pipeline.sources import Inputs, InputShard, keep_to, leave_out, list_inputs, loose_files
from pipeline.steps import Start, make_steps
from pipeline.storage import open_storage
from pipeline.workflow import Event, Observer, hash_json

if TYPE_CHECKING:
    from pipeline.gate import Verdict

State = Literal["nothing_new", "promoted", "kept", "asks", "held"]
KEYED_BY = ("preprocess", "train", "evaluate", "promote")  # steps whose settings tell cycles apart
SHOWN = 3  # names of shards in a sentence
_BECAME = {  # by how a cycle ended
    "promoted": "became the champion",
    "asks": "was left for a decision",
    "kept": "was kept",
}
SUPERSEDED = "superseded"  # how a cycle ended that was cut short and that another follows


@dataclass(frozen=True)
class Cycle:
    """What a call of `retrain` did.

    Args:
        state: nothing was new; the new version was promoted, kept by the gate, or waits for a
            person (`promote.rule = "ask"`); or all that was new is held.
        sentence: for people.
        number: of the cycle; None where there was nothing to do.
        new: names of the new or changed input shards.
        held: the records of shards that are held, of this cycle and, where nothing was new, from
            before.
        unjudged: names of new shards that have too few new items to be tested.
        version: the number of the new version.
        outcome: of the workflow.
    """

    state: State
    sentence: str
    number: int | None = None
    new: tuple[str, ...] = ()
    held: tuple[Mapping[str, Any], ...] = ()
    unjudged: tuple[str, ...] = ()
    version: int | None = None
    outcome: Outcome | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the gate refused the model, or the drift test all that is new."""
        return self.state in ("kept", "held")


def retrain(
    config: Config,
    *,
    observer: Observer,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_hash: OnHash | None = None,
    command: str = UNKNOWN_COMMAND,
    accept_held: Sequence[str] = (),
    reason: str = "accepted",
) -> Cycle:
    """Does one cycle, or what is left of one; nothing where no input shard is new.

    Args:
        config: the whole config.
        observer: told what happens.
        on_plan: told the plan that will be followed.
        on_hash: told the number of files and bytes that are read before there is a plan.
        command: what runs the config, as typed into a shell after `raydiffusion`, for pages.
        accept_held: names or hashes of held shards that are taken in.
        reason: of taking them in, for the record.

    Raises:
        BusyError: another process retrains this model.
        RaydiffusionError: with the sentence for the user and the exit code. The cycle is not over
            then: the next call goes on with it.
    """
    if config.tune.enabled:
        raise ConfigError(
            "retrain does not search, and tune.enabled asks for a search. Put what `raydiffusion "
            "tune` recommended into the config, and set tune.enabled = false."
        )
    with contextlib.ExitStack() as stack:
        with failure_is_told(config, observer):
            storage = open_storage(config.storage.root)
            registry = Registry(storage, config.name)
            inputs = list_inputs(config.data, storage, on_hash=on_hash)
            stack.enter_context(hold_cycle(registry))
            for which in accept_held:
                release_shard(registry, which, reason)
            found = _find_cycle(registry, config, inputs)
        if isinstance(found, Cycle):
            return found
        cycle, inputs = found
        return _go_through(registry, config, inputs, cycle, observer, on_plan, command)


def _find_cycle(
    registry: Registry, config: Config, inputs: Inputs
) -> tuple[dict[str, Any], Inputs] | Cycle:
    """The record of the cycle to go through, begun before or now, and its input; or nothing new."""
    taken, number = released(registry), len(registry.evaluations())
    last = last_cycle(registry)
    if last is not None and last["outcome"] is None:
        own = keep_to(inputs, last["shards"], last.get("files", {}))
        if own is not None and cycle_key(config, own.shards, taken, number) == last["key"]:
            return last, own
    shards = inputs.shards
    key = cycle_key(config, shards, taken, number)
    outcome = None if last is None or last["key"] != key else last["outcome"]
    if outcome is not None and outcome["state"] != SUPERSEDED:
        return _nothing_new(registry, outcome)
    champion = registry.champion()
    known = (
        set[str]()
        if champion is None
        else input_hashes(registry.storage, champion["lineage"]["preprocess"])
    )
    new = {s.name: s.sha256 for s in shards if s.sha256 not in known}
    if not new:
        _supersede(registry, last)
        return _nothing_new(registry, None)
    evaluation = pin_first(registry) if registry.records("versions", last=1) else None
    start = None
    if evaluation is not None:
        check_comparable(registry, config, champion, evaluation)
        start = None if champion is None else start_from(config, champion)
    _supersede(registry, last)
    cycle = begin_cycle(
        registry,
        {
            "key": key,
            "shards": {shard.name: shard.sha256 for shard in shards},
            "files": loose_files(shards),
            "new": new,
            "champion": champion and champion["number"],
            "start": start and {"training": start.training, "weights": start.weights},
            "evaluation": 0 if evaluation is None else evaluation["number"],
        },
    )
    return cycle, inputs


def _supersede(registry: Registry, last: Mapping[str, Any] | None) -> None:
    """Ends the last cycle where it is not over: no call will go on with it."""
    if last is not None and last["outcome"] is None:
        sentence = (
            "Cut short, and superseded: the input or the settings are others now. What it promoted "
            "stays"
        )
        end_cycle(registry, last["number"], _outcome(SUPERSEDED, sentence, ()))


def cycle_key(
    config: Config, shards: Sequence[InputShard], taken: set[str], evaluation: int
) -> str:
    """The same for the same input under the same settings: such a cycle is done once.

    Args:
        config: the whole config.
        shards: the input shards with their hashes.
        taken: the hashes of the shards and loose files that a person took in.
        evaluation: the number of the pinned one.
    """
    steps = make_steps(config, shards, evaluation=evaluation)
    settings = {step.name: dict(step.settings) for step in steps if step.name in KEYED_BY}
    hashes = {thing.sha256 for shard in shards for thing in (shard, *shard.files)}
    present = sorted(sha256 for sha256 in taken if sha256 in hashes)
    return hash_json([settings, config.retrain.model_dump(mode="json"), present])


def _go_through(
    registry: Registry,
    config: Config,
    inputs: Inputs,
    cycle: Mapping[str, Any],
    observer: Observer,
    on_plan: Callable[[Plan], None],
    command: str,
) -> Cycle:
    shards, basis = inputs.shards, _basis_of(registry, cycle, inputs)
    if cycle["champion"] is not None and config.retrain.num_steps is not None:
        train = config.train.model_copy(update={"num_steps": config.retrain.num_steps})
        config = config.model_copy(update={"train": train})
    _tell(observer, f"cycle {cycle['number']}: {_said(list(cycle['new']))} new or changed")
    if basis.pinned and (differing := _unused_features(config, shards, basis)):
        _tell(
            observer,
            f"{', '.join(differing)} is not that of evaluation {basis.evaluation}, which the model "
            "pins and which scores this cycle; `raydiffusion accept-reference CONFIG` would pin it",
        )
    with contextlib.ExitStack() as stack:
        with failure_is_told(config, observer):
            planned = make_plan(config, basis=basis)
            if not planned.is_cached:
                checks = before_ray(
                    config, registry.storage, trains=True, draws=True, series=planned.series
                )
                require(checks)
                stack.enter_context(connect(config))  # one Ray for all of the cycle
            held, unjudged = screen(registry, config, shards, cycle, basis, observer)
        facts: dict[str, Any] = {
            "number": cycle["number"],
            "new": tuple(cycle["new"]),
            "held": tuple(held),
            "unjudged": tuple(unjudged),
        }
        if _is_all_held(registry, shards, cycle, held):
            reasons = "; ".join(f"{record['shard']}: {record['reason']}" for record in held)
            sentence = (
                f"All that is new is held, and nothing was trained ({reasons}). Look at it; "
                "`--accept-held SHARD` takes a shard in"
            )
            ended = _outcome("held", sentence, held)
            end_cycle(registry, cycle["number"], ended)
            tell_refusal(config, observer, f"{sentence}.", {"held": ended["held"]})
            return Cycle("held", f"{sentence}.", **facts)
        shards = leave_out(shards, hashes_of(held))
        basis = replace(basis, inputs=Inputs(shards, inputs.ignored))
        if basis.pinned:
            with failure_is_told(config, observer):
                new = [shard for shard in shards if shard.name in cycle["new"]]
                check_classes(registry.storage, config, new, basis, observer=observer)
                score_champion(registry, config, basis, observer=observer)
        outcome = run_config(
            config, observer=observer, on_plan=on_plan, basis=basis, command=command
        )
        if basis.pinned:
            with failure_is_told(config, observer):  # another may have been promoted meanwhile
                score_champion(registry, config, basis, observer=observer)
    with failure_is_told(config, observer):
        version = outcome.manifests["promote"]["metrics"]["version"]
        # The step may have been done before, and another promoted or this one rolled back since.
        verdict = _ask(registry, version, config)
        state: State = "promoted" if verdict.is_promoted else "asks" if verdict.asks else "kept"
        said = {
            "promoted": "is the champion",
            "asks": "waits for a decision",
            "kept": "is kept, and the champion stays",
        }[state]
        sentence = f"Version {version} of {registry.name} {said}: {verdict.reason}"
        ended = _outcome(state, sentence, held, version, outcome.plan.run)
        end_cycle(registry, cycle["number"], ended)
    return Cycle(state, f"{sentence}.", version=version, outcome=outcome, **facts)


def _ask(registry: Registry, version: int, config: Config) -> "Verdict":
    from pipeline.gate import ask  # torch: not where nothing is new

    return ask(registry, version, config.promote)


def _outcome(
    state: str,
    sentence: str,
    held: Sequence[Mapping[str, Any]],
    version: int | None = None,
    run: str | None = None,
) -> dict[str, Any]:
    shown = [{name: record[name] for name in ("shard", "sha256", "reason")} for record in held]
    return {"state": state, "sentence": sentence, "version": version, "run": run, "held": shown}


def _nothing_new(registry: Registry, outcome: Mapping[str, Any] | None) -> Cycle:
    sentence = "Nothing new: no input shard that the champion was not trained on"
    if outcome is not None:
        sentence = f"Nothing new since cycle {outcome['number']}"
        if (became := _BECAME.get(outcome["state"])) is None:
            sentence += f" ({outcome['sentence']})"
        else:  # others may have been promoted since
            champion = registry.champion()
            now = f"the champion is version {champion['number']}" if champion else "it has none"
            sentence += f", when version {outcome['version']} of {registry.name} {became}; {now}"
    return Cycle("nothing_new", f"{sentence}.", held=tuple(held_shards(registry)))


def _basis_of(registry: Registry, cycle: Mapping[str, Any], inputs: Inputs) -> Basis:
    """What a cycle was begun with; nothing is pinned for the first training of a model."""
    if not cycle["evaluation"]:
        return Basis({}, inputs=inputs)
    evaluation = registry.evaluations()[cycle["evaluation"] - 1]
    start = None if cycle["start"] is None else Start(**cycle["start"])
    pinned = pinned_manifests(registry.storage, evaluation)
    return Basis(pinned, start, evaluation["number"], inputs)


def _is_all_held(
    registry: Registry,
    shards: Sequence[InputShard],
    cycle: Mapping[str, Any],
    held: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether nothing that the champion was not trained on is left without what is held."""
    known = set[str]()
    if cycle["champion"] is not None:
        lineage = registry.version(cycle["champion"])["lineage"]
        known = input_hashes(registry.storage, lineage["preprocess"])
    return bool(held) and {s.sha256 for s in leave_out(shards, hashes_of(held))} <= known


def _unused_features(config: Config, shards: Sequence[InputShard], basis: Basis) -> list[str]:
    """Settings of the extractor that are not those of the pinned one."""
    (step,) = (step for step in make_steps(config, shards) if step.name == "features")
    theirs = basis.pinned["features"]["identity"]["settings"]
    return [name for name, value in step.settings.items() if theirs.get(name, value) != value]


def _said(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _tell(observer: Observer, text: str) -> None:
    observer(Event("note", "retrain", {"text": text}))
