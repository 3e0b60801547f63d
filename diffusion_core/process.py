"""The diffusion process: noising, conversions, guidance, and the training loss.

`Diffusion` joins a schedule with an objective. Weights by timestep are in `objectives.py`, the
posterior of a step in `posterior.py`, the reverse process in `samplers.py`. Nothing here draws a
random number unless it is needed and not given.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from diffusion_core.noise import draw_noise
from diffusion_core.objectives import Objective, Weighting, check_objective, loss_weights
from diffusion_core.posterior import make_step_constants, step_bits
from diffusion_core.schedules import NoiseSchedule

Denoiser = Callable[..., Tensor]

# In a guess of the clean data, which are about [-1, 1], the noise that is left over counts 20,000
# times at the last step of a cosine schedule. float16 ends at 65,504, and layers add many.
FLOAT16_GUESS = 10.0
VARIATIONAL_SHARE = 0.001  # of the bound in the hybrid loss: 2102.09672, section 3.1


class Prediction(NamedTuple):
    """What a network's output says of x_t: the noise in it and the clean data under it."""

    pred_noise: Float[Tensor, "batch ..."]
    pred_x_start: Float[Tensor, "batch ..."]


class Diffusion(nn.Module):
    """A schedule and an objective: the mathematics between data, noise and a network.

    A module only so that its constants follow `.to(device)`; it has no parameters. Half
    precision inputs are computed with in float32.

    Args:
        schedule: signal and noise scales by timestep.
        objective: what the network's output stands for.
        weighting: the weight of each timestep in the loss.
        gamma: the bound of `min_snr`.
        offset_noise: strength of the noise shared by a channel, in drawn noise.
        self_condition: the network takes its own earlier guess of the clean data.
        learned_variance: the second half of the network's channels sets the variance of `ddpm`.
        null_label: the label that means no class.
        label_dropout: probability that the loss replaces a label by the null label.

    Raises:
        ValueError: an unknown objective or weighting, an objective that the schedule gives no
            meaning to, a negative offset_noise, or label_dropout outside [0, 1] or without a
            null_label.
    """

    signal_scale: Tensor
    noise_scale: Tensor
    weights: Tensor
    step_constants: Tensor

    def __init__(
        self,
        schedule: NoiseSchedule,
        objective: Objective = "pred_v",
        weighting: Weighting = "uniform",
        gamma: float = 5.0,
        *,
        offset_noise: float = 0.0,
        self_condition: bool = False,
        learned_variance: bool = False,
        null_label: int | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_objective(schedule, objective)
        if offset_noise < 0:
            raise ValueError(f"offset_noise must be 0 or above, got {offset_noise}. Try 0.1.")
        if not 0 <= label_dropout <= 1 or (label_dropout > 0 and null_label is None):
            raise ValueError(
                f"label_dropout must be in [0, 1] and needs a null_label, got {label_dropout} and "
                f"null_label = {null_label}. 0.1 and the number of classes are usual."
            )
        self.schedule = schedule
        self.objective: Objective = objective
        self.weighting: Weighting = weighting
        self.offset_noise = offset_noise
        self.self_condition = self_condition
        self.learned_variance = learned_variance
        self.null_label = null_label
        self.label_dropout = label_dropout
        constants = [("signal_scale", schedule.signal_scale), ("noise_scale", schedule.noise_scale)]
        constants.append(("weights", loss_weights(schedule, objective, weighting, gamma)))
        if learned_variance:
            constants.append(("step_constants", make_step_constants(schedule)))
        for name, values in constants:
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
        return (a * x_start + b * noise).to(x_start.dtype)

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
        output = output.to(a.dtype)
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
        x_self_cond: Float[Tensor, "batch ..."] | None = None,
        class_labels: Int64[Tensor, " batch"] | None = None,
        guidance_scale: float = 1.0,
        clip_x_start: bool = False,
    ) -> Prediction:
        """Runs the network and converts its output.

        Args:
            model: called as `model(x_t, t)`, or with `x_self_cond` and `class_labels=` where the
                process has them.
            x_t: the noised batch.
            t: its timesteps, 0-based.
            x_self_cond: an earlier guess of the clean data.
            class_labels: one for each sample.
            guidance_scale: w in o_null + w (o_class - o_null); 1 is no guidance.
            clip_x_start: clamp the clean data to [-1, 1] and derive the noise anew from the
                clamped value, so that the two still explain x_t.

        Raises:
            ValueError: guidance without labels or without a null label, or a network whose
                output has another shape than x_t.
        """
        return self.predict_with_variance(
            model,
            x_t,
            t,
            x_self_cond=x_self_cond,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            clip_x_start=clip_x_start,
        )[0]

    def predict_with_variance(
        self,
        model: Denoiser,
        x_t: Float[Tensor, "batch ..."],
        t: Int64[Tensor, " batch"],
        *,
        x_self_cond: Float[Tensor, "batch ..."] | None = None,
        class_labels: Int64[Tensor, " batch"] | None = None,
        guidance_scale: float = 1.0,
        clip_x_start: bool = False,
    ) -> tuple[Prediction, Float[Tensor, "batch ..."] | None]:
        """As `predict`, and where between its bounds the log variance lies (0 to 1, or None).

        Reference: guidance: Ho & Salimans (2207.12598), eq. 6, in the form that is 1 without it.
        """
        if guidance_scale == 1:
            output = self._run(model, x_t, t, x_self_cond, class_labels)
            output, fraction = self.split_output(output)
        else:
            output, fraction = self._run_guided(
                model, x_t, t, x_self_cond, class_labels, guidance_scale
            )
        prediction = self.convert(output, x_t, t)
        if clip_x_start:
            a, b = self._scales(t, x_t)
            x_start = prediction.pred_x_start.clamp(-1, 1)
            prediction = Prediction((x_t - a * x_start) / b, x_start)
        return prediction, fraction

    def split_output(
        self, output: Float[Tensor, "batch channel ..."]
    ) -> tuple[Float[Tensor, "batch half ..."], Float[Tensor, "batch half ..."] | None]:
        """The objective's part of a network's output, and the variance's as 0 to 1, or None."""
        if not self.learned_variance:
            return output, None
        output, variance = output.chunk(2, dim=1)
        return output, (variance.to(torch.promote_types(variance.dtype, torch.float32)) + 1) / 2

    def loss(
        self,
        model: Denoiser,
        x_start: Float[Tensor, "batch ..."],
        *,
        t: Int64[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "batch ..."] | None = None,
        generator: torch.Generator | None = None,
        self_condition: bool | None = None,
        class_labels: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Weighted mean squared error of the network on freshly noised data.

        With a learned variance, plus 0.001 of the variational bound in bits per dimension, in
        which the mean is held fixed.

        Args:
            model: called as in `predict`.
            x_start: clean data in [-1, 1].
            t: timesteps; drawn uniformly when not given.
            noise: standard normal noise; drawn when not given, with the offset.
            generator: the source of what is drawn, on x_start's device.
            self_condition: whether this batch is shown the network's own guess; a fair coin when
                not given. Without effect where the process has no self-conditioning.
            class_labels: one for each sample; dropped with `label_dropout`.

        Raises:
            ValueError: x_start holds values that are not finite, t is not one timestep within
                0..T-1 for each sample, or the network's output has another shape than x_start.

        Reference: Ho et al., DDPM (2006.11239), eq. 14, with a weight by timestep; Nichol &
            Dhariwal (2102.09672), eq. 16; self-conditioning: Chen et al. (2208.04202), alg. 1.
        """
        return self.loss_per_sample(
            model,
            x_start,
            t=t,
            noise=noise,
            generator=generator,
            self_condition=self_condition,
            class_labels=class_labels,
        ).mean()

    def loss_per_sample(
        self,
        model: Denoiser,
        x_start: Float[Tensor, "batch ..."],
        *,
        t: Int64[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "batch ..."] | None = None,
        generator: torch.Generator | None = None,
        self_condition: bool | None = None,
        class_labels: Int64[Tensor, " batch"] | None = None,
        check_values: bool = True,
    ) -> Float[Tensor, " batch"]:
        """The weighted loss of each sample; `loss` is its mean. Same arguments, and one more.

        Whether x_start is finite and t within 0..T-1 is read back from the device, for which a GPU
        has to finish all it was given: a loop that knows both sets `check_values` to False.
        """
        if check_values and not bool(torch.isfinite(x_start).all()):
            raise ValueError(
                "x_start holds values that are not finite. Look for them where the data is made."
            )
        batch, device = x_start.shape[0], x_start.device
        if t is None:
            t = torch.randint(
                self.num_train_timesteps, (batch,), generator=generator, device=device
            )
        elif t.shape != (batch,) or (check_values and self._is_outside(t)):
            raise ValueError(
                f"t must hold {batch} timesteps within 0..{self.num_train_timesteps - 1}, got "
                f"{t.tolist()[:8]} of shape {list(t.shape)}. Give one for each sample."
            )
        if noise is None:
            noise = draw_noise(x_start, self.offset_noise, generator)
        if class_labels is not None and self.label_dropout > 0:
            drops = torch.rand((batch,), generator=generator, device=device) < self.label_dropout
            class_labels = self.drop_labels(class_labels, drops)
        if self_condition is None and self.self_condition:
            self_condition = bool(torch.rand((1,), generator=generator, device=device) < 0.5)
        x_t = self.q_sample(x_start, t, noise)
        guess = None
        if self_condition and self.self_condition:
            with torch.no_grad():
                guess = self.predict(model, x_t, t, class_labels=class_labels).pred_x_start
                guess = guess.to(x_t.dtype)
            is_half = torch.is_autocast_enabled(device.type)
            if is_half and torch.get_autocast_dtype(device.type) == torch.float16:
                guess = guess.clamp(-FLOAT16_GUESS, FLOAT16_GUESS)
        output, fraction = self.split_output(self._run(model, x_t, t, guess, class_labels))
        squared_error = (output.float() - self.target(x_start, t, noise).float()) ** 2
        loss = squared_error.flatten(1).mean(1) * self.weights[t]
        if fraction is None:
            return loss
        pred_x_start = self.convert(output.detach(), x_t, t).pred_x_start
        bits = step_bits(
            self.step_constants, x_start.float(), pred_x_start.float(), fraction.float(), t
        )
        return loss + VARIATIONAL_SHARE * self.num_train_timesteps * bits

    def _is_outside(self, t: Tensor) -> bool:
        return bool(((t < 0) | (t >= self.num_train_timesteps)).any())

    def drop_labels(
        self, class_labels: Int64[Tensor, " batch"], drops: Bool[Tensor, " batch"]
    ) -> Int64[Tensor, " batch"]:
        """The labels with the null label where `drops` is true."""
        return class_labels.masked_fill(drops, _given_null_label(self.null_label))

    def _run(
        self,
        model: Denoiser,
        x_t: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None,
        class_labels: Tensor | None,
    ) -> Tensor:
        """The network's output; it sees only the arguments of features that are on."""
        if class_labels is not None:
            output = model(x_t, t, x_self_cond, class_labels=class_labels)
        else:
            output = model(x_t, t, x_self_cond) if self.self_condition else model(x_t, t)
        expected = list(x_t.shape)
        expected[1] *= 2 if self.learned_variance else 1
        if list(output.shape) != expected:
            raise ValueError(
                f"The network must put out {expected} for x_t of {list(x_t.shape)}, got "
                f"{list(output.shape)}. Give Diffusion and the network the same learned_variance "
                "and channels."
            )
        return output

    def _run_guided(
        self,
        model: Denoiser,
        x_t: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None,
        class_labels: Tensor | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """o_null + w (o_class - o_null), both from one run on the doubled batch."""
        if class_labels is None:
            raise ValueError(
                f"guidance_scale = {guidance_scale} needs class_labels. Give them or leave it at 1."
            )
        null = torch.full_like(class_labels, _given_null_label(self.null_label))
        both = torch.cat([class_labels, null])
        guess = None if x_self_cond is None else torch.cat([x_self_cond, x_self_cond])
        t = t[:1].expand(2 * len(t)) if t.stride() == (0,) else torch.cat([t, t])
        output = self._run(model, torch.cat([x_t, x_t]), t, guess, both)
        output, fraction = self.split_output(output)
        on_class, on_null = output.chunk(2)
        guided = on_null + guidance_scale * (on_class - on_null)
        return guided, None if fraction is None else fraction.chunk(2)[0]

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, shaped to multiply `like`, in float32 or float64."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        if like.dtype == torch.float64:  # exactness tests run the whole chain in float64
            a = self.schedule.signal_scale.to(like.device)[t]
            b = self.schedule.noise_scale.to(like.device)[t]
        else:
            a, b = self.signal_scale[t], self.noise_scale[t]
        return a.view(shape), b.view(shape)


def _given_null_label(null_label: int | None) -> int:
    if null_label is None:
        raise ValueError(
            "Guidance and label dropout need a null label. Give Diffusion null_label=num_classes."
        )
    return null_label
