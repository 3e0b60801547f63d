"""Samplers: from noise to data. Pure steps taking t and t_prev, and loops over a list.

Every sampler has the same signature and the same order of body. The previous timestep is read
from the list, never recomputed with a stride; -1 is the data. Noise comes from the generator
that the caller hands in, and none is added at the last step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion_core.posterior import learned_log_variance, posterior, scales_at, variance_bounds
from diffusion_core.process import Denoiser, Diffusion, Prediction
from diffusion_core.timesteps import Spacing, make_timesteps

CHUNK = 64  # images drawn together; image k is the same however chunks are spread

Variance = Literal["fixed_small", "fixed_large", "learned"]
VARIANCES: tuple[Variance, ...] = get_args(Variance)
Generators = torch.Generator | Sequence[torch.Generator] | None
OnStep = Callable[[int, Tensor], None]


def ddpm_step(
    diffusion: Diffusion,
    x_t: Float[Tensor, "batch ..."],
    prediction: Prediction,
    t: int,
    t_prev: int,
    *,
    variance: Variance = "fixed_small",
    variance_fraction: Float[Tensor, "batch ..."] | None = None,
    noise: Float[Tensor, "batch ..."] | None = None,
) -> Float[Tensor, "batch ..."]:
    """One ancestral step: a draw from q(x_p | x_t, x_start) with the predicted x_start.

    Args:
        diffusion: the process.
        x_t: the present images.
        prediction: the network's word on them.
        t: the present timestep.
        t_prev: the next one to visit, -1 for the data.
        variance: `fixed_small` is the posterior's, `fixed_large` the step's beta, `learned` lies
            between the two by the network's word.
        variance_fraction: where between them, 0 to 1 in the logarithm; for `learned`.
        noise: standard normal, needed but at the last step.

    Raises:
        ValueError: an unknown variance, `learned` where the process has none, or no noise where
            some is needed.

    Reference: Ho et al., DDPM (2006.11239), eqs. 6-7 and section 3.2; Nichol & Dhariwal
        (2102.09672), eq. 15, for `learned`.
    """
    check_variance(diffusion, variance)
    q = posterior(diffusion.schedule, t, t_prev)
    x_prev = q.on_x_t * x_t + q.on_x_start * prediction.pred_x_start
    if t_prev < 0:
        return x_prev
    if variance != "learned" or variance_fraction is None:
        std = math.sqrt(q.variance if variance == "fixed_small" else q.beta)
        return x_prev + std * _given(noise)
    small, large = map(math.log, variance_bounds(diffusion.schedule, t, t_prev))
    return x_prev + (learned_log_variance(variance_fraction, small, large) / 2).exp() * _given(
        noise
    )


def ddim_step(
    diffusion: Diffusion,
    prediction: Prediction,
    t: int,
    t_prev: int,
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "batch ..."] | None = None,
) -> Float[Tensor, "batch ..."]:
    """One DDIM step: x_p = a_p x0 + sqrt(b_p^2 - sigma^2) noise_hat + sigma z.

    sigma^2 is eta^2 times the posterior variance; the last step (t_prev = -1) adds no noise.

    Args:
        diffusion: the process.
        prediction: the network's word on x_t.
        t: the present timestep.
        t_prev: the next one to visit, -1 for the data.
        eta: 0 is deterministic, 1 is ancestral sampling.
        noise: z, needed when eta is above 0.

    Raises:
        ValueError: eta outside [0, 1], or above 0 and no noise given.

    Reference: Song et al., DDIM (2010.02502), eqs. 12 and 16.
    """
    _check_eta(eta)
    a_prev, b_prev = scales_at(diffusion.schedule, t_prev)
    variance = eta**2 * posterior(diffusion.schedule, t, t_prev).variance
    direction = math.sqrt(max(b_prev**2 - variance, 0.0))
    x_prev = a_prev * prediction.pred_x_start + direction * prediction.pred_noise
    return x_prev + math.sqrt(variance) * _given(noise) if variance > 0 else x_prev


def dpmpp_2m_step(
    diffusion: Diffusion,
    x_t: Float[Tensor, "batch ..."],
    pred_x_start: Float[Tensor, "batch ..."],
    t: int,
    t_prev: int,
    *,
    last: tuple[int, Tensor] | None = None,
) -> Float[Tensor, "batch ..."]:
    """One step of DPM-Solver++(2M): x_p = (b_p/b_t) x_t + (a_p - b_p a_t/b_t) D.

    D extrapolates x_start from this step's and the last one's prediction over log SNR: with
    h the step in lambda = log(a/b) and r = h_last/h, D = (1 + 1/2r) x0 - (1/2r) x0_last. The first
    step, and the last one into the data, are first order; a last step of infinite h (from zero
    terminal SNR) contributes no correction.

    Args:
        diffusion: the process.
        x_t: the present images.
        pred_x_start: the network's word on the data under them.
        t: the present timestep.
        t_prev: the next one to visit, -1 for the data.
        last: the timestep before t and what was predicted there; None at the first step.

    Reference: Lu et al., DPM-Solver++ (2211.01095), Algorithm 2.
    """
    a_t, b_t = scales_at(diffusion.schedule, t)
    a_p, b_p = scales_at(diffusion.schedule, t_prev)
    d = pred_x_start
    if last is not None and t_prev >= 0:
        t_last, last_x_start = last
        h = _log_ratio(diffusion, t_prev) - _log_ratio(diffusion, t)
        h_last = _log_ratio(diffusion, t) - _log_ratio(diffusion, t_last)
        correction = h / (2 * h_last)  # 1/2r; 0 where h_last is infinite
        d = (1 + correction) * pred_x_start - correction * last_x_start
    return (b_p / b_t) * x_t + (a_p - b_p * a_t / b_t) * d


@torch.no_grad()
def sample_ddpm(
    diffusion: Diffusion,
    model: Denoiser,
    x_T: Float[Tensor, "batch ..."],  # noqa: N803  (the field's name for the starting noise)
    *,
    num_steps: int | None = None,
    spacing: Spacing = "trailing",
    timesteps: Sequence[int] | None = None,
    variance: Variance = "fixed_small",
    clip_x_start: bool = True,
    class_labels: Int64[Tensor, " batch"] | None = None,
    guidance_scale: float = 1.0,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "batch ..."]:
    """Samples ancestrally from the noise x_T; arguments as `sample_ddim`, and `variance`.

    Raises:
        ValueError: as `sample_ddim`, an unknown variance, or no generator.
    """
    check_variance(diffusion, variance)
    x, predict = _begin(diffusion, model, x_T, clip_x_start, class_labels, guidance_scale)
    for k, t, t_prev in _visits(diffusion, num_steps, spacing, timesteps):
        prediction, fraction = predict(x, t)
        noise = None if t_prev < 0 else _draw_noise(x, generator)
        x = ddpm_step(
            diffusion, x, prediction, t, t_prev,
            variance=variance, variance_fraction=fraction, noise=noise,
        )  # fmt: skip
        if on_step is not None:
            on_step(k, x)
    return x.to(x_T.dtype)


@torch.no_grad()
def sample_ddim(
    diffusion: Diffusion,
    model: Denoiser,
    x_T: Float[Tensor, "batch ..."],  # noqa: N803
    *,
    num_steps: int | None = None,
    spacing: Spacing = "trailing",
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
    clip_x_start: bool = True,
    class_labels: Int64[Tensor, " batch"] | None = None,
    guidance_scale: float = 1.0,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "batch ..."]:
    """Samples with DDIM from the noise x_T.

    Args:
        diffusion: the process the network was trained for.
        model: called as `model(x_t, t)`.
        x_T: standard normal noise, one row an image; x_t itself where `timesteps` begins at t.
        num_steps: how many steps to take, 1..T.
        spacing: where they lie.
        timesteps: the steps themselves, descending, in place of num_steps and spacing.
        eta: 0 is deterministic, 1 is ancestral sampling.
        clip_x_start: clamp the predicted clean data to [-1, 1] at every step.
        class_labels: one for each sample, for a network with classes.
        guidance_scale: w in o_null + w (o_class - o_null); 1 is no guidance.
        generator: the source of the noise when eta is above 0: one, or one for each image. On any
            device; those of the CPU draw the same for all.
        on_step: called after each step with the number of steps taken and x.

    Returns:
        The samples, the shape of x_T, in [-1, 1] when clipped.

    Raises:
        ValueError: num_steps, spacing, timesteps or eta out of range; both or neither of num_steps
            and timesteps; eta above 0 without a generator, or with another number of
            generators than images; guidance without labels.
    """
    _check_eta(eta)
    x, predict = _begin(diffusion, model, x_T, clip_x_start, class_labels, guidance_scale)
    for k, t, t_prev in _visits(diffusion, num_steps, spacing, timesteps):
        prediction, _ = predict(x, t)
        noise = None if eta == 0 or t_prev < 0 else _draw_noise(x, generator)
        x = ddim_step(diffusion, prediction, t, t_prev, eta=eta, noise=noise)
        if on_step is not None:
            on_step(k, x)
    return x.to(x_T.dtype)


@torch.no_grad()
def sample_dpmpp_2m(
    diffusion: Diffusion,
    model: Denoiser,
    x_T: Float[Tensor, "batch ..."],  # noqa: N803
    *,
    num_steps: int | None = None,
    spacing: Spacing = "trailing",
    timesteps: Sequence[int] | None = None,
    clip_x_start: bool = True,
    class_labels: Int64[Tensor, " batch"] | None = None,
    guidance_scale: float = 1.0,
    on_step: OnStep | None = None,
) -> Float[Tensor, "batch ..."]:
    """Samples with DPM-Solver++(2M) from the noise x_T; arguments as `sample_ddim`.

    Raises:
        ValueError: as `sample_ddim`.
    """
    x, predict = _begin(diffusion, model, x_T, clip_x_start, class_labels, guidance_scale)
    last: tuple[int, Tensor] | None = None
    for k, t, t_prev in _visits(diffusion, num_steps, spacing, timesteps):
        x_start = predict(x, t)[0].pred_x_start
        x = dpmpp_2m_step(diffusion, x, x_start, t, t_prev, last=last)
        last = (t, x_start)
        if on_step is not None:
            on_step(k, x)
    return x.to(x_T.dtype)


def _visits(
    diffusion: Diffusion, num_steps: int | None, spacing: Spacing, timesteps: Sequence[int] | None
) -> Iterator[tuple[int, int, int]]:
    """(number of the step from 1, t, t_prev) of a sampler's way, into the data at the end."""
    if (num_steps is None) == (timesteps is None):
        raise ValueError("Give either num_steps or timesteps to a sampler, not both or neither.")
    last = diffusion.num_train_timesteps - 1
    if num_steps is not None:
        timesteps = make_timesteps(last + 1, num_steps, spacing).tolist()
    steps = list(timesteps or ())
    if not steps or steps != sorted(set(steps), reverse=True) or steps[0] > last or steps[-1] < 0:
        raise ValueError(
            f"timesteps must descend strictly within {last}..0, got {steps[:8]}"
            f"{'...' if len(steps) > 8 else ''}. Sort them and drop what repeats."
        )
    return ((k + 1, t, p) for k, (t, p) in enumerate(zip(steps, [*steps[1:], -1], strict=True)))


