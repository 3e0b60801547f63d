"""Images between two images."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffusion_core.process import Denoiser, Diffusion
from diffusion_core.samplers import sample_ddim


def interpolate(
    diffusion: Diffusion,
    model: Denoiser,
    x_1: Float[Tensor, "batch ..."],
    x_2: Float[Tensor, "batch ..."],
    *,
    t: int,
    weight: float | Float[Tensor, " batch"],
    noise: Float[Tensor, "batch ..."],
    num_steps: int | None = None,
    clip_x_start: bool = True,
    class_labels: Int64[Tensor, " batch"] | None = None,
    guidance_scale: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    """Images between two: both noised to t with one noise, mixed, and denoised with DDIM.

    Args:
        diffusion: the process.
        model: called as `model(x_t, t)`.
        x_1: where weight 0 begins, in [-1, 1].
        x_2: where weight 1 ends.
        t: how far to noise: the further, the more freely the network fills in.
        weight: of x_2, in [0, 1]; one for all, or one of each.
        noise: standard normal, shared by both, so that weight 0 and 1 come back to the images.
        num_steps: of DDIM, evenly spaced from t to 0; all t + 1 of them when not given.
        clip_x_start: as in `sample_ddim`.
        class_labels: of each image between, for a network that is told the class.
        guidance_scale: as in `sample_ddim`.

    Raises:
        ValueError: t, weight or num_steps out of range.

    Reference: Ho et al., DDPM (2006.11239), section 4.4, with one noise and DDIM.
    """
    weights = torch.as_tensor(weight, dtype=x_1.dtype, device=x_1.device)
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError(f"weight must be between 0 and 1, got {weight}. 0.5 is halfway.")
    if not 0 <= t < diffusion.num_train_timesteps:
        raise ValueError(
            f"t must be within 0..{diffusion.num_train_timesteps - 1}, got {t}. Half of T is a "
            "usual value."
        )
    if num_steps is not None and not 1 <= num_steps <= t + 1:
        raise ValueError(
            f"num_steps must be within 1..{t + 1} for t = {t}, got {num_steps}. 50 is usual."
        )
    steps = torch.linspace(t, 0, num_steps or t + 1, dtype=torch.float64).round().int().tolist()
    t_batch = torch.full((x_1.shape[0],), t, dtype=torch.int64, device=x_1.device)
    x_t = torch.lerp(
        diffusion.q_sample(x_1, t_batch, noise),
        diffusion.q_sample(x_2, t_batch, noise),
        weights.view(-1, *[1] * (x_1.ndim - 1)),
    )
    return sample_ddim(
        diffusion,
        model,
        x_t,
        timesteps=steps,
        clip_x_start=clip_x_start,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
    )
