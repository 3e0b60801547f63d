"""One side of `bench/train.py`: trains in a process of its own and says what came of it.

    python bench/train_sides.py SIDE WORK [--steps N | --seconds S] [--samples N]
    python bench/train_sides.py flops WORK

Runs in an environment with the peers (bench/requirements-peers.txt). `WORK` is what `train.py`
prepared: a storage root with Fashion-MNIST at 16x16 and its images as PNG files. With `--steps`
it measures images per second of the whole loop; with `--seconds` it trains for so long, by the
clock, and draws samples with DDIM-50. `flops` trains nothing and counts those of the networks that
are compared as equals. The last line is one JSON object.

The sides of denoising-diffusion-pytorch (DDP) and diffusers:

`ddp_trainer`       its Trainer, its defaults but for what is given here.
`ddp_recipe`        its network and process in a loop of our own, with a good recipe: AdamW 1e-3,
                    warm-up 100, cosine decay to the end, batch 32, EMA min(0.999, (1+k)/(10+k)).
`diffusers_script`  what its unconditional training script does: AdamW 1e-4 with betas (0.95,
                    0.999) and weight decay 1e-6, warm-up 500 and cosine decay, EMA of power 3/4,
                    batch 16, pred_noise, linear betas.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

NUM_THREADS = 2
RESOLUTION = 16
BATCH = 64  # of the comparisons of speed
SMALL = {"dim": 32, "dim_mults": (1, 2, 4)}
LARGE = {"dim": 64, "dim_mults": (1, 2, 4, 8)}  # the library's README
NUM_SAMPLE_STEPS = 50
WARM_STEPS = 10  # that do not count
TRIAL_STEPS = 200  # to learn how many fit into the time
SHARE_OF_TIME = 0.97  # that is planned with
SAMPLED_AT_ONCE = 64
EQUAL_WIDTHS = (32, 64, 64)  # diffusers' network with as many FLOPs as that of SPEED
SPEED = ROOT / "bench" / "train_speed.toml"
QUALITY = ROOT / "examples" / "fashion_mnist" / "ten_minutes.toml"


class OutOfTimeError(Exception):
    """Ends a trainer that knows steps but no clock."""


@dataclass
class Clock:
    """Counts steps and says when it is enough."""

    steps: int | None
    seconds: float | None

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Training begins now."""
        self.times: list[float] = []
        self.started = time.perf_counter()

    def step(self) -> None:
        """Called after each optimiser step."""
        self.times.append(time.perf_counter())
        if self.is_over:
            raise OutOfTimeError

    @property
    def is_over(self) -> bool:
        """Whether the steps or the seconds are used up."""
        if self.steps is not None:
            return len(self.times) >= self.steps
        assert self.seconds is not None
        return self.elapsed >= self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self.started

    def images_per_s(self, batch: int) -> float:
        """Over all steps but the first few."""
        times = self.times[min(WARM_STEPS, len(self.times) // 2) :]
        return batch * (len(times) - 1) / (times[-1] - times[0])


@dataclass
class Trained:
    """What a side gives back: a sampler, and facts."""

    sample: Callable[[int, int], np.ndarray]  # count, seed: uint8 [count, 1, 16, 16]
    facts: dict[str, Any]


def ddp_network(dim: int, dim_mults: tuple[int, ...]) -> nn.Module:
    from denoising_diffusion_pytorch import Unet  # pyright: ignore

    torch.manual_seed(0)
    return Unet(dim, dim_mults=dim_mults, channels=1)


def ddp_process(network: nn.Module, **options: Any) -> Any:
    from denoising_diffusion_pytorch import GaussianDiffusion  # pyright: ignore

    return GaussianDiffusion(
        network, image_size=RESOLUTION, sampling_timesteps=NUM_SAMPLE_STEPS, **options
    )


def ddp_sampler(process: Any) -> Callable[[int, int], np.ndarray]:
    def sample(count: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        with torch.inference_mode():
            images = [process.eval().sample(batch_size=n) for n in chunks_of(count)]
        return quantise(torch.cat(images) * 2 - 1)

    return sample


def ddp_trainer(work: Path, clock: Clock, network: nn.Module, **options: Any) -> Trained:
    from denoising_diffusion_pytorch import Trainer  # pyright: ignore

    process = ddp_process(network)
    trainer = Trainer(
        process,
        str(work / "png"),
        train_num_steps=10**9,
        save_and_sample_every=10**9,
        calculate_fid=False,
        results_folder=str(work / "ddp"),
        **options,
    )
    update = trainer.ema.update

    def counted() -> None:
        update()
        clock.step()

    trainer.ema.update = counted
    clock.start()
    with contextlib.suppress(OutOfTimeError):
        trainer.train()
    return Trained(ddp_sampler(trainer.ema.ema_model), {"batch": trainer.batch_size})


def ddp_recipe(work: Path, clock: Clock, network: nn.Module) -> Trained:
    process = ddp_process(network)
    images = load_images(work).float().div(255)  # the process wants [0, 1]
    optimizer = torch.optim.AdamW(process.parameters(), lr=1e-3, fused=True)
    ema = copy.deepcopy(process).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    clock.start()
    assert clock.seconds is not None
    with contextlib.suppress(OutOfTimeError):
        while True:
            k = len(clock.times)
            share = min(1.0, clock.elapsed / clock.seconds)
            lr = 1e-3 * min(1, (k + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = images[torch.randint(len(images), (32,), generator=g)]
            optimizer.zero_grad()
            process(batch).backward()
            nn.utils.clip_grad_norm_(process.parameters(), 1.0)
            optimizer.step()
            decay = min(0.999, (1 + k) / (10 + k))
            with torch.no_grad():
                averages, weights = list(ema.parameters()), list(process.parameters())
                torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore
            clock.step()
    return Trained(ddp_sampler(ema), {"batch": 32})


def diffusers_network(widths: tuple[int, ...]) -> nn.Module:
    from diffusers import UNet2DModel  # pyright: ignore

    torch.manual_seed(0)
    levels = len(widths)
    has_attention = [level == levels - 2 for level in range(levels)]  # as the script: one of them
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in has_attention[::-1]),
    )


class Pictures(torch.utils.data.Dataset[Tensor]):
    """The PNG files, decoded when they are asked for, as the script's transform makes them."""

    def __init__(self, directory: Path) -> None:
        from torchvision import transforms  # pyright: ignore

        self.paths = sorted(directory.glob("*.png"))
        self.transform = transforms.Compose(
            [
                transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(RESOLUTION),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("L"))


def diffusers_script(work: Path, clock: Clock, network: nn.Module, batch_size: int) -> Trained:
    from accelerate import Accelerator  # pyright: ignore
    from diffusers import DDIMScheduler, DDPMScheduler  # pyright: ignore
    from diffusers.optimization import get_scheduler  # pyright: ignore
    from diffusers.training_utils import EMAModel  # pyright: ignore

    accelerator = Accelerator()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    average = EMAModel(
        network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    loader = torch.utils.data.DataLoader(Pictures(work / "png"), batch_size, shuffle=True)
    # The script's default is 100 epochs, whose cosine hardly falls in so short a time.
    rates = get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=100 * len(loader)
    )
    network, optimizer, loader, rates = accelerator.prepare(network, optimizer, loader, rates)
    clock.start()

    def step(images: Tensor) -> None:
        with accelerator.accumulate(network):
            noise = torch.randn_like(images)
            t = torch.randint(0, 1000, (len(images),)).long()
            output = network(scheduler.add_noise(images, noise, t), t).sample
            loss = nn.functional.mse_loss(output.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        average.step(network.parameters())
        loss.detach().item()  # the script logs it

    network.train()
    with contextlib.suppress(OutOfTimeError):
        while True:
            for images in loader:
                step(images)
                clock.step()

    def sample(count: int, seed: int) -> np.ndarray:
        average.copy_to(network.parameters())
        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(NUM_SAMPLE_STEPS)
        generator = torch.Generator().manual_seed(seed)
        images = []
        for n in chunks_of(count):
            x = torch.randn(n, 1, RESOLUTION, RESOLUTION, generator=generator)
            with torch.inference_mode():
                for t in ddim.timesteps:
                    x = ddim.step(network.eval()(x, t).sample, t, x).prev_sample
            images.append(x)
        return quantise(torch.cat(images))

    return Trained(sample, {"batch": batch_size})


def ours(arguments: argparse.Namespace, config_path: Path, network: nn.Module | None) -> Trained:
    """The whole loop in one process, from real shards, without Ray.

    Args:
        arguments: of the command line; a number of seconds becomes one of steps by a trial.
        config_path: of the recipe.
        network: in place of the configured one.
    """
    steps = arguments.steps
    if steps is None:
        trial = run_trial(arguments)
        # What comes before the first step, compilation above all, is part of the time.
        before_s = trial["seconds"] - TRIAL_STEPS * trial["batch"] / trial["images_per_s"]
        left_s = SHARE_OF_TIME * arguments.seconds - before_s
        steps = int(left_s * trial["images_per_s"] / trial["batch"])
    run = run_loop(arguments.work, config_path, arguments.set, steps, network)
    return Trained(
        run.sample,
        {
            "batch": run.config.global_batch_size,
            "steps": steps,
            "seconds": round(run.seconds, 1),
            "images_per_s": round(run.images_per_s, 1),
            "parts": run.parts,
        },
    )


def run_trial(arguments: argparse.Namespace) -> dict[str, Any]:
    """A short training in a process of its own, whose compiled code is not used again."""
    command = [sys.executable, __file__, arguments.side, str(arguments.work)]
    command += ["--steps", str(TRIAL_STEPS), "--set", *arguments.set]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Run:
    """A training of ours."""

    config: Any
    seconds: float  # with what comes before the first step
    images_per_s: float
    parts: dict[str, float]  # shares of the time
    sample: Callable[[int, int], np.ndarray]


def run_loop(
    work: Path,
    config_path: Path,
    overrides: list[str],
    steps: int,
    network: nn.Module | None,
    threads: int = NUM_THREADS,
) -> Run:
    from pipeline.checkpoints import CheckpointStore
    from pipeline.config import load_config
    from pipeline.dataset import class_counts, open_split, read_dataset
    from pipeline.host import torch_threads
    from pipeline.loop import Hooks, train_loop
    from pipeline.models import make_diffusion, make_unet
    from pipeline.sampling import draw_labels, sample_items
    from pipeline.storage import LocalStorage

    storage = LocalStorage(str(work / "root"))
    manifest = json.loads((work / "data.json").read_text())
    settings = [*overrides, f"train.num_steps={steps}", f"train.checkpoint_every={steps}"]
    config = load_config(config_path, settings)
    counts = class_counts(read_dataset(storage, manifest), "train")
    num_classes = len(counts) if config.model.class_conditional else None
    model: Any = network or make_unet(config, config.train.seed, num_classes)
    store = CheckpointStore(storage, f"bench/{uuid.uuid4().hex}")
    rows: list[Any] = []
    items = open_split(storage, manifest, "train")
    started = time.perf_counter()
    with torch_threads(threads):
        train_loop(
            config.train,
            model,
            make_diffusion(config, num_classes),
            items,
            store,
            hooks=Hooks(on_row=lambda row, first: rows.append(row)),
        )
    seconds = time.perf_counter() - started
    checkpoint = store.load(steps)
    assert checkpoint is not None
    model.load_state_dict(dict(checkpoint.ema))
    counted = rows[1:] or rows
    wall = sum(row["wall_s"] for row in counted)
    images = rows[-1]["images_seen"] - (rows[0]["images_seen"] if len(rows) > 1 else 0)

    def sample(count: int, seed: int) -> np.ndarray:
        drawn = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"seed": seed})}
        )
        chunks = []
        first = 0
        for n in chunks_of(count):
            numbers, first = range(first, first + n), first + n
            labels = draw_labels(counts, seed, numbers) if num_classes else None
            chunks.append(sample_items(drawn, model, numbers, class_labels=labels))
        return quantise(torch.cat(chunks))

    parts = {
        name: round(sum(row["seconds"][name] for row in counted) / wall, 4)
        for name in counted[0]["seconds"]
    }
    return Run(config.train, seconds, images / wall, parts, sample)


def ours_with_ddp_weights(dim: int, dim_mults: tuple[int, ...]) -> nn.Module:
    from diffusion_core import UNet
    from diffusion_core.interop_unet import convert_unet

    config, weights = convert_unet(ddp_network(dim, dim_mults).state_dict())
    network = UNet(config)
    network.load_state_dict(weights)
    return network


def flops_of_equals() -> dict[str, int]:
    """Of a forward pass of one image, for each side of the comparison with as many."""
    from pipeline.config import load_config
    from pipeline.models import make_unet

    return {
        "ours_equal_flops": count_flops(make_unet(load_config(SPEED), 0)),
        "diffusers_speed": count_flops(diffusers_network(EQUAL_WIDTHS)),
    }


def count_flops(network: nn.Module, shape: tuple[int, ...] = (1, RESOLUTION, RESOLUTION)) -> int:
    """Of a forward pass of one image."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    x, t = torch.randn(1, *shape), torch.zeros(1, dtype=torch.long)
    plain = sdpa_kernel(SDPBackend.MATH)  # not every version counts fused attention
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
        network(x, t)
    return counter.get_total_flops()


def load_images(work: Path) -> Tensor:
    """The training images, uint8 [N, 1, 16, 16]."""
    return torch.from_numpy(np.load(work / "train.npy"))


def chunks_of(count: int) -> list[int]:
    """So many samples, a chunk at a time."""
    whole, rest = divmod(count, SAMPLED_AT_ONCE)
    return [SAMPLED_AT_ONCE] * whole + [rest] * (rest > 0)


def quantise(x: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8, by rounding."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("side", choices=[*SIDES, "flops"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--output", type=Path, help="of the samples, .npy")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    if arguments.side == "flops":
        print(json.dumps(flops_of_equals()))
        return
    if arguments.seconds is not None:  # nothing that was compiled before may be found
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=arguments.work)
    clock = Clock(arguments.steps, arguments.seconds)
    trained = SIDES[arguments.side](arguments, clock)
    facts = {"side": arguments.side, **trained.facts}
    if clock.times:
        facts |= {
            "images_per_s": round(clock.images_per_s(trained.facts["batch"]), 1),
            "steps": len(clock.times),
            "seconds": round(clock.times[-1] - clock.started, 1),
        }
    if arguments.samples:
        started = time.perf_counter()
        np.save(arguments.output, trained.sample(arguments.samples, 0))
        facts["sample_seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(facts))


SIDES: dict[str, Callable[[Any, Clock], Trained]] = {
    "ddp_speed": lambda a, clock: ddp_trainer(
        a.work, clock, ddp_network(**SMALL), train_batch_size=BATCH, augment_horizontal_flip=False
    ),
    "ours_equal_weights": lambda a, clock: ours(a, SPEED, ours_with_ddp_weights(**SMALL)),
    "diffusers_speed": lambda a, clock: diffusers_script(
        a.work, clock, diffusers_network(EQUAL_WIDTHS), BATCH
    ),
    "ours_equal_flops": lambda a, clock: ours(a, SPEED, None),
    "ddp_default": lambda a, clock: ddp_trainer(a.work, clock, ddp_network(**SMALL)),
    "ddp_default_large": lambda a, clock: ddp_trainer(a.work, clock, ddp_network(**LARGE)),
    "ddp_recipe": lambda a, clock: ddp_recipe(a.work, clock, ddp_network(**SMALL)),
    "ddp_recipe_large": lambda a, clock: ddp_recipe(a.work, clock, ddp_network(**LARGE)),
    "diffusers_default": lambda a, clock: diffusers_script(
        a.work, clock, diffusers_network(EQUAL_WIDTHS), 16
    ),
    "ours": lambda a, clock: ours(a, QUALITY, None),
}

if __name__ == "__main__":
    main()
