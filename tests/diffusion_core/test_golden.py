"""The core against values derived in 50-digit decimals by `golden/derive.py`."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_core import Diffusion, NoiseSchedule, make_schedule, make_timesteps, sample_ddim
from diffusion_core.objectives import Objective, loss_weights
from diffusion_core.posterior import posterior

GOLDEN = Path(__file__).parent / "golden"
VALUES = json.loads((GOLDEN / "values.json").read_text())
OPTIONS = {
    "linear": {"beta_start": 0.002, "beta_end": 0.4, "scale_to_T": False},
    "scaled_linear": {"beta_start": 0.002, "beta_end": 0.4},
    "logistic": {"beta_start": 0.002, "beta_end": 0.4},
}


def make(name: str) -> NoiseSchedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some do not reach noise with these options
        if name == "linear, zero terminal SNR":
            return make("linear").zero_terminal_snr()
        return make_schedule(name, 20, **OPTIONS.get(name, {}))


def numbers(texts: list[str]) -> Tensor:
    return torch.tensor([float(text) for text in texts], dtype=torch.float64)


def test_the_values_are_what_the_script_derives() -> None:
    spec = importlib.util.spec_from_file_location("derive", GOLDEN / "derive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.derive() == VALUES


@pytest.mark.parametrize("name", VALUES["scales"])
def test_schedules(name: str) -> None:
    schedule = make(name)
    signal, noise = map(numbers, VALUES["scales"][name])
    assert torch.allclose(schedule.signal_scale, signal, rtol=1e-11, atol=1e-14)
    assert torch.allclose(schedule.noise_scale, noise, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", VALUES["posteriors"])
def test_posteriors_adjacent_and_skipping(name: str) -> None:
    schedule = make(name)
    for steps, expected in VALUES["posteriors"][name].items():
        t, t_prev = map(int, steps.split())
        got = posterior(schedule, t, t_prev)
        found = torch.tensor([got.on_x_t, got.on_x_start, got.variance], dtype=torch.float64)
        assert torch.allclose(found, numbers(expected), rtol=1e-9, atol=1e-14), steps


@pytest.mark.filterwarnings("ignore:weighting '(min_)?snr' gives weight 0")
@pytest.mark.parametrize("name", VALUES["weights"])
def test_weights(name: str) -> None:
    schedule = make(name)
    for key, expected in VALUES["weights"][name].items():
        objective, weighting = key.split()
        got = loss_weights(schedule, objective, weighting)
        assert torch.allclose(got, numbers(expected), rtol=1e-9, atol=1e-14), key


@pytest.mark.parametrize("key", VALUES["timesteps"])
def test_timesteps(key: str) -> None:
    spacing, num_steps = key.split()
    got = make_timesteps(20, int(num_steps), spacing)  # pyright: ignore[reportArgumentType]
    assert got.tolist() == VALUES["timesteps"][key]


@pytest.mark.parametrize("key", VALUES["ddim"])
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v", "pred_flow"])
def test_ten_step_ddim_state_by_state(key: str, objective: Objective) -> None:
    name, spacing, clip = key.split("|")
    schedule = make(name)
    if (objective == "pred_noise" and schedule.has_zero_terminal_snr) or (
        (objective == "pred_flow") != (name == "lerp") and objective == "pred_flow"
    ):
        return  # refused, as test_conformance.py shows
    diffusion = Diffusion(schedule, objective)

    def model(x: Tensor, t: Tensor) -> Tensor:
        x_start = 1.3 * x - 0.4 * x**3 / 3 + t[:, None] / 50
        a, b = (s[t][:, None] for s in (schedule.signal_scale, schedule.noise_scale))
        return diffusion.target(x_start, t, (x - a * x_start) / b)

    states = []
    sample_ddim(
        diffusion,
        model,
        torch.full((1, 1), 1.7, dtype=torch.float64),
        num_steps=10,
        spacing=spacing,  # pyright: ignore[reportArgumentType]
        clip_x_start=clip == "clipped",
        on_step=lambda k, x: states.append(float(x)),
    )
    expected = numbers(VALUES["ddim"][key])
    assert torch.allclose(torch.tensor(states, dtype=torch.float64), expected, rtol=1e-9)
