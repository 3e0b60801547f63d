"""The space of a search: how a choice is drawn, what it is as overrides, and whether it can be.

A choice is a flat dict of named values, conditional on the schedule that was drawn. It becomes the
same `a.b=c` overrides that `--set` takes, so that whatever is found can be trained by hand.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.config import override_config
from pipeline.errors import ConfigError
from pipeline.models import make_diffusion
from pipeline.settings import Config, SpaceConfig

Choice = Mapping[str, Any]
LOG_PARAMETERS = {"beta_start", "ratio", "s", "tau"}


class Trial(Protocol):
    """What draws: an `optuna.Trial`, or a stand-in."""

    def suggest_categorical(self, name: str, choices: Sequence[Any], /) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, /, *, log: bool = ...) -> float: ...


def draw(trial: Trial, space: SpaceConfig) -> dict[str, Any]:
    """Draws a choice: first the schedule, then its own parameters, then the rest.

    Args:
        trial: that draws.
        space: what is searched; what it leaves empty is not in the choice.
    """
    choice: dict[str, Any] = {}
    if space.schedule:
        choice["schedule"] = trial.suggest_categorical("schedule", space.schedule)
        for name, (low, high) in getattr(space, choice["schedule"]):
            key = f"{choice['schedule']}.{name}"
            choice[key] = trial.suggest_float(key, low, high, log=name in LOG_PARAMETERS)
    for name in ("objective", "weighting", "zero_terminal_snr"):
        if values := getattr(space, name):
            choice[name] = trial.suggest_categorical(name, values)
    if space.learning_rate is not None:
        low, high = space.learning_rate
        choice["learning_rate"] = trial.suggest_float("learning_rate", low, high, log=True)
    return choice


def schedule_options(choice: Choice) -> dict[str, float]:
    """The options of the schedule that a choice names, as `make_schedule` takes them."""
    prefix = f"{choice['schedule']}."
    options = {k.removeprefix(prefix): v for k, v in choice.items() if k.startswith(prefix)}
    if "ratio" in options:
        options["beta_end"] = options["beta_start"] * options.pop("ratio")
    return options


def to_overrides(choice: Choice) -> list[str]:
    """A choice as `section.key=value`, as `--set` takes them; values are TOML."""
    overrides = []
    if "schedule" in choice:
        options = schedule_options(choice)
        inner = ", ".join(f"{key} = {_toml(value)}" for key, value in options.items())
        overrides += [
            f"diffusion.schedule={choice['schedule']}",
            f"diffusion.schedule_options={{{inner}}}",
        ]
    for name in ("objective", "weighting"):
        if name in choice:
            overrides.append(f"diffusion.{name}={choice[name]}")
    if "zero_terminal_snr" in choice:
        overrides.append(f"diffusion.zero_terminal_snr={_toml(choice['zero_terminal_snr'])}")
    if "learning_rate" in choice:
        overrides.append(f"train.learning_rate={_toml(choice['learning_rate'])}")
    return overrides


def refusal(config: Config, overrides: Sequence[str], max_signal_left: float) -> str | None:
    """Why a choice makes no process worth training; None where it does. Nothing is trained.

    Args:
        config: the whole config.
        overrides: of the choice.
        max_signal_left: share of the variance that may be signal at the last step.
    """
    try:
        resolved = override_config(config, overrides)
    except ConfigError as error:
        return f"no valid config: {str(error).splitlines()[-1].strip()}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is judged here
            schedule = make_diffusion(resolved).schedule
    except ConfigError as error:
        return _reason(str(error))
    signal, noise = float(schedule.signal_scale[-1]) ** 2, float(schedule.noise_scale[-1]) ** 2
    left = signal / (signal + noise)
    if not math.isfinite(left):
        return "scales that are not finite"
    if left > max_signal_left:
        return f"more than {max_signal_left:g} of the signal left at the last step"
    return None


def _reason(message: str) -> str:
    """The kind of a fault that `diffusion_core` found, without the values, so that it counts."""
    kinds = {
        "not finite": "scales that are not finite",
        "must lie between 0 and 1": "a beta outside (0, 1)",
        "does not fall": "a signal or an SNR that does not fall",
        "must have noise": "no noise at the first step, or no signal before the last",
        "needs 0 < s": "s of sqrt not below 1/T",
        "cannot be computed": "a schedule that cannot be computed",
        "objective": "an objective that the schedule does not allow",
    }
    return next((kind for part, kind in kinds.items() if part in message), message)


def _toml(value: float | bool) -> str:
    return json.dumps(value)
