"""The diffusion process: noising, conversions, the posterior, and the training loss.

`Diffusion` joins a schedule with an objective. Weights by timestep are in `objectives.py`,
the reverse process is in `samplers.py`. Nothing here draws a random number unless it is
handed a generator.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diffusion_core.objectives import Objective, Weighting, check_objective, loss_weights
from diffusion_core.schedules import NoiseSchedule

Denoiser = Callable[..., Tensor]


class Prediction(NamedTuple):
    """What a network's output says of x_t: the noise in it and the clean data under it."""

    pred_noise: Float[Tensor, "batch ..."]
    pred_x_start: Float[Tensor, "batch ..."]


class Diffusion(nn.Module):
    """A schedule and an objective: the mathematics between data, noise and a network.

    A module only so that its constants follow `.to(device)`; it has no parameters.

    Args:
        schedule: signal and noise scales by timestep.
        objective: what the network's output stands for.
        weighting: the weight of each timestep in the loss.
        gamma: the bound of `min_snr`.

    Raises:
        ValueError: an unknown objective or weighting, or an objective that the schedule gives no
            meaning to.
    """

    signal_scale: Tensor
    noise_scale: Tensor
    weights: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        objective: Objective = "pred_v",
        weighting: Weighting = "uniform",
        gamma: float = 5.0,
    ) -> None:
        super().__init__()
        check_objective(schedule, objective)
        self.schedule = schedule
        self.objective: Objective = objective
        self.weighting: Weighting = weighting
        for name, values in (
            ("signal_scale", schedule.signal_scale),
            ("noise_scale", schedule.noise_scale),
            ("weights", loss_weights(schedule, objective, weighting, gamma)),
        ):
            self.register_buffer(name, values.float(), persistent=False)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels."""
        return self.schedule.num_train_timesteps

    def q_sample(
        self,
        x_start: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
        noise: Float[Tensor, "batch ..."],
    ) -> Float[Tensor, "batch ..."]:
        """x_t = a_t x_start + b_t noise: a draw from q(x_t | x_start).

        Reference: Ho et al., DDPM (2006.11239), eq. 4, for any pair of scales.
        """
        a, b = self._scales(t, x_start)
        return a * x_start + b * noise

    def target(
        self,
        x_start: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
        noise: Float[Tensor, "batch ..."],
    ) -> Float[Tensor, "batch ..."]:
        """What the network should put out for x_t = a x_start + b noise.

        Reference: v = a noise - b x_start is Salimans & Ho (2202.00512), appendix D.
        """
        match self.objective:
            case "pred_noise":
                return noise
            case "pred_x0":
                return x_start
            case "pred_v":
                a, b = self._scales(t, x_start)
                return a * noise - b * x_start
            case "pred_flow":
                return noise - x_start

    def convert(
        self,
        output: Float[Tensor, "batch ..."],
        x_t: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
    ) -> Prediction:
        """Reads a network's output as noise and clean data, exact inverses of `q_sample`."""
        a, b = self._scales(t, x_t)
        match self.objective:
            case "pred_noise":
                return Prediction(output, (x_t - b * output) / a)
            case "pred_x0":
                return Prediction((x_t - a * output) / b, output)
            case "pred_v":
                q = a**2 + b**2
                return Prediction((b * x_t + a * output) / q, (a * x_t - b * output) / q)
            case "pred_flow":
                return Prediction((x_t + a * output) / (a + b), (x_t - b * output) / (a + b))

    def predict(
        self,
        model: Denoiser,
        x_t: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
        *,
        clip_x_start: bool = False,
    ) -> Prediction:
        """Runs the network and converts its output.

        Args:
            model: called as `model(x_t, t)`.
            x_t: the noised batch.
            t: its timesteps, 0-based.
            clip_x_start: clamp the clean data to [-1, 1] and derive the noise anew from the
                clamped value, so that the two still explain x_t.
        """
        prediction = self.convert(model(x_t, t), x_t, t)
        if not clip_x_start:
            return prediction
        a, b = self._scales(t, x_t)
        x_start = prediction.pred_x_start.clamp(-1, 1)
        return Prediction((x_t - a * x_start) / b, x_start)

    def loss(
        self,
        model: Denoiser,
        x_start: Float[Tensor, "batch ..."],
        *,
        t: Int64[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Weighted mean squared error of the network on freshly noised data.

        Args:
            model: called as `model(x_t, t)`.
            x_start: clean data in [-1, 1].
            t: timesteps; drawn uniformly when not given.
            noise: standard normal noise; drawn when not given.
            generator: the source of what is drawn, on x_start's device.

        Reference: Ho et al., DDPM (2006.11239), eq. 14, with a weight by timestep.
        """
        return self.loss_per_sample(model, x_start, t=t, noise=noise, generator=generator).mean()

    def loss_per_sample(
        self,
        model: Denoiser,
        x_start: Float[Tensor, "batch ..."],
        *,
        t: Int64[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "batch ..."] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " batch"]:
        """The weighted loss of each sample; `loss` is its mean. Same arguments."""
        if t is None:
            t = torch.randint(
                self.num_train_timesteps,
                (x_start.shape[0],),
                generator=generator,
                device=x_start.device,
            )
        if noise is None:
            noise = torch.randn(
                x_start.shape, generator=generator, device=x_start.device, dtype=x_start.dtype
            )
        output = model(self.q_sample(x_start, t, noise), t)
        squared_error = (output.float() - self.target(x_start, t, noise).float()) ** 2
        return squared_error.flatten(1).mean(1) * self.weights[t]

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, shaped to multiply `like`."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        if like.dtype == torch.float64:  # exactness tests run the whole chain in float64
            a = self.schedule.signal_scale.to(like.device)[t]
            b = self.schedule.noise_scale.to(like.device)[t]
        else:
            a, b = self.signal_scale[t].to(like.dtype), self.noise_scale[t].to(like.dtype)
        return a.view(shape), b.view(shape)


def scales_at(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    """a_t and b_t of one timestep as floats; t = -1 is the data itself: (1, 0)."""
    if t < 0:
        return 1.0, 0.0
    return float(schedule.signal_scale[t]), float(schedule.noise_scale[t])


class Posterior(NamedTuple):
    """q(x_p | x_t, x_start) of one step t -> p: mean = on_x_t x_t + on_x_start x_start."""

    on_x_t: float
    on_x_start: float
    variance: float
    beta: float  # b_t^2 - alpha^2 b_p^2, the step's own noise; DDPM's beta_t on adjacent steps


def posterior(schedule: NoiseSchedule, t: int, t_prev: int) -> Posterior:
    """The Gaussian posterior of any pair of scales and any p < t.

    alpha = a_t / a_p, beta = b_t^2 - alpha^2 b_p^2, mean = (alpha b_p^2 x_t + a_p beta x_start) /
    b_t^2, variance = beta b_p^2 / b_t^2. At t_prev = -1 the mean is x_start and the variance 0.

    Reference: Ho et al., DDPM (2006.11239), eqs. 6-7, where p = t - 1 and the pair is VP.
    """
    a_t, b_t = scales_at(schedule, t)
    a_p, b_p = scales_at(schedule, t_prev)
    alpha = a_t / a_p
    beta = b_t**2 - alpha**2 * b_p**2
    return Posterior(
        on_x_t=alpha * b_p**2 / b_t**2,
        on_x_start=a_p * beta / b_t**2,
        variance=beta * b_p**2 / b_t**2,
        beta=beta,
    )
