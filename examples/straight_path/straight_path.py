"""The straight path from noise to data: `lerp` and `pred_flow`, sampled in few steps.

    python examples/straight_path/straight_path.py [--output straight_path.png]

On this path x_t is the line between a data point and a noise point, and the network learns the
line's direction, noise - x_start, on average over all lines through x_t. Averages bend: where lines
cross, the way from a noise point is no line. So one step lands in the middle of the data, where
there are none, and it takes a few to follow the bends. The lower row shows 60 ways.

Expect, after about 20 seconds, energy distances of samples to data of about 0.65 in 1 step, 0.2
in 2, 0.005 in 5, and 0.001 in 20, which is what two draws of data are apart.
"""

import argparse
import math
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

from diffusion_core import (
    EMA,
    Diffusion,
    PointMLP,
    draw_timesteps,
    make_schedule,
    sample_ddim,
)

mpl.use("Agg")  # a file, no window
from matplotlib import pyplot as plt

NUM_POINTS = 10_000
NUM_SAMPLES = 2_000
T = 100
SAMPLE_STEPS = (1, 2, 5, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=5000, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("straight_path.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # such small products gain nothing from a second thread
    torch.manual_seed(args.seed)  # the network's initial weights
    generator = torch.Generator().manual_seed(args.seed)

    data = make_ring(NUM_POINTS, generator)
    diffusion = Diffusion(make_schedule("lerp", T), "pred_flow")
    model = train(diffusion, data, args.num_steps, generator)

    fresh = make_ring(NUM_SAMPLES, generator)  # not trained on: to judge by
    x_T = torch.randn(NUM_SAMPLES, 2, generator=generator)  # noqa: N806
    ways: dict[int, list[Tensor]] = {}
    for num_steps in SAMPLE_STEPS:
        ways[num_steps] = [x_T]
        samples = sample_ddim(
            diffusion, model, x_T, num_steps=num_steps, clip_x_start=False,
            on_step=lambda k, x, way=ways[num_steps]: way.append(x),
        )  # fmt: skip
        print(f"distance to data in {num_steps:2} steps: {distance(samples, fresh):.4f}")
    again = make_ring(NUM_SAMPLES, generator)
    print(f"distance of two draws of data: {distance(again, fresh):.4f}")
    draw(fresh, ways, args.output)
    print(args.output)


def make_ring(num_points: int, generator: torch.Generator) -> Tensor:
    """Points of eight clusters on a circle of radius 1."""
    angle = 2 * math.pi / 8 * torch.randint(8, (num_points,), generator=generator)
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + 0.07 * torch.randn(num_points, 2, generator=generator)


def train(
    diffusion: Diffusion, data: Tensor, num_steps: int, generator: torch.Generator
) -> nn.Module:
    model = PointMLP(features=2, hidden=128, num_train_timesteps=T)
    ema = EMA(model, decay=0.999)
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    for _ in range(num_steps):
        x_start = data[torch.randint(len(data), (512,), generator=generator)]
        t = draw_timesteps(T, 512, "stratified", generator)  # every level in every batch
        loss = diffusion.loss(model, x_start, t=t, generator=generator)
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


def draw(fresh: Tensor, ways: dict[int, list[Tensor]], output: Path) -> None:
    figure, axes = plt.subplots(
        2, len(ways) + 1, figsize=(10.4, 4.6), layout="constrained", sharex=True, sharey=True
    )
    columns = {"data": [fresh]} | {
        f"{k} step{'s' if k > 1 else ''}": way for k, way in ways.items()
    }
    for (above, below), (title, way) in zip(axes.T, columns.items(), strict=True):
        above.set_title(title, fontsize=11)
        above.scatter(*way[-1].T, s=1, linewidths=0, color="#1f4e8c")
        if len(way) == 1:
            below.axis("off")
            below.text(0, 0, "ways from\nnoise (grey)\nto samples (blue)", ha="center", va="center")
            continue
        lines = torch.stack(way)[:, :60]
        below.scatter(*fresh.T, s=1, linewidths=0, color="#cfdcee")
        below.plot(*lines.unbind(2), color="#999999", linewidth=0.6)
        below.scatter(*lines[0].T, s=4, linewidths=0, color="#999999")
        below.scatter(*lines[-1].T, s=6, linewidths=0, color="#1f4e8c")
    for ax in axes.flat:
        ax.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal", xticks=[], yticks=[])
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
