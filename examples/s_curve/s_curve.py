"""Points on an S: the smallest diffusion model, and a schedule that ends in too little noise.

    python examples/s_curve/s_curve.py [--output s_curve.png]

An MLP learns 10,000 points with 100 noise levels twice: with the betas of the classic demo,
which still hold abar = 0.778 of signal at the last step, and with betas that end twenty times as
large. Sampling starts from pure noise either way, so that the first network starts where it
never trained. DDPM forgives most of that, the noise it adds washing the start out; DDIM adds none
and keeps it, as a halo around the S. (The classic demo also divides its points by 10: `--scale
0.1`.)

Expect, after about a minute, these energy distances of samples to data, where two draws of
data are 0.0005 to 0.001 apart: classic betas 0.002 by DDPM and 0.007 by DDIM; enough noise 0.001 by
both.
"""

import argparse
import math
import warnings
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

from diffusion_core import EMA, Diffusion, PointMLP, make_schedule, sample_ddim, sample_ddpm

mpl.use("Agg")  # a file, no window
from matplotlib import pyplot as plt

NUM_POINTS = 10_000
NUM_SAMPLES = 2_000
T = 100
SHOWN = (-1, 33, 66, 99)  # timesteps in the picture; -1 is the data
BETA_END = {"classic betas": 5e-3, "enough noise": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=8000, help="of training, each time")
    parser.add_argument("--scale", type=float, default=0.5, help="of the S; 0.5 fills [-1, 1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("s_curve.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # such small products gain nothing from a second thread
    torch.manual_seed(args.seed)  # the networks' initial weights
    generator = torch.Generator().manual_seed(args.seed)

    data = args.scale * make_s_curve(NUM_POINTS, generator)
    fresh = args.scale * make_s_curve(NUM_SAMPLES, generator)  # not trained on: to judge by
    again = args.scale * make_s_curve(NUM_SAMPLES, generator)
    x_T = torch.randn(NUM_SAMPLES, 2, generator=generator)  # noqa: N806

    pictures = {}
    for name, beta_end in BETA_END.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # make_schedule says what is wrong with the first
            schedule = make_schedule("logistic", T, beta_end=beta_end)
        for warning in caught:
            print(f"warning: {warning.message}")
        diffusion = Diffusion(schedule, "pred_noise")
        model = train(diffusion, data, args.num_steps, generator)

        forward, ddpm, ddim = {-1: fresh}, {T - 1: x_T}, {T - 1: x_T}
        for t in SHOWN[1:]:
            noise = torch.randn(fresh.shape, generator=generator)
            forward[t] = diffusion.q_sample(fresh, torch.full((NUM_SAMPLES,), t), noise)
        # Of T steps the k-th leads to timestep T - 1 - k, the last to -1. The demo adds noise of
        # the step's whole beta, and does not clip, as points have no bounds.
        sample_ddpm(
            diffusion, model, x_T, num_steps=T, variance="fixed_large", clip_x_start=False,
            generator=generator, on_step=lambda k, x, to=ddpm: to.update({T - 1 - k: x}),
        )  # fmt: skip
        sample_ddim(
            diffusion, model, x_T, num_steps=T, clip_x_start=False,
            on_step=lambda k, x, to=ddim: to.update({T - 1 - k: x}),
        )  # fmt: skip
        title = f"{name}: abar = {float(schedule.alphas_cumprod[-1]):.3f} at t = {T - 1}"
        pictures[title] = {"forward": forward, "DDPM": ddpm, "DDIM": ddim}
        print(
            f"{name}: distance of noised data to noise {distance(forward[T - 1], x_T):.4f}, "
            f"of samples to data {distance(ddpm[-1], fresh):.4f} by DDPM, "
            f"{distance(ddim[-1], fresh):.4f} by DDIM"
        )
    print(f"distance of two draws of data: {distance(again, fresh):.4f}")
    draw(pictures, args.output)
    print(args.output)


def make_s_curve(num_points: int, generator: torch.Generator) -> Tensor:
    """Points near two half circles that meet in the origin, in [-1, 1] x [-2, 2]."""
    u = 3 * math.pi * (torch.rand(num_points, generator=generator) - 0.5)
    points = torch.stack([u.sin(), u.sign() * (u.cos() - 1)], dim=1)
    return points + 0.1 * torch.randn(points.shape, generator=generator)


def train(
    diffusion: Diffusion, data: Tensor, num_steps: int, generator: torch.Generator
) -> nn.Module:
    model = PointMLP(features=2, hidden=128, num_train_timesteps=T)
    ema = EMA(model, decay=0.999)
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    for _ in range(num_steps):
        x_start = data[torch.randint(len(data), (512,), generator=generator)]
        loss = diffusion.loss(model, x_start, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        ema.update(model)
    return ema.model


def distance(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'|: 0 only for equal distributions."""

    def mean(a: Tensor, b: Tensor) -> float:  # the fast mode's cancellation would show here
        return float(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def draw(pictures: dict[str, dict[str, dict[int, Tensor]]], output: Path) -> None:
    figure = plt.figure(figsize=(10.4, 4.4), layout="constrained")
    halves = figure.subfigures(1, len(pictures), wspace=0.03, squeeze=False)[0]
    for half, (title, rows) in zip(halves, pictures.items(), strict=True):
        half.suptitle(title, fontsize=11)
        axes = half.subplots(len(rows), len(SHOWN), sharex=True, sharey=True)
        for row, (name, states) in zip(axes, rows.items(), strict=True):
            row[0].set_ylabel(f"{name} →" if name == "forward" else f"← {name}")
            for ax, t in zip(row, SHOWN, strict=True):
                ax.scatter(*states[t].T, s=1, linewidths=0, color="#1f4e8c")
                ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal", xticks=[], yticks=[])
        for ax, t in zip(axes[0], SHOWN, strict=True):
            ax.set_title("data" if t < 0 else f"t = {t}", fontsize=10)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
