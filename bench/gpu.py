"""Training on a GPU beside denoising-diffusion-pytorch and diffusers: speed, share of peak, memory.

    python bench/gpu.py [--sizes 32 64 128] [--output bench/results/gpu.json]

In an environment with both libraries (bench/requirements-peers.txt) and a build of torch for the
GPU. Every row is a process of its own: a library, a size of the images, a precision. Ours is the
whole loop of `pipeline/loop.py`; of the others it is what their training does at each step, in a
loop of our own that has the images in pinned memory already, which favours them. bf16 is autocast,
`compiled` is `torch.compile` of the network. The batch falls with the area of the images.

`images_per_s`   over the steps after the first ones, which compile and choose kernels.
`peak_share`     three times the FLOPs of a forward pass, for forward and backward, times images a
                 second, over what a matrix product of 8192 reaches on this device and in this
                 precision; of fp32 in TF32. Networks differ in their FLOPs: `gflops` are of one
                 forward pass.
`memory_mib`     the most that torch had allocated.
`data_share`     of ours: what the loop waited for batches, whose noise CPUs make, of the time.
`graph_breaks`   of the compiled rows: where torch.compile left the network for Python.

`--device cpu` tries it without a GPU; its numbers mean nothing. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import train_sides
from machine import hardware, versions
from noise_items import NoiseItems
from torch import Tensor, nn

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.loop import Hooks, train_loop
from pipeline.models import make_diffusion, make_unet
from pipeline.precision import autocast
from pipeline.storage import LocalStorage

SIDES = ("ours", "denoising_diffusion_pytorch", "diffusers")
PRECISIONS = ("fp32", "bf16", "bf16 compiled")
DIM, DIM_MULTS = 64, (1, 2, 4, 8)
IMAGES_AT_32 = 256  # in a batch
NUM_ITEMS = 4096
STEPS, WARM_STEPS, ROW = 220, 20, 20
CONFIG = """
name = "gpu"
[data]
sources = ["none"]
resolution = {size}
[model]
dim = {dim}
dim_mults = {dim_mults}
attention = ["none", "none", "none", "full"]
[train]
global_batch_size = {batch}
num_steps = {steps}
checkpoint_every = {steps}
log_every = {row}
precision = "{precision}"
compile = {compile}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--batch", type=int, help="a multiple of 16; else it falls with the area")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)  # side, size, precision
    arguments = parser.parse_args()
    if arguments.row is not None:
        side, size, precision = arguments.row
        print(json.dumps(measure(arguments, side, int(size), precision)))
        return
    device = torch.device(arguments.device)
    is_gpu = device.type == "cuda"
    document = {
        "rows": [
            run_row(side, size, precision)
            for size in arguments.sizes
            for precision in PRECISIONS
            for side in SIDES
        ],
        "device": torch.cuda.get_device_name(device) if is_gpu else arguments.device,
        "hardware": hardware(),
        "versions": versions("torch", "denoising-diffusion-pytorch", "diffusers"),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def run_row(side: str, size: int, precision: str) -> dict[str, Any]:
    """A row from a process of its own, with the command line's options; or why there is none."""
    names = {"side": side, "size": size, "precision": precision}
    command = [sys.executable, *sys.argv, "--row", side, str(size), precision]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    last = lines[-1] if lines else f"ended with {done.returncode}"
    row = {**names, **({"failed": last} if done.returncode else json.loads(last))}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def measure(
    arguments: argparse.Namespace, side: str, size: int, precision: str
) -> dict[str, float | int]:
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    batch = arguments.batch or max(16, IMAGES_AT_32 * 32**2 // size**2)
    is_gpu = device.type == "cuda"
    peak = matmul_flops(dtype, device)
    if is_gpu:  # now that its matrices are gone
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    network = make_network(side, size, arguments.dim)
    flops = train_sides.count_flops(network, (3, size, size))
    shares: dict[str, float] = {}
    if side == "ours":
        rate, shares["data_share"] = rate_of_ours(arguments, size, precision, batch, device)
    else:
        network = network.to(device)
        compiled = torch.compile(network) if precision.endswith("compiled") else network
        loss_of = make_loss(side, size, compiled, device)
        rate = rate_of(
            network, loss_of, NoiseItems((3, size, size), max(NUM_ITEMS, batch)), batch, dtype
        )
    if precision.endswith("compiled"):
        shares["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {
        "batch": batch,
        "images_per_s": round(rate, 1),
        **shares,
        "gflops": round(flops / 1e9, 3),
        "peak_share": round(3 * flops * rate / peak, 4),
        "matmul_tflops": round(peak / 1e12, 1),
        "memory_mib": torch.cuda.max_memory_allocated(device) >> 20 if is_gpu else 0,
    }


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs a second of a large matrix product, the fastest of a few.

    Of float32 as TF32, for that is what torch lets convolutions take.
    """
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(10):
        wait_for(device)
        started = time.perf_counter()
        _ = a @ a
        wait_for(device)
        times.append(time.perf_counter() - started)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / min(times)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_network(side: str, size: int, dim: int) -> nn.Module:
    if side == "ours":
        with tempfile.TemporaryDirectory() as directory:
            return make_unet(make_config(Path(directory), size, dim, "fp32", 16), 0)
    if side == "denoising_diffusion_pytorch":
        from denoising_diffusion_pytorch import Unet  # pyright: ignore

        return Unet(dim, dim_mults=DIM_MULTS, channels=3)
    from diffusers import UNet2DModel  # pyright: ignore

    levels = ["", "", "Attn", ""]  # as its training script: the last but one
    return UNet2DModel(
        sample_size=size,
        layers_per_block=2,
        block_out_channels=tuple(dim * mult for mult in DIM_MULTS),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in levels),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in levels[::-1]),
    )


def make_config(directory: Path, size: int, dim: int, precision: str, batch: int) -> Any:
    path = directory / "gpu.toml"
    text = CONFIG.format(
        size=size,
        dim=dim,
        dim_mults=list(DIM_MULTS),
        batch=batch,
        steps=STEPS,
        row=ROW,
        precision=precision.split()[0],
        compile=str(precision.endswith("compiled")).lower(),
    )
    path.write_text(text)
    return load_config(path)


def rate_of_ours(
    arguments: argparse.Namespace, size: int, precision: str, batch: int, device: torch.device
) -> tuple[float, float]:
    """Images a second of the whole loop, as its own rows tell them, and the share of `data`."""
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as directory:
        config = make_config(Path(directory), size, arguments.dim, precision, batch)
        store = CheckpointStore(LocalStorage(directory), "gpu")
        train_loop(
            config.train,
            make_unet(config, 0),
            make_diffusion(config),
            NoiseItems((3, size, size), max(NUM_ITEMS, batch)),
            store,
            device=device,
            hooks=Hooks(on_row=lambda row, first: rows.append(row)),
        )
        last = store.load(STEPS)
    if last is None or last.environments[-1]["compiled"] != config.train.compile:
        raise RuntimeError("torch.compile failed, and training went on without it")
    counted = rows[WARM_STEPS // ROW : -1]  # the last one waits for the checkpoint
    wall_s = sum(row["wall_s"] for row in counted)
    waited_s = sum(row["seconds"]["data"] for row in counted)
    return batch * ROW * len(counted) / wall_s, round(waited_s / wall_s, 4)


def make_loss(
    side: str, size: int, network: Any, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The loss of a batch in [0, 1], as the library computes it."""
    if side == "denoising_diffusion_pytorch":
        from denoising_diffusion_pytorch import GaussianDiffusion  # pyright: ignore

        return GaussianDiffusion(network, image_size=size).to(device)
    from diffusers import DDPMScheduler  # pyright: ignore

    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def loss_of(images: Tensor) -> Tensor:
        images = images * 2 - 1
        noise = torch.randn_like(images)
        t = torch.randint(0, 1000, (len(images),), device=device)
        output = network(scheduler.add_noise(images, noise, t), t).sample  # pyright: ignore
        return nn.functional.mse_loss(output.float(), noise)

    return loss_of


def rate_of(
    network: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    items: NoiseItems,
    batch: int,
    dtype: torch.dtype,
) -> float:
    """Images a second: loss, gradient, clipping, AdamW and an average of the weights."""
    weights = list(network.parameters())
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    average = [weight.detach().clone() for weight in weights]
    images = torch.from_numpy(items.pixels)  # on the host, as ours are: memory is compared
    if device.type == "cuda":
        images = images.pin_memory()
    started = 0.0
    for number in range(STEPS):
        if number == WARM_STEPS:
            wait_for(device)
            started = time.perf_counter()
        first = batch * number % (len(images) - batch + 1)
        chosen = images[first : first + batch].to(device, non_blocking=True)
        with autocast(dtype, device):
            loss = loss_of(chosen.float() / 255)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-3)  # pyright: ignore
    wait_for(device)
    return batch * (STEPS - WARM_STEPS) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
