"""Diffusers' scheduler configs: the same betas, timesteps and images there and here.

What diffusers does is recorded in `fixtures/` by `make_scheduler_fixtures.py`.
"""

import json
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core import (
    Diffusion,
    NoiseSchedule,
    make_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
)
from diffusion_core.objectives import OBJECTIVES
from diffusion_core.scheduler_config import (
    SchedulerSettings,
    make_scheduler_config,
    read_scheduler_config,
)

FIXTURES = Path(__file__).resolve().parent / "fixtures"
CASES = json.loads((FIXTURES / "scheduler_cases.json").read_text())
WRITTEN = json.loads((FIXTURES / "scheduler_written.json").read_text())
RECORDED = load_file(FIXTURES / "scheduler_cases.safetensors")
SCRIPT: dict[str, Any] = runpy.run_path(str(FIXTURES / "make_scheduler_fixtures.py"))

DDIM = CASES["linear epsilon leading"]["config"]
DPM = CASES["multistep linspace"]["config"]
DDPM = CASES["linear ancestral log"]["config"]


def read(config: dict[str, Any]) -> SchedulerSettings:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some never reach noise; test_schedules has the warning
        return read_scheduler_config(config)


def sample(settings: SchedulerSettings, x_T: Tensor, num_steps: int, eta: float) -> Tensor:
    T = settings.schedule.num_train_timesteps
    analytic_model: Callable[..., Tensor] = SCRIPT["analytic_model"]
    learned = settings.variance == "learned"
    diffusion = Diffusion(settings.schedule, settings.objective, learned_variance=learned)
    timesteps = settings.timesteps(num_steps)
    clip = settings.clip_x_start
    generator = torch.Generator().manual_seed(SCRIPT["ETA_SEED"])

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return analytic_model(x_t, int(t[0]), T, learned_variance=learned)

    match settings.sampler:
        case "ddpm":
            return sample_ddpm(
                diffusion, model, x_T, timesteps=timesteps, variance=settings.variance,
                clip_x_start=clip, generator=generator,
            )  # fmt: skip
        case "ddim":
            return sample_ddim(
                diffusion, model, x_T, timesteps=timesteps, eta=eta, clip_x_start=clip,
                generator=generator,
            )  # fmt: skip
        case "dpmpp_2m":
            return sample_dpmpp_2m(diffusion, model, x_T, timesteps=timesteps, clip_x_start=clip)


@pytest.mark.parametrize("name", CASES)
def test_the_schedule_and_the_timesteps_are_diffusers(name: str) -> None:
    settings = read(CASES[name]["config"])
    theirs = RECORDED[f"{name}/alphas_cumprod"].double()
    torch.testing.assert_close(settings.schedule.alphas_cumprod, theirs, atol=2e-6, rtol=1e-4)
    timesteps = RECORDED[f"{name}/timesteps"].tolist()
    assert settings.timesteps(CASES[name]["num_steps"]) == timesteps


@pytest.mark.parametrize("name", CASES)
def test_the_images_are_diffusers(name: str) -> None:
    case, settings = CASES[name], read(CASES[name]["config"])
    x_T = SCRIPT["fixed_noise"]()
    images = sample(settings, x_T, case["num_steps"], case["eta"])
    torch.testing.assert_close(images, RECORDED[f"{name}/images"], atol=1e-4, rtol=0)


def test_diffusers_squaredcos_is_our_cosine_to_float_precision() -> None:
    recorded = RECORDED["cosine v trailing/alphas_cumprod"].double()
    ours = make_schedule("cosine", 1000).alphas_cumprod
    torch.testing.assert_close(ours, recorded, atol=0, rtol=2e-5)
    assert float(make_schedule("cosine", 1000).betas[-1]) == pytest.approx(0.999, abs=1e-12)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_has_the_same_betas_in_diffusers(name: str) -> None:
    kind, T, options, modifier = WRITTEN[name]["schedule"]
    schedule = make_schedule(kind, T, **options)
    if modifier == "shifted":
        schedule = schedule.shifted(base_resolution=32, resolution=64)
    elif modifier:
        schedule = schedule.zero_terminal_snr()
    config = make_scheduler_config(schedule, WRITTEN[name]["objective"])
    assert config == approx_deep(WRITTEN[name]["config"])
    theirs = RECORDED[f"written {name}"].double()
    torch.testing.assert_close(schedule.alphas_cumprod, theirs, atol=1e-6, rtol=2e-5)


def approx_deep(config: dict[str, Any]) -> dict[str, Any]:
    betas = config["trained_betas"]
    return config if betas is None else {**config, "trained_betas": pytest.approx(betas, rel=1e-9)}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_we_read(name: str) -> None:
    config = WRITTEN[name]["config"]
    settings = read(config)
    again = make_scheduler_config(
        settings.schedule,
        settings.objective,
        spacing=settings.spacing,
        clip_x_start=settings.clip_x_start,
    )
    assert again == approx_deep(config)


def test_exact_schedules_go_by_name_and_others_as_betas() -> None:
    named = {name: case["config"]["beta_schedule"] for name, case in WRITTEN.items()}
    given = {name for name, case in WRITTEN.items() if case["config"]["trained_betas"]}
    assert given == {
        "cosine of another s", "sigmoid", "sqrt", "logistic", "sigmoid to zero SNR",
        "cosine shifted",
    }  # fmt: skip
    assert (named["linear"], named["cosine"]) == ("linear", "squaredcos_cap_v2")
    ends = [WRITTEN["linear scaled to T"]["config"][key] for key in ("beta_start", "beta_end")]
    assert ends == [0.0004, 0.08]


