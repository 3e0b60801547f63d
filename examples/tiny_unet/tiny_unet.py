"""The minimal U-Net on 8x8 digits, and what it costs that nobody tells it the timestep.

    python examples/tiny_unet/tiny_unet.py [--output tiny_unet.png]

`TinyUNet` sees the noised image and nothing else. The same network is trained a second time with
the timestep as an image of its own, a constant second channel, and the two are compared: by their
error in x_start at a few timesteps, and by their samples.

Expect, after about a minute and a half, energy distances of samples to data of about 0.07 without
t and 0.12 with it, where two draws of data are 0.02 apart. What the missing timestep costs shows
where there is little noise: an error of 0.028 against 0.017 at t = 5, and the same within 5% from
t = 30 on. The samples of so short a training are no better for it. One seed: the order may turn.
"""

import argparse
import io
import tarfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_core import EMA, Diffusion, TinyUNet, make_schedule, sample_ddpm

mpl.use("Agg")  # a file, no window
from matplotlib import pyplot as plt

SHARDS = Path(__file__).resolve().parent.parent / "digits"
NUM_HELD_OUT = 500
T = 100
LOOKED_AT = (5, 30, 60, 90)  # timesteps
SHOWN = 6, 6  # rows and columns of images in the picture


class WithTimestep(nn.Module):
    """`TinyUNet` that is shown the timestep, as a constant second channel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyUNet(channels=2)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        shown = (2 * t / T - 1).view(-1, 1, 1, 1).expand_as(x_t)
        return self.net(torch.cat([x_t, shown], dim=1), t)[:, :1]  # the rest is not trained


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=2000, help="of training, each network")
    parser.add_argument("--sample-steps", type=int, default=T, help="of DDPM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("tiny_unet.png"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(args.seed)
    digits = read_digits()
    digits = digits[torch.randperm(len(digits), generator=generator)]
    held_out, data = digits[:NUM_HELD_OUT], digits[NUM_HELD_OUT:]

    # 8 is a multiple of TinyUNet.size_divisor, so the digits need no padding.
    diffusion = Diffusion(make_schedule("cosine", T), "pred_x0")
    x_T = torch.randn(held_out.shape, generator=generator)  # noqa: N806
    pictures = {"real": held_out}
    for name, network in (("without t", TinyUNet), ("with t", WithTimestep)):
        torch.manual_seed(args.seed)  # the initial weights
        model = train(diffusion, network(), data, args.num_steps, generator)
        errors = []
        for t in LOOKED_AT:
            at = torch.full((NUM_HELD_OUT,), t)
            with torch.inference_mode():  # the loss of pred_x0 is the squared error of x_start
                errors.append(float(diffusion.loss(model, held_out, t=at, noise=x_T)))
        samples = sample_ddpm(
            diffusion, model, x_T, num_steps=args.sample_steps, generator=generator
        )
        pictures[name] = samples
        by_t = ", ".join(f"{e:.3f} at t = {t}" for t, e in zip(LOOKED_AT, errors, strict=True))
        print(f"{name}: error of x_start {by_t}")
        print(f"{name}: distance of samples to data {distance(samples, held_out):.3f}", flush=True)
    print(f"distance of two draws of data: {distance(data[:NUM_HELD_OUT], held_out):.3f}")
    draw(pictures, args.output)
    print(args.output)


def read_digits() -> Tensor:
    """The committed shards' images, [1797, 1, 8, 8] in [-1, 1]."""
    images = []
    for shard in sorted(SHARDS.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            for entry in tar:
                file = tar.extractfile(entry)
                if entry.name.endswith(".png") and file is not None:
                    images.append(np.asarray(Image.open(io.BytesIO(file.read()))))
    return torch.from_numpy(np.stack(images))[:, None] / 127.5 - 1


def train(
    diffusion: Diffusion,
    model: nn.Module,
    data: Tensor,
    num_steps: int,
    generator: torch.Generator,
) -> nn.Module:
    ema = EMA(model, decay=0.999)
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps)
    for _ in range(num_steps):
        x_start = data[torch.randint(len(data), (64,), generator=generator)]
        loss = diffusion.loss(model, x_start, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        ema.update(model)
    return ema.model


def distance(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'|: 0 only for equal distributions."""

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.cdist(a.flatten(1), b.flatten(1)).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def draw(pictures: dict[str, Tensor], output: Path) -> None:
    rows, columns = SHOWN
    figure, axes = plt.subplots(1, len(pictures), figsize=(10.4, 3.8), layout="constrained")
    for ax, (title, images) in zip(axes, pictures.items(), strict=True):
        tiles = torch.nn.functional.pad(images[: rows * columns, 0], (1, 1, 1, 1), value=1)
        sheet = tiles.view(rows, columns, 10, 10).transpose(1, 2).reshape(rows * 10, columns * 10)
        ax.imshow(sheet.numpy(), vmin=-1, vmax=1, cmap="gray", interpolation="nearest")
        ax.set_title(title if title == "real" else f"sampled {title}", fontsize=11)
        ax.axis("off")
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