def check_variance(diffusion: Diffusion, variance: str) -> None:
    """Refuses a variance that is unknown or that the process does not have.

    Raises:
        ValueError: as said.
    """
    if variance not in VARIANCES:
        raise ValueError(
            f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}. "
            "Choose one of these."
        )
    if variance == "learned" and not diffusion.learned_variance:
        raise ValueError(
            "variance 'learned' needs a network that puts it out. Use fixed_small, or a Diffusion "
            "and a network with learned_variance=True."
        )


def _begin(
    diffusion: Diffusion,
    model: Denoiser,
    x_T: Tensor,  # noqa: N803
    clip_x_start: bool,
    class_labels: Tensor | None,
    guidance_scale: float,
) -> tuple[Tensor, Callable[[Tensor, int], tuple[Prediction, Tensor | None]]]:
    """x in a precision to compute with, and the prediction at (x, t).

    The network is called in x_T's own precision, and a self-conditioned one is shown what it
    predicted a step before.
    """
    guess: Tensor | None = None

    def predict(x: Tensor, t: int) -> tuple[Prediction, Tensor | None]:
        nonlocal guess
        # One timestep for all, expanded: the network embeds it once.
        t_batch = torch.full((1,), t, dtype=torch.int64, device=x.device).expand(x.shape[0])
        prediction, fraction = diffusion.predict_with_variance(
            model,
            x.to(x_T.dtype),
            t_batch,
            x_self_cond=guess,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            clip_x_start=clip_x_start,
        )
        if diffusion.self_condition:
            guess = prediction.pred_x_start.to(x_T.dtype)
        return prediction, fraction

    return x_T.to(torch.promote_types(x_T.dtype, torch.float32)), predict


def _log_ratio(diffusion: Diffusion, t: int) -> float:
    """lambda = log(a/b), half the log SNR; -inf where there is no signal."""
    a, b = scales_at(diffusion.schedule, t)
    return math.log(a / b) if a > 0 else -math.inf


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}. 0 is deterministic.")


def _given(noise: Tensor | None) -> Tensor:
    if noise is None:
        raise ValueError("This step adds noise and none was given. Pass noise or a generator.")
    return noise


def _draw_noise(x: Tensor, generator: Generators) -> Tensor:
    if generator is None:
        raise ValueError("This sampler adds noise and needs a generator. Pass generator=.")
    if isinstance(generator, torch.Generator):
        noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
        return noise.to(x.device)
    if len(generator) != len(x):
        raise ValueError(
            f"generator must be one, or one for each of the {len(x)} images, got "
            f"{len(generator)}. make_image_noise gives as many as it gives images."
        )
    rows = [
        torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generator
    ]
    return torch.stack(rows).to(x.device)
