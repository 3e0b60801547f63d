"""The core against denoising-diffusion-pytorch's own U-Net and sampler, with equal weights.

    python bench/core.py [--output bench/results/core.json] [--settings small large] [--rounds 15]

In an environment with the library (bench/requirements-peers.txt), on two CPU threads, in one
process, taking turns; medians, and their ratios. Before anything is timed, both networks must
give the same output, and both samplers the same images from the same noise.

Training is the loss (pred_v, cosine, T = 1000), its gradient, and Adam: theirs as its Trainer
makes it, ours fused. Sampling is DDIM, 50 steps. Memory is the growth of the high-water mark of
resident memory over 5 training steps, each side in a process of its own. What it does not show:
other networks, data loading, EMA, GPUs. The last line is one JSON object, whose `train_ratio`,
`sample_ratio` and `memory_ratio` are those of the first setting.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_DISABLE", "1")  # the library's sampler draws a bar

import torch  # noqa: E402
from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # noqa: E402  # pyright: ignore
from machine import hardware  # noqa: E402

from diffusion_core import Diffusion, UNet, make_schedule, sample_ddim  # noqa: E402
from diffusion_core.interop_unet import convert_unet  # noqa: E402

NUM_THREADS = 2
NUM_SAMPLES, NUM_SAMPLE_STEPS = 64, 50
MEMORY_STEPS = 5
SIDES = ("theirs", "ours")


@dataclass(frozen=True)
class Setting:
    """A network, images and a batch size."""

    dim: int
    dim_mults: tuple[int, ...]
    resolution: int
    channels: int
    batch: int


SETTINGS = {
    "small": Setting(32, (1, 2, 4), 16, 1, 64),
    "large": Setting(64, (1, 2, 4, 8), 32, 3, 16),
}


class Theirs:
    """The library's network, loss, optimiser and sampler."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.model = Unet(setting.dim, dim_mults=setting.dim_mults, channels=setting.channels)
        self.process = GaussianDiffusion(
            self.model,
            image_size=setting.resolution,
            timesteps=1000,
            sampling_timesteps=NUM_SAMPLE_STEPS,
            beta_schedule="cosine",
            objective="pred_v",
        )
        self.optimizer = torch.optim.Adam(self.process.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def loss(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.process.p_losses(x_start, t, noise)

    def sample(self, shape: tuple[int, ...], num_steps: int = NUM_SAMPLE_STEPS) -> torch.Tensor:
        """In [-1, 1], from noise drawn first of all from the global generator."""
        self.process.sampling_timesteps = num_steps
        return self.process.ddim_sample(shape) * 2 - 1


class Ours:
    """The core's, with the same weights."""

    def __init__(self, setting: Setting) -> None:
        config, weights = convert_unet(Theirs(setting).model.state_dict())
        self.model = UNet(config)
        self.model.load_state_dict(weights)
        self.process = Diffusion(make_schedule("cosine", 1000), "pred_v", "snr")
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True
        )

    def loss(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.process.loss(self.model, x_start, t=t, noise=noise)

    def sample(self, shape: tuple[int, ...], num_steps: int = NUM_SAMPLE_STEPS) -> torch.Tensor:
        """In [-1, 1], from the same noise at the same timesteps."""
        times = torch.linspace(-1, 999, num_steps + 1).int().tolist()[:0:-1]
        return sample_ddim(self.process, self.model, torch.randn(shape), timesteps=times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=15, help="of one step for each side")
    parser.add_argument("--sample-rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    if arguments.memory_of:
        print(measure_memory(SETTINGS[arguments.settings[0]], arguments.memory_of))
        return
    results = {
        name: measure(name, arguments.rounds, arguments.sample_rounds)
        for name in arguments.settings
    }
    first = results[arguments.settings[0]]
    document = {
        **{key: first[key] for key in ("train_ratio", "sample_ratio", "memory_ratio")},
        "settings": results,
        "hardware": {**hardware(), "threads": NUM_THREADS},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "denoising-diffusion-pytorch")},
        },
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def measure(name: str, rounds: int, sample_rounds: int) -> dict[str, Any]:
    """Everything about one setting; ratios are ours over theirs in speed, and in memory."""
    setting = SETTINGS[name]
    theirs, ours = Theirs(setting), Ours(setting)
    batch = draw_batch(setting)
    found: dict[str, Any] = {"setting": vars(setting), "agreement": agreement(theirs, ours, batch)}

    sides = dict(zip(SIDES, (theirs, ours), strict=True))
    train_s = take_turns(
        {side: lambda s=s: train_step(s, batch) for side, s in sides.items()}, rounds
    )
    found["train_images_per_s"] = {side: round(setting.batch / s, 1) for side, s in train_s.items()}
    found["train_ratio"] = round(train_s["theirs"] / train_s["ours"], 3)

    shape = (NUM_SAMPLES, setting.channels, setting.resolution, setting.resolution)
    sample_s = take_turns(
        {side: lambda s=s: s.sample(shape) for side, s in sides.items()}, sample_rounds
    )
    found["sample_images_per_s"] = {side: round(NUM_SAMPLES / s, 2) for side, s in sample_s.items()}
    found["sample_ratio"] = round(sample_s["theirs"] / sample_s["ours"], 3)

    found["outside_the_network"] = share_outside(ours, batch, shape, train_s["ours"], sample_s)
    memory = {side: memory_in_process(name, side) for side in SIDES}
    found["train_memory_mib"] = memory
    found["memory_ratio"] = round(memory["ours"] / memory["theirs"], 3)
    print(f"{name}: {json.dumps(found)}", file=sys.stderr)
    return found


def draw_batch(setting: Setting) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images in [-1, 1], timesteps and noise."""
    g = torch.Generator().manual_seed(1)
    shape = (setting.batch, setting.channels, setting.resolution, setting.resolution)
    x_start = torch.rand(shape, generator=g) * 2 - 1
    return (
        x_start,
        torch.randint(1000, (setting.batch,), generator=g),
        torch.randn(shape, generator=g),
    )


def agreement(
    theirs: Theirs, ours: Ours, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Largest differences of outputs, losses and images; refuses to go on where they are real."""
    x_start, t, noise = batch
    losses = [side.loss(x_start, t, noise) for side in (theirs, ours)]
    with torch.inference_mode():
        outputs = [side.model(x_start, t) for side in (theirs, ours)]
    images = []
    for side in (theirs, ours):
        torch.manual_seed(2)
        images.append(side.sample((4, *x_start.shape[1:]), num_steps=10))
    found = {
        "output": float((outputs[0] - outputs[1]).abs().max()),
        "loss": abs(float(losses[0].detach()) / float(losses[1].detach()) - 1),
        "images": float((images[0] - images[1]).abs().max()),
    }
    if found["output"] > 1e-5 or found["loss"] > 1e-5 or found["images"] > 1e-3:
        raise SystemExit(f"The two sides do not compute the same: {found}.")
    return found


def train_step(side: Theirs | Ours, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    side.optimizer.zero_grad()
    side.loss(*batch).backward()
    side.optimizer.step()


def take_turns(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in tasks}
    for round_ in range(rounds + 1):
        for side, task in tasks.items():
            started = time.perf_counter()
            task()
            if round_:
                seconds[side].append(time.perf_counter() - started)
    return {side: statistics.median(values) for side, values in seconds.items()}


def share_outside(
    ours: Ours,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: tuple[int, ...],
    train_s: float,
    sample_s: dict[str, float],
) -> dict[str, float]:
    """What schedule, loss and sampler take of a step: timed with a network that costs nothing."""
    output = torch.zeros(batch[0].shape, requires_grad=True)
    still = torch.zeros(shape)
    times = torch.linspace(-1, 999, NUM_SAMPLE_STEPS + 1).int().tolist()[:0:-1]
    noise = torch.randn(shape)
    seconds = take_turns(
        {
            "train": lambda: ours.process.loss(
                lambda x, t: output, batch[0], t=batch[1], noise=batch[2]
            ).backward(),
            "sample": lambda: sample_ddim(ours.process, lambda x, t: still, noise, timesteps=times),
        },
        rounds=20,
    )
    return {
        "train": round(seconds["train"] / train_s, 4),
        "sample": round(seconds["sample"] / sample_s["ours"], 4),
    }


def memory_in_process(name: str, side: str) -> float:
    command = [sys.executable, __file__, "--settings", name, "--memory-of", side]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure_memory(setting: Setting, side: str) -> float:
    """MiB by which training steps raise this process's high-water mark (Linux)."""
    chosen = Theirs(setting) if side == "theirs" else Ours(setting)
    batch = draw_batch(setting)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    for _ in range(MEMORY_STEPS):
        train_step(chosen, batch)
    return round(resident_mib("VmHWM") - before, 1)


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


if __name__ == "__main__":
    main()
