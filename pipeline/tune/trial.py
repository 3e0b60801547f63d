"""One trial: a short training with the project's own loop, scored at the rungs on its way.

It knows no Ray Tune: it is told what to do with each score. Killed, it continues from its last
checkpoint, and a score that was made is not made again. How trials are spread over a cluster is in
`scheduling.py`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from pipeline.checkpoints import CheckpointStore
from pipeline.config import override_config
from pipeline.leases import hold_lease
from pipeline.loop import Hooks
from pipeline.settings import Config
from pipeline.steps import train_settings
from pipeline.storage import Storage
from pipeline.train import train_in_process
from pipeline.tune.records import Rung, TrialStore
from pipeline.tune.scoring import Inputs, metric_name, open_score, trial_protocol
from pipeline.tune.workers import make_scorer, train_with_workers
from pipeline.workflow import hash_json

VERSION = 1  # raised when a trial makes something else of the same config
INPUTS = ("preprocess", "features", "reference")

OnRung = Callable[[Rung, bool], None]


def trial_config(config: Config, overrides: Sequence[str]) -> Config:
    """The config of a trial: the base with its choice, for a trial's time and protocol.

    Args:
        config: the base.
        overrides: of the choice.

    Raises:
        ConfigError: the choice is no valid config.
    """
    resolved = override_config(config, overrides)
    # As many as it takes to lose a third of a trial to a kill, with ASHA's usual factor.
    *early, last = rung_steps(config)
    train = {
        "num_steps": config.trial_steps,
        "checkpoint_every": min(resolved.train.checkpoint_every, max(early, default=last)),
        "keep_every": None,
        "validate_every": None,
        "sample_every": None,
        "fid_every": None,
    }
    num_steps = config.tune.num_steps or config.evaluate.num_steps
    return resolved.model_copy(
        update={
            "train": resolved.train.model_copy(update=train),
            "evaluate": resolved.evaluate.model_copy(update={"num_steps": num_steps}),
        }
    )


def rung_steps(config: Config) -> list[int]:
    """The steps at which a trial is scored, ascending: ASHA's rungs and the end.

    The last rung leaves as many times more to train as there is between two: who was stopped just
    before the end would have cost all, and could be no finalist.

    Args:
        config: the base.
    """
    tune, last = config.tune, config.trial_steps
    if tune.stopping == "none":
        return [last]
    rung, rungs = grace_steps(config), []
    while rung * tune.reduction_factor <= last:
        rungs.append(rung)
        rung *= tune.reduction_factor
    return [*rungs, last]


def grace_steps(config: Config) -> int:
    """The steps before a trial can be stopped."""
    tune = config.tune
    if tune.grace_images is not None:
        return max(1, tune.grace_images // config.train.global_batch_size)
    return max(1, config.trial_steps // tune.reduction_factor**2)


def trial_identity(config: Config, inputs: Inputs) -> dict[str, Any]:
    """What determines a trial, as JSON; its hash is the trial's key.

    Args:
        config: of the trial.
        inputs: the manifests of `preprocess`, `features` and `reference`.
    """
    return {
        "step": "trial",
        "version": VERSION,
        "settings": train_settings(config),
        "num_steps": config.train.num_steps,
        "metric": metric_name(config, inputs),
        "protocol": trial_protocol(config, inputs),
        "inputs": {name: inputs[name]["key"] for name in INPUTS},
    }


def trial_key(config: Config, inputs: Inputs) -> str:
    """The name of a trial below `steps/trial`."""
    return hash_json(_as_json(trial_identity(config, inputs)))


def run_trial(
    config: Config,
    storage: Storage,
    inputs: Inputs,
    rungs: Sequence[int],
    on_rung: OnRung,
) -> None:
    """Trains and scores, from where an earlier attempt was killed.

    Args:
        config: of the trial; see `trial_config`.
        storage: the root.
        inputs: the manifests of `preprocess`, `features` and `reference`.
        rungs: the steps at which it is scored.
        on_rung: told each score, old ones first, and whether the trial has gone on from there
            already; what it raises ends the trial.

    Raises:
        TrainingError: the loss was not finite, too often.
        EvaluationError: there is no finite score.
    """
    identity = trial_identity(config, inputs)
    directory = f"steps/trial/{hash_json(_as_json(identity))}"
    store = TrialStore(storage, directory)
    if not store.is_finished:
        with hold_lease(storage, directory, is_done=lambda: store.is_finished) as is_held:
            if is_held and not store.is_finished:
                _train(config, storage, inputs, store, rungs, on_rung, identity)
                return
    # Of another experiment, or of an attempt whose driver was killed.
    for rung in _of_these(store.rungs(), rungs):
        on_rung(rung, rung.step < config.train.num_steps)


def _train(
    config: Config,
    storage: Storage,
    inputs: Inputs,
    store: TrialStore,
    rungs: Sequence[int],
    on_rung: OnRung,
    identity: Mapping[str, Any],
) -> None:
    reached = max(CheckpointStore(storage, store.directory).steps(), default=0)
    told: dict[int, Rung] = {}

    def tell(rung: Rung) -> None:
        told[rung.step] = rung
        if rung.step == config.train.num_steps:
            scores = [asdict(told[step]) for step in sorted(told)]
            store.finish({"identity": _as_json(identity), "rungs": scores})
        on_rung(rung, rung.step < reached)

    for rung in _of_these(store.rungs(), rungs):
        tell(rung)
    if config.train.num_steps in told:  # the kill came between the last score and the manifest
        return
    if config.train.max_workers > 1:
        train_with_workers(config, storage, inputs, store.directory, rungs, told.keys(), tell)
        return
    with open_score(config, storage, inputs) as score:
        scorer = make_scorer(config, store, score, rungs)

        def score_and_tell(step: int, model: nn.Module) -> None:
            if (rung := scorer(step, model)) is not None and step not in told:
                tell(rung)

        train = config.train.model_copy(update={"fid_every": math.gcd(*rungs)})
        train_in_process(
            config.model_copy(update={"train": train}),
            storage,
            store.directory,
            dict(inputs["preprocess"]),
            hooks=Hooks(on_fid=score_and_tell),
            device=_device(config),
        )


def _of_these(found: Sequence[Rung], steps: Sequence[int]) -> list[Rung]:
    """Those at these steps: another experiment may have scored the same trial at others as well."""
    return [rung for rung in found if rung.step in steps]


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if config.train.use_gpu else "cpu")


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(identity))
