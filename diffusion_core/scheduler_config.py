"""Diffusers' `scheduler_config.json`: read into a schedule and an objective, and written.

A config is a dictionary here; its file is the caller's business. Read are the schedulers whose
sampler is one of ours. A setting that we cannot honour is refused with the reason, and so is a
key that is not known, since it may change the images.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from diffusion_core.objectives import Objective, check_objective
from diffusion_core.samplers import Variance
from diffusion_core.schedules import NoiseSchedule, Option, make_schedule
from diffusion_core.timesteps import Spacing, make_timesteps

Sampler = Literal["ddpm", "ddim", "dpmpp_2m"]

BETAS_RTOL = 1e-7  # diffusers keeps betas in float32, whose rounding is 6e-8

_OBJECTIVES: dict[str, Objective] = {
    "epsilon": "pred_noise",
    "sample": "pred_x0",
    "v_prediction": "pred_v",
}
_VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",  # the same number, by way of its logarithm
    "fixed_large": "fixed_large",
    "learned_range": "learned",
}
_SAMPLERS: dict[str, Sampler] = {
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}

# What diffusers assumes where a file has no such key.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading"}
_OWN_DEFAULTS: dict[Sampler, dict[str, Any]] = {
    "ddpm": {**_DEFAULTS, **_CLIPPING, "variance_type": "fixed_small"},
    "ddim": {**_DEFAULTS, **_CLIPPING, "set_alpha_to_one": True},
    "dpmpp_2m": {
        **_DEFAULTS,
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,  # both are moot: a last step to zero noise is first order
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": float("-inf"),
        "variance_type": None,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
}
_METADATA = {"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"}
# What diffusers ignores in a file of another class: left over from a conversion.
_LEFT_OVER = {"skip_prk_steps"}.union(*_OWN_DEFAULTS.values())

_ONLY: dict[str, tuple[Any, str]] = {
    "thresholding": (False, "dynamic thresholding is not one of our clippings"),
    "set_alpha_to_one": (True, "our samplers end in the data, not at the noise of step 0"),
    "solver_order": (2, "our multistep sampler is of the second order"),
    "algorithm_type": ("dpmsolver++", "our multistep sampler is DPM-Solver++"),
    "solver_type": ("midpoint", "our multistep sampler has the midpoint form"),
    "final_sigmas_type": ("zero", "our samplers end in the data"),
    "lambda_min_clipped": (float("-inf"), "our samplers start where the timesteps do"),
    "use_karras_sigmas": (False, "our samplers visit training timesteps"),
    "use_exponential_sigmas": (False, "our samplers visit training timesteps"),
    "use_beta_sigmas": (False, "our samplers visit training timesteps"),
    "use_lu_lambdas": (False, "our samplers visit training timesteps"),
    "use_flow_sigmas": (False, "our samplers visit training timesteps"),
    "use_dynamic_shifting": (False, "it belongs to flow matching"),
}


@dataclass(frozen=True)
class SchedulerSettings:
    """What a scheduler config says, in our terms.

    Our samplers, given `timesteps`, draw what diffusers draws, with two exceptions. Diffusers'
    DDIM clips as ours only with `use_clipped_model_output`, and steps past its own timesteps with
    `linspace`, or with `trailing` where num_steps does not divide T. Its ancestral sampler adds
    noise to the last step with `fixed_large` or `learned` variance where that is above t = 0.

    Args:
        schedule: with the rescale to zero terminal SNR applied, where the config asks for it.
        schedule_name: what `make_schedule` was called with, together with `schedule_options`.
        schedule_options: the options of that name.
        objective: what the network predicts.
        sampler: the one that the config's class is.
        spacing: of the sampler's timesteps.
        steps_offset: added to `leading` timesteps.
        clip_x_start: whether the predicted clean data is clamped to [-1, 1].
        variance: of ancestral steps; `learned` is of a network that puts it out.
    """

    schedule: NoiseSchedule
    schedule_name: str
    schedule_options: Mapping[str, Option]
    objective: Objective
    sampler: Sampler
    spacing: Spacing
    steps_offset: int
    clip_x_start: bool
    variance: Variance

    def timesteps(self, num_steps: int) -> list[int]:
        """The descending timesteps that diffusers visits, for a sampler's `timesteps`.

        One step of `leading` or `linspace` is [T - 1]; diffusers' ancestral and DDIM samplers
        then take pure noise for step 0.

        Raises:
            ValueError: num_steps out of range, or an offset that leaves it.
        """
        T = self.schedule.num_train_timesteps  # noqa: N806  (the field's name for it)
        if self.spacing == "trailing":
            return make_timesteps(T, num_steps, "trailing").tolist()
        counts_the_end = self.sampler == "dpmpp_2m"  # as a step, which it does not visit
        if counts_the_end and not 1 <= num_steps < T:
            raise ValueError(
                f"num_steps must be between 1 and {T - 1} with {self.spacing} timesteps of "
                f"DPM-Solver++, got {num_steps}. Lower num_steps."
            )
        steps = make_timesteps(T, num_steps + counts_the_end, self.spacing).tolist()
        steps = steps[:num_steps]
        if self.spacing == "leading" and steps != [T - 1]:
            steps = [t + self.steps_offset for t in steps]
        if steps[0] >= T:
            raise ValueError(
                f"steps_offset = {self.steps_offset} leads beyond the last timestep {T - 1} with "
                f"num_steps = {num_steps}. Lower num_steps."
            )
        return steps


def read_scheduler_config(config: Mapping[str, Any]) -> SchedulerSettings:
    """Reads a diffusers scheduler config.

    Args:
        config: of `DDPMScheduler`, `DDIMScheduler` or `DPMSolverMultistepScheduler`, as
            `save_pretrained` writes it. Missing keys have the defaults of that class.

    Raises:
        ValueError: another class, a setting that none of our samplers honours, a key that is not
            known, or values that make no schedule.

    Warns:
        UserWarning: as `make_schedule`.
    """
    sampler = _read_class(config)
    defaults = _OWN_DEFAULTS[sampler]
    unknown = sorted(set(config) - set(defaults) - _LEFT_OVER - _METADATA)
    if unknown:
        raise ValueError(
            f"scheduler config: {', '.join(unknown)} is not known here and may change the images. "
            "Remove it if it does not, or write the config with a diffusers up to 0.42."
        )
    values = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in values.items():
        _check_kind(key, value, defaults[key])
    for key, (only, reason) in _ONLY.items():
        if key in values and values[key] != only:
            raise ValueError(
                f"scheduler config: {key} = {json.dumps(values[key])} cannot be honoured: "
                f"{reason}. Set it to {json.dumps(only)} if that serves."
            )
    clips = bool(values.get("clip_sample", False))
    if clips and values["clip_sample_range"] != 1:
        raise ValueError(
            f"scheduler config: clip_sample_range = {values['clip_sample_range']} cannot be "
            "honoured: our samplers clip to [-1, 1]. Set it to 1, or clip_sample to false."
        )
    if values["steps_offset"] < 0:
        raise ValueError(
            f"scheduler config: steps_offset must not be negative, got {values['steps_offset']}. "
            "0 is the usual value."
        )
    name, options = _name_schedule(values)
    schedule = _make_schedule(values)
    objective = _look_up(_OBJECTIVES, "prediction_type", values)
    check_objective(schedule, objective)
    has_variance = values.get("variance_type") is not None
    return SchedulerSettings(
        schedule=schedule,
        schedule_name=name,
        schedule_options=options,
        objective=objective,
        sampler=sampler,
        spacing=_look_up({name: name for name in get_args(Spacing)}, "timestep_spacing", values),
        steps_offset=values["steps_offset"],
        clip_x_start=clips,
        variance=_look_up(_VARIANCES, "variance_type", values) if has_variance else "fixed_small",
    )


def make_scheduler_config(
    schedule: NoiseSchedule,
    objective: Objective,
    *,
    spacing: Spacing = "trailing",
    clip_x_start: bool = True,
) -> dict[str, Any]:
    """A `DDIMScheduler` config with the same betas, which diffusers loads.

    The schedule goes by name where diffusers has one for exactly these betas, otherwise as
    `trained_betas`.

    Args:
        schedule: a variance-preserving one.
        objective: what the network predicts.
        spacing: of the sampler's timesteps.
        clip_x_start: clamp the predicted clean data to [-1, 1].

    Raises:
        ValueError: a schedule or an objective that diffusers' DDIM has no form of.
    """
    if objective == "pred_flow" or not schedule.is_variance_preserving:
        raise ValueError(
            f"diffusers' DDIM knows no flow: it takes variance-preserving schedules and predicts "
            f"epsilon, sample or v_prediction, got schedule {schedule.name!r} with {objective!r}, "
            "and its flow-matching schedulers count time otherwise. Train with pred_v and cosine "
            "to export."
        )
    check_objective(schedule, objective)
    prediction_types = {ours: theirs for theirs, ours in _OBJECTIVES.items()}
    return {
        "_class_name": "DDIMScheduler",
        **_OWN_DEFAULTS["ddim"],
        **_name_betas(schedule),
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": prediction_types[objective],
        "timestep_spacing": spacing,
        "clip_sample": clip_x_start,
    }


def _read_class(config: Mapping[str, Any]) -> Sampler:
    name = config.get("_class_name")
    if name in _SAMPLERS:
        return _SAMPLERS[name]
    known = ", ".join(_SAMPLERS)
    if not isinstance(name, str):
        raise ValueError(
            f"scheduler config: _class_name must name one of {known}, got {name!r}. Give a "
            "scheduler_config.json as diffusers saves it."
        )
    if name.startswith("FlowM"):
        raise ValueError(
            f"scheduler config: {name} is of flow matching, with continuous noise levels that are "
            "shifted by resolution, which our schedules of training timesteps do not express. Use "
            "the schedule lerp and the objective pred_flow for a training of your own."
        )
    raise ValueError(
        f"scheduler config: {name} is no sampler of ours; we read {known}. Convert it in diffusers "
        "with DDIMScheduler.from_config if only its schedule matters."
    )


def _check_kind(key: str, value: Any, default: Any) -> None:
    kinds: tuple[type, ...]
    match default:
        case bool():
            kinds = (bool,)
        case int():
            kinds = (int,)
        case float():
            kinds = (int, float)
        case str():
            kinds = (str,)
        case _:  # None, of a list of betas or of a variance_type
            kinds = (list, type(None)) if key == "trained_betas" else (str, type(None))
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    if isinstance(value, list):
        wrong = wrong or not all(type(beta) in (int, float) for beta in value)
    if wrong:
        raise ValueError(
            f"scheduler config: {key} must be like {default!r}, got {value!r:.60}. Mend the file."
        )


def _name_schedule(values: Mapping[str, Any]) -> tuple[str, dict[str, Option]]:
    """Name and options for `make_schedule`."""
    if values["trained_betas"] is not None:
        return "trained_betas", {"betas": values["trained_betas"]}
    ends: dict[str, Option] = {key: values[key] for key in ("beta_start", "beta_end")}
    match values["beta_schedule"]:
        case "linear":
            return "linear", {**ends, "scale_to_T": False}
        case "scaled_linear":
            return "scaled_linear", ends
        case "squaredcos_cap_v2":
            return "cosine", {}
        case "sigmoid":
            return "logistic", ends
        case other:
            raise ValueError(
                f"scheduler config: beta_schedule must be linear, scaled_linear, "
                f"squaredcos_cap_v2 or sigmoid, got {other!r}. Save its betas as trained_betas."
            )


def _make_schedule(values: Mapping[str, Any]) -> NoiseSchedule:
    name, options = _name_schedule(values)
    schedule = make_schedule(name, values["num_train_timesteps"], **options)
    return schedule.zero_terminal_snr() if values["rescale_betas_zero_snr"] else schedule


def _look_up(known: Mapping[str, Any], key: str, values: Mapping[str, Any]) -> Any:
    if values[key] not in known:
        raise ValueError(
            f"scheduler config: {key} must be one of {', '.join(known)}, got {values[key]!r}. We "
            "have no counterpart of others."
        )
    return known[values[key]]


def _name_betas(schedule: NoiseSchedule) -> dict[str, Any]:
    """Diffusers' name for exactly these betas, or the betas themselves."""
    betas, is_rescaled = schedule.betas, schedule.has_zero_terminal_snr
    # Rescaling hides the ends of the range: then only the usual ones are tried.
    own = (float(f"{betas[0]:.12g}"), float(f"{betas[-1]:.12g}"))
    k = 1000 / schedule.num_train_timesteps
    tried = [("squaredcos_cap_v2", (1e-4, 0.02))]
    if is_rescaled:
        tried += [("linear", (1e-4, 0.02)), ("linear", (k * 1e-4, k * 0.02))]
        tried += [("scaled_linear", (0.00085, 0.012))]
    else:
        tried += [("linear", own), ("scaled_linear", own)]
    for name, (beta_start, beta_end) in tried:
        values = {"beta_schedule": name, "beta_start": beta_start, "beta_end": beta_end}
        values["rescale_betas_zero_snr"] = is_rescaled
        values["num_train_timesteps"] = len(betas)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the schedule at hand has had its say
                found = _make_schedule({**_DEFAULTS, **values})
        except ValueError:
            continue
        if torch.allclose(found.betas, betas, rtol=BETAS_RTOL, atol=0):
            return values
    return {"trained_betas": betas.tolist()}