def test_a_schedule_that_differs_from_its_name_is_not_called_by_it() -> None:
    cosine = make_schedule("cosine", 100)
    moved = NoiseSchedule("cosine", cosine.signal_scale * 0.999, cosine.noise_scale)
    a = moved.signal_scale
    moved = NoiseSchedule("cosine", a, (1 - a**2).sqrt())
    assert make_scheduler_config(moved, "pred_v")["trained_betas"] is not None


def test_missing_keys_have_the_defaults_of_their_class() -> None:
    ddim = read({"_class_name": "DDIMScheduler"})
    assert (ddim.sampler, ddim.spacing, ddim.clip_x_start) == ("ddim", "leading", True)
    dpm = read({"_class_name": "DPMSolverMultistepScheduler"})
    assert (dpm.sampler, dpm.spacing, dpm.clip_x_start) == ("dpmpp_2m", "linspace", False)
    assert dpm.objective == "pred_noise"
    assert dpm.schedule.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("fixed_small", "fixed_small"),
        ("fixed_small_log", "fixed_small"),
        ("fixed_large", "fixed_large"),
        ("learned_range", "learned"),
    ],
)
def test_variances(given: str, ours: str) -> None:
    assert read({**DDPM, "variance_type": given}).variance == ours


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({**DDIM, "set_alpha_to_one": False}, "set_alpha_to_one = false cannot be honoured: our"),
        ({**DDIM, "thresholding": True}, "thresholding = true cannot be honoured"),
        ({**DDIM, "clip_sample_range": 2.0}, "clip_sample_range = 2.0 cannot be honoured"),
        ({**DDIM, "prediction_type": "flow_prediction"}, "prediction_type must be one of epsilon"),
        ({**DDIM, "prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "Use pred_v"),
        ({**DDIM, "beta_schedule": "laplace"}, "beta_schedule must be linear, scaled_linear"),
        ({**DDIM, "timestep_spacing": "karras"}, "timestep_spacing must be one of leading"),
        ({**DDIM, "steps_offset": -1}, "steps_offset must not be negative"),
        ({**DDIM, "beta_end": "0.02"}, "beta_end must be like 0.02, got '0.02'"),
        ({**DDIM, "num_train_timesteps": True}, "num_train_timesteps must be like 1000, got True"),
        ({**DDIM, "trained_betas": [0.1, "x"]}, "trained_betas must be like None"),
        ({**DDIM, "trained_betas": [0.1, 0.2]}, "needs num_train_timesteps = 1000 betas, got 2"),
        ({**DDIM, "beta_end": 2.0}, "every beta must lie between 0 and 1"),
        ({**DDIM, "snr_shift_scale": 3.0}, "snr_shift_scale is not known here"),
        ({**DDPM, "variance_type": "fixed_large_log"}, "variance_type must be one of fixed_small"),
        ({**DDPM, "variance_type": "learned"}, "variance_type must be one of fixed_small"),
        ({**DPM, "solver_order": 3}, "solver_order = 3 cannot be honoured"),
        ({**DPM, "algorithm_type": "sde-dpmsolver++"}, "algorithm_type = "),
        ({**DPM, "final_sigmas_type": "sigma_min"}, "final_sigmas_type = "),
        ({**DPM, "use_karras_sigmas": True}, "our samplers visit training timesteps"),
        ({**DPM, "lambda_min_clipped": -5.1}, "lambda_min_clipped = -5.1 cannot be honoured"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of flow matching"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler is no sampler of ours"),
        ({"beta_end": 0.02}, "_class_name must name one of DDPMScheduler"),
    ],
)
def test_what_we_cannot_honour_is_refused(config: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=r"\.$") as error:
        read(config)
    assert fault in str(error.value)


def test_settings_that_say_nothing_here_are_passed_over() -> None:
    config = {
        **DDIM,
        "clip_sample": False,
        "clip_sample_range": 4.0,
        "dynamic_thresholding_ratio": 0.9,
        "skip_prk_steps": True,
        "solver_order": 3,  # of another class: diffusers does not look at it either
        "_use_default_values": ["beta_end"],
    }
    assert not read(config).clip_x_start


@pytest.mark.parametrize(
    ("objective", "schedule"),
    [("pred_flow", "lerp"), ("pred_x0", "lerp"), ("pred_v", "lerp")],
)
def test_flow_is_not_written(objective: Any, schedule: str) -> None:
    with pytest.raises(ValueError, match=r"knows no flow.*Train with pred_v and cosine"):
        make_scheduler_config(make_schedule(schedule, 100), objective)


def test_every_other_objective_is_written() -> None:
    types = {
        o: make_scheduler_config(make_schedule("cosine", 100), o)["prediction_type"]
        for o in OBJECTIVES
        if o != "pred_flow"
    }
    assert types == {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def test_timesteps_at_their_edges() -> None:
    offset = read({**DDIM, "steps_offset": 1})
    assert offset.timesteps(1) == [999]
    assert offset.timesteps(500)[-1] == 1
    with pytest.raises(ValueError, match="leads beyond the last timestep 999"):
        offset.timesteps(1000)
    with pytest.raises(ValueError, match="num_steps must be between 1 and 999"):
        read(DPM).timesteps(1000)
    assert read(DPM).timesteps(1) == [999]
