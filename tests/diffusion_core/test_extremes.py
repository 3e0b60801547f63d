"""The ends of every range: one step, no signal at the last, half precision, odd layouts, NaN."""

import pytest
import torch
from torch import Tensor

from diffusion_core import (
    Diffusion,
    NoiseSchedule,
    make_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
)
from diffusion_core.objectives import OBJECTIVES, Objective

SAMPLERS = {
    "ddim": sample_ddim,
    "ddim eta 1": lambda *a, **k: sample_ddim(*a, **k, eta=1.0, generator=torch.Generator()),
    "ddpm": lambda *a, **k: sample_ddpm(*a, **k, generator=torch.Generator()),
    "ddpm large": lambda *a, **k: sample_ddpm(
        *a, **k, variance="fixed_large", generator=torch.Generator()
    ),
    "dpmpp_2m": sample_dpmpp_2m,
}
SCHEDULES = {
    "cosine": make_schedule("cosine", 50),
    "zero terminal SNR": make_schedule("cosine", 50).zero_terminal_snr(),
    "lerp": make_schedule("lerp", 50),
    "T = 1": make_schedule("cosine", 1),
    "T = 2": make_schedule("cosine", 2),
    "T = 2, zero terminal SNR": make_schedule("cosine", 2).zero_terminal_snr(),
}


def is_valid(schedule: NoiseSchedule, objective: str) -> bool:
    if objective == "pred_flow":
        return schedule.name == "lerp"
    return objective != "pred_noise" or not schedule.has_zero_terminal_snr


def wobble(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_sampler_from_the_last_step_and_into_the_data(
    sampler: str, name: str, objective: Objective
) -> None:
    schedule = SCHEDULES[name]
    if not is_valid(schedule, objective):
        return
    T = schedule.num_train_timesteps
    x_T = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for num_steps in sorted({1, 2, T} & set(range(1, T + 1))):
        for spacing in ("leading", "trailing", "linspace"):
            x = SAMPLERS[sampler](
                Diffusion(schedule, objective), wobble, x_T, num_steps=num_steps, spacing=spacing
            )
            assert bool(torch.isfinite(x).all()), (num_steps, spacing)
            assert float(x.abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cosine", "zero terminal SNR", "lerp"])
def test_half_precision_samples_are_those_of_float32(
    sampler: str, dtype: torch.dtype, name: str
) -> None:
    # abar of the cosine's last step is 2e-9, which is 0 in float16.
    diffusion = Diffusion(SCHEDULES[name], "pred_v")
    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return torch.tanh(x)

    got = SAMPLERS[sampler](diffusion, model, x_T, num_steps=5)
    assert got.dtype == dtype
    assert set(seen) == {dtype}
    whole = SAMPLERS[sampler](diffusion, model, x_T.float(), num_steps=5)
    assert torch.allclose(got.float(), whole, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "objective"), [("cosine", "pred_noise"), ("lerp", "pred_flow")])
def test_half_precision_loss_is_that_of_float32(
    dtype: torch.dtype, name: str, objective: Objective
) -> None:
    diffusion = Diffusion(SCHEDULES[name], objective)
    g = torch.Generator().manual_seed(0)
    x_start = torch.rand(50, 1, 4, 4, generator=g) * 2 - 1
    noise, t = torch.randn(x_start.shape, generator=g), torch.arange(50)
    whole = diffusion.loss(lambda x, _: x.tanh(), x_start, t=t, noise=noise)
    got = diffusion.loss(lambda x, _: x.tanh(), x_start.to(dtype), t=t, noise=noise.to(dtype))
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(whole), rel=0.01)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "batch of 1"])
def test_layouts_do_not_change_the_numbers(layout: str) -> None:
    diffusion = Diffusion(SCHEDULES["cosine"], "pred_v")
    g = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 3, 6, 8, generator=g).clamp(-1, 1) for _ in range(2))
    t = torch.tensor([0, 10, 30, 49])

    def arrange(x: Tensor) -> Tensor:
        match layout:
            case "channels_last":
                return x.contiguous(memory_format=torch.channels_last)
            case "transposed":
                return x.mT.contiguous().mT
            case "strided":
                return x.repeat_interleave(2, dim=3)[..., ::2]
            case _:
                return x

    rows = slice(1, 2) if layout == "batch of 1" else slice(None)
    plain = diffusion.loss_per_sample(wobble, x_start, t=t, noise=noise)[rows]
    got = diffusion.loss_per_sample(
        wobble, arrange(x_start)[rows], t=t[rows], noise=arrange(noise)[rows]
    )
    assert torch.allclose(got, plain, rtol=1e-6)
    for sampler in SAMPLERS.values():
        if layout == "batch of 1" and sampler is not sample_ddim:
            continue  # the others draw for the whole batch
        expected = sampler(diffusion, wobble, noise, num_steps=4)[rows]
        assert torch.allclose(
            sampler(diffusion, wobble, arrange(noise)[rows], num_steps=4), expected, atol=1e-6
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_at_the_loss(bad: float) -> None:
    x_start = torch.zeros(2, 1, 4, 4)
    x_start[1, 0, 2, 3] = bad
    with pytest.raises(ValueError, match="x_start holds values that are not finite"):
        Diffusion(SCHEDULES["cosine"]).loss(wobble, x_start)
