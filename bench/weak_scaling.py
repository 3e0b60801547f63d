"""Weak scaling of data-parallel training, simulated for 1 to 128 GPUs from what is measured here.

    python bench/weak_scaling.py [--output bench/results/weak_scaling.json]

The formula, for N ranks with a fixed share of the batch each:

    all_reduce(N) = 2 (N - 1) / N * G / B + 2 (N - 1) * L        a ring
    exposed(N)    = max(0, all_reduce(N) - o * b)
    step(N)       = c + exposed(N),    efficiency(N) = c / step(N)

G bytes of gradients, B bytes a second and L seconds of latency of the slowest link, c seconds of
a step on one rank, b of them in the backward pass, o the share of the backward pass during which
gradients are on their way. c, b, G and o are measured with the network of `train_speed.toml`: o
from two gloo ranks of one thread each, as the part of an all-reduce of G that is over when the
slower one's backward pass is. Gradients travel in buckets of 1 MiB there, to this small network as
torch's 25 MiB to a large one. The loop has torch's, with which nearly all gradients of so small a
network leave when the backward pass is over: `share_hidden_with_torchs_buckets`. Two ranks on two
cores of one machine have no core left for what sends them, nor bandwidth of memory, which
counts against o. So `efficiency_hidden` is given too, with o = 1, as where a GPU computes and a
network card sends: the truth lies between. B and L are those of common links, not measured. Since
a GPU is much faster than a core, efficiencies are also given for assumed c, with G of this network
and of one a hundred times as large. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from machine import hardware
from noise_items import NoiseItems
from torch.nn.parallel import DistributedDataParallel

from pipeline.batches import BatchMaker
from pipeline.config import load_config
from pipeline.models import make_diffusion, make_unet
from pipeline.order import make_order
from pipeline.replica import Replica
from pipeline.settings import TrainConfig
from pipeline.stopwatch import Stopwatch
from pipeline.train import process_group
from pipeline.validation import loss_of

SPEED = Path(__file__).resolve().parent / "train_speed.toml"
LINKS = {"NVLink 4": (450e9, 5e-6), "400 Gb/s": (50e9, 1e-5), "100 Gb/s": (12.5e9, 2e-5)}
WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
ASSUMED_COMPUTE_S = (0.02, 0.1)
STEPS, WARM_STEPS = 40, 5
BUCKET_MIB = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    alone, together = measure(1, BUCKET_MIB), measure(2, BUCKET_MIB)
    as_it_is = measure(2, None)
    hidden = 1 - together["exposed_s"] / together["all_reduce_s"]
    hidden_as_it_is = 1 - as_it_is["exposed_s"] / as_it_is["all_reduce_s"]
    overlap = max(0.0, hidden) * together["all_reduce_s"] / together["backward_s"]
    measured = {
        "gradient_bytes": alone["gradient_bytes"],
        "compute_s": alone["compute_s"],
        "backward_s": alone["backward_s"],
        "two_ranks": together,
        "share_of_all_reduce_hidden": round(hidden, 3),
        "two_ranks_with_torchs_buckets": as_it_is,
        "share_hidden_with_torchs_buckets": round(hidden_as_it_is, 3),
        "overlap": round(min(1.0, overlap), 4),
    }
    backward_share = alone["backward_s"] / alone["compute_s"]
    simulated = []
    for times, gradient_bytes in (
        (1, alone["gradient_bytes"]),
        (100, 100 * alone["gradient_bytes"]),
    ):
        for compute_s in ((alone["compute_s"],) if times == 1 else ()) + ASSUMED_COMPUTE_S:
            for link, (bandwidth, latency_s) in LINKS.items():
                backward_s = backward_share * compute_s
                shares = {"efficiency": min(1.0, overlap), "efficiency_hidden": 1.0}
                simulated.append(
                    {
                        "link": link,
                        "gradient_bytes": gradient_bytes,
                        "compute_s": round(compute_s, 4),
                        **{
                            name: {
                                str(n): efficiency(
                                    n, compute_s, backward_s, gradient_bytes, bandwidth,
                                    latency_s, share,
                                )
                                for n in WORLD_SIZES
                            }
                            for name, share in shares.items()
                        },
                    }
                )  # fmt: skip
    document = {"measured": measured, "simulated": simulated, "hardware": hardware(),
                "versions": {"torch": torch.__version__}}  # fmt: skip
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def efficiency(
    world_size: int,
    compute_s: float,
    backward_s: float,
    gradient_bytes: int,
    bandwidth: float,
    latency_s: float,
    overlap: float,
) -> float:
    """Speed of a rank among so many over its speed alone; see the formula above."""
    if world_size == 1:
        return 1.0
    moved = 2 * (world_size - 1) / world_size * gradient_bytes
    all_reduce_s = moved / bandwidth + 2 * (world_size - 1) * latency_s
    exposed_s = max(0.0, all_reduce_s - overlap * backward_s)
    return round(compute_s / (compute_s + exposed_s), 4)


def measure(world_size: int, bucket_mib: int | None) -> dict[str, Any]:
    """Medians of one rank's steps, with one thread a rank.

    Args:
        world_size: number of ranks.
        bucket_mib: of gradients, at most; None: torch's own, 25 after a first of 1.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "rank0.json"
        ranks = [
            context.Process(target=run_rank, args=(rank, world_size, port, output, bucket_mib))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise SystemExit("A rank failed.")
        return json.loads(output.read_text())


def run_rank(rank: int, world_size: int, port: int, output: Path, bucket_mib: int | None) -> None:
    torch.set_num_threads(1)
    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": world_size}
    buckets = partial(DistributedDataParallel, bucket_cap_mb=bucket_mib)
    with (
        mock.patch("pipeline.replica.DistributedDataParallel", buckets),
        process_group(TrainConfig(), **where),
    ):
        found = time_steps(rank, world_size)
    if rank == 0:
        output.write_text(json.dumps(found))


def time_steps(rank: int, world_size: int) -> dict[str, Any]:
    # Weak scaling: each rank has 32 images, whatever their number.
    config = load_config(SPEED, [f"train.global_batch_size={32 * world_size}"])
    train, diffusion = config.train, make_diffusion(config)
    model = make_unet(config, 0)
    watch = Stopwatch()
    replica = Replica(model, world_size, watch)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    items = NoiseItems(config.data.shape, 4096)
    order = make_order(
        seed=0, counts=items.counts, global_batch_size=train.global_batch_size, shuffle_window=None
    )
    batches = BatchMaker(train, diffusion, items, order, rank, world_size)
    totals, backwards, ready, ended_at = [], [], [], []
    for step in range(WARM_STEPS + STEPS):
        batch = batches.make(step, 0)
        if world_size > 1:
            dist.barrier()
        watch.take()
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(batch, replica.module, diffusion).mean()
        begun = time.perf_counter()
        replica.backward(loss)
        ended = time.perf_counter()
        optimizer.step()
        watch.mark("compute")
        _, parts = watch.take()
        totals.append(time.perf_counter() - started)
        backwards.append(ended - begun - parts["sync"])
        ready.append(replica._last_bucket or ended)  # pyright: ignore[reportPrivateUsage]
        ended_at.append(ended)
    everyone = [torch.tensor(ready, dtype=torch.float64)]
    if world_size > 1:
        everyone = [torch.empty_like(everyone[0]) for _ in range(world_size)]
        dist.all_gather(everyone, torch.tensor(ready, dtype=torch.float64))
    # Ranks of one machine share its clock. Before the last of them has its last gradients nothing
    # can be averaged: what is waited for a slower rank is not what the link costs.
    last_ready = torch.stack(everyone).amax(0).tolist()
    exposed = [end - begin for end, begin in zip(ended_at, last_ready, strict=True)]
    gradient = torch.zeros(sum(p.numel() for p in model.parameters()))
    reduces = []
    for _ in range(STEPS if world_size > 1 else 0):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(gradient)
        reduces.append(time.perf_counter() - started)
    return {
        "gradient_bytes": gradient.numel() * 4,
        "compute_s": median(totals),
        "backward_s": median(backwards),
        "exposed_s": median(exposed),
        "all_reduce_s": statistics.median(reduces) if reduces else 0.0,
    }


def median(values: list[float]) -> float:
    return round(statistics.median(values[WARM_STEPS:]), 5)


if __name__ == "__main__":
    sys.exit(main())
