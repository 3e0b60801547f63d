"""Preprocessing and reading: throughput against a bare loop, memory, and shuffled batches.

    python bench/preprocess.py [--images 20000] [--output bench/results/preprocess.json]

- `decode_ratio`: images a second of the step `preprocess` on a local Ray with warm workers, from
  the first shard handed to Ray to the last one done, over cores x the rate of a bare loop in one
  process that decodes and resizes the same JPEGs (256x256 to 64x64) from memory. It does not count
  from the first shard done: each worker has read its second by then. The loop uses the fastest
  decoder that Pillow offers: libjpeg-turbo with a DCT-scaled draft, when that is faster than the
  full decode. How fast it is depends on where its memory happens to lie, by up to a fifth
  (`docs/decisions/0005-preprocessing.md`), so it runs in LOOPS processes one after another, each
  of which has taken other memory before, and their mean time counts; `of_fastest_ratio` takes the
  fastest of them. The workers' memory lies likewise for as long as they live, so there are SESSIONS
  of Ray, each of one step to warm up and ROUNDS with the loops before and after, whose mean counts,
  Ray being idle meanwhile; the ratio is the median of all rounds. What warms up writes as much as
  they do: memory that a virtual machine's host has not given yet is fifteen times slower to write.
  On a shared host `rounds` tells what share of the cores it took away, which costs two processes
  more than one.
- `side_by_side_ratio`: the same over as many bare loops as there are cores at the same time, which
  share caches and memory as the workers do; `bare_scaling` says what that leaves of each loop.
- `memory_growth`: the largest ratio, over the driver, Ray's daemons, the workers and the object
  store, of peak memory with 20,000 images to that with 2,000; `one_shard` likewise where all
  images are in one tar file.
- `read_images_per_s`: shuffled batches of 256 from 1,000 memory-mapped shards of 1x32x32 images,
  one thread; `open_s` is how long opening those shards takes.

The last line is one JSON object. What it does not show: networks and object stores, other image
sizes, machines with more cores. Images are generated: power-law noise, as photographs have.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import hardware, largest, measure, versions
from PIL import Image

from pipeline.config import load_config
from pipeline.driver import run_config
from pipeline.images import decode_image
from pipeline.settings import Config, DataConfig
from pipeline.shards import ArrowFile, ArrowItems, write_arrow
from pipeline.storage import join_content
from pipeline.workflow import Event

SIDE, RESOLUTION = 256, 64
NUM_BASES = 64  # images made from noise; the others are shifted copies of them
IMAGES_PER_SHARD = 500
NUM_READ_SHARDS, ITEMS_PER_READ_SHARD, BATCH = 1000, 60, 256
LOOPS, LOOP_IMAGES = 8, 400  # of a measurement of the bare loop
SESSIONS, ROUNDS = 6, 2
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        jpegs = make_jpegs(options.images)
        write_shards(here / "many", jpegs, IMAGES_PER_SHARD)
        write_shards(here / "few", jpegs[: len(jpegs) // 10], IMAGES_PER_SHARD)
        write_shards(here / "one_many", jpegs, len(jpegs))
        write_shards(here / "one_few", jpegs[: len(jpegs) // 10], len(jpegs))
        document = {
            **measure_throughput(here, jpegs),
            **measure_memory(here),
            **measure_reading(here),
            "images": len(jpegs),
            "jpeg_bytes_mean": round(sum(map(len, jpegs)) / len(jpegs)),
            "hardware": hardware(),
            "versions": versions("pillow", "pyarrow", "ray", "numpy"),
        }
    if options.output is not None:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def make_jpegs(count: int, side: int = SIDE) -> list[bytes]:
    """Encoded colour images with the spectrum of photographs, no two alike."""
    rng = np.random.default_rng(0)
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    spectrum = 1 / np.maximum(np.hypot(fy, fx), 1 / side)
    bases = []
    for _ in range(NUM_BASES):
        noise = rng.normal(size=(3, side, side))
        waves = np.fft.irfft2(np.fft.rfft2(noise) * spectrum, s=(side, side))
        waves = 0.7 * waves[:1] + 0.3 * waves  # colours go together
        waves = 128 + 48 * (waves - waves.mean()) / waves.std()
        bases.append(waves.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    jpegs = []
    for k in range(count):
        shifted = np.roll(bases[k % NUM_BASES], rng.integers(0, side, 2).tolist(), (0, 1))
        buffer = io.BytesIO()
        Image.fromarray(shifted).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    return jpegs


def write_shards(directory: Path, jpegs: list[bytes], per_shard: int) -> None:
    """Writes WebDataset shards with a class beside each image."""
    directory.mkdir()
    for start in range(0, len(jpegs), per_shard):
        with tarfile.open(directory / f"{start:06d}.tar", "w") as tar:
            for k, jpeg in enumerate(jpegs[start : start + per_shard], start):
                for suffix, content in (("jpg", jpeg), ("cls", str(k % 10).encode())):
                    entry = tarfile.TarInfo(f"{k:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def make_config(directory: Path, shards: str, **data: Any) -> Config:
    """A config of these shards with a storage root of its own."""
    path = directory / f"{shards}.toml"
    path.write_text(
        f'name = "bench"\n[storage]\nroot = "{directory}/root-{shards}"\n'
        f'[data]\nsources = ["{shards}/*.tar"]\nresolution = {RESOLUTION}\n'
    )
    return load_config(path, [f"data.{key}={value}" for key, value in data.items()])


def measure_throughput(directory: Path, jpegs: list[bytes]) -> dict[str, Any]:
    """The step on a warm local Ray beside the bare loop."""
    few = jpegs[:LOOP_IMAGES]
    data = DataConfig(sources=("x",), resolution=RESOLUTION)
    alone = {
        "bare_full": mean_rate(loop_rates(few, partial(bare_decode, draft=False))),
        "bare_draft": mean_rate(loop_rates(few, partial(bare_decode, draft=True))),
        "decode_image": mean_rate(loop_rates(few, partial(decode_image, data=data))),
    }
    bare = partial(bare_decode, draft=alone["bare_draft"] > alone["bare_full"])
    # Ray's workers yield to all else by default, the bare loops beside them do not.
    os.environ.update(RAY_worker_niceness="0")
    rounds = []
    for _ in range(SESSIONS):
        rounds += measure_session(directory, few, bare)
    return {
        **{key: round(float(np.median([row[key] for row in rounds])), 3) for key in rounds[0]},
        "rounds": [{key: round(float(value), 3) for key, value in row.items()} for row in rounds],
        "alone_images_per_s": {kind: round(rate) for kind, rate in alone.items()},
    }


def measure_session(
    directory: Path, jpegs: list[bytes], bare: Callable[[bytes], Any]
) -> list[dict[str, float]]:
    """The rounds of one local Ray, whose workers are warm."""
    import ray

    rounds = []
    ray.init(
        num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    try:
        step_rate(make_config(directory, "many"))  # starts and warms the workers
        shutil.rmtree(directory / "root-many")
        before = measure_loops(jpegs, bare)
        for _ in range(ROUNDS):
            ticks = host_ticks()
            step = step_rate(make_config(directory, "many"))
            all_ticks, stolen = host_ticks() - ticks
            shutil.rmtree(directory / "root-many")  # so that the next round begins anew
            after = measure_loops(jpegs, bare)
            one, fastest, together = (np.array(before) + np.array(after)) / 2
            rounds.append(
                {
                    "side_by_side_ratio": step / together,
                    "bare_scaling": together / (CORES * one),
                    "decode_ratio": step / (CORES * one),
                    "of_fastest_ratio": step / (CORES * fastest),
                    "stolen": stolen / all_ticks,
                }
            )
            print(rounds[-1], file=sys.stderr)
            before = after
    finally:
        ray.shutdown()
    return rounds


def host_ticks() -> np.ndarray:
    """Of all cores since the start: all, and those that the host gave to others."""
    with Path("/proc/stat").open() as file:
        ticks = [int(number) for number in file.readline().split()[1:9]]
    return np.array([sum(ticks), ticks[7]])


def step_rate(config: Config) -> float:
    """Images a second, from the first shard handed to Ray to the last one done."""
    seen: list[float] = []

    def observe(event: Event) -> None:
        if event.kind == "progress":
            seen.append(time.monotonic())

    outcome = run_config(config, ("preprocess",), observer=observe)
    images = sum(outcome.manifests["preprocess"]["metrics"]["counts"].values())
    return images / (seen[-1] - seen[0])


def measure_loops(jpegs: list[bytes], decode: Callable[[bytes], Any]) -> tuple[float, ...]:
    """Images a second of one loop at a time, of the fastest of them, and of one on each core."""
    rates = loop_rates(jpegs, decode)
    together = CORES * mean_rate(loop_rates(jpegs, decode, at_once=CORES))
    return mean_rate(rates), max(rates), together


def mean_rate(rates: list[float]) -> float:
    """That of all images in all loops: of the mean time of one."""
    return len(rates) / sum(1 / rate for rate in rates)


def loop_rates(jpegs: list[bytes], decode: Callable[[bytes], Any], at_once: int = 1) -> list[float]:
    """Images a second of each of LOOPS processes, so many of them at once."""
    context = multiprocessing.get_context("fork")
    barrier, rates = context.Barrier(at_once), context.SimpleQueue()

    def loop(seed: int) -> None:
        with with_other_memory(seed):
            decode(jpegs[0])
            barrier.wait()
            started = time.monotonic()
            for content in jpegs:
                decode(content)
            rates.put(len(jpegs) / (time.monotonic() - started))

    found = []
    for first in range(0, LOOPS, at_once):
        seeds = range(first, first + at_once)
        processes = [context.Process(target=loop, args=(seed,)) for seed in seeds]
        for process in processes:
            process.start()
        found += [rates.get() for _ in processes]
        for process in processes:
            process.join()
    return found


@contextlib.contextmanager
def with_other_memory(seed: int) -> Iterator[None]:
    """Keeps some memory and leaves holes in it, so that what follows lies elsewhere."""
    sizes = np.random.default_rng(seed).integers(1, 65536, 400).tolist()
    kept = [bytes(size) for size in sizes]
    del kept[::2]
    yield
    kept.clear()


def bare_decode(content: bytes, *, draft: bool) -> np.ndarray:
    """The decode and resize that the config asks for, and nothing else."""
    image = Image.open(io.BytesIO(content))
    if draft:
        image.draft("RGB", (2 * RESOLUTION, 2 * RESOLUTION))
    image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def measure_memory(directory: Path) -> dict[str, Any]:
    """Peak memory of every kind of process with few and with many images."""
    document: dict[str, Any] = {}
    for prefix, key in (("", "memory_growth"), ("one_", "one_shard_memory_growth")):
        peaks = {size: peak_memory(directory, f"{prefix}{size}") for size in ("few", "many")}
        ratios = {kind: peaks["many"][kind] / max(peaks["few"][kind], 1) for kind in peaks["few"]}
        document[key] = round(max(ratios.values()), 3)
        document[f"{prefix}peak_mib"] = peaks
    return document


def peak_memory(directory: Path, shards: str) -> dict[str, float]:
    """MiB of the driver, the largest worker, the largest daemon, and the object store."""
    make_config(directory, shards)
    program = str(Path(sys.executable).parent / "raydiffusion")
    root = f"storage.root={directory}/memory-{shards}"
    command = [program, "preprocess", f"{shards}.toml", "--json", "--set", root]
    result = measure(command, str(directory))
    peaks = {"driver": 0.0, "worker": 0.0, "daemon": 0.0}
    for name, kib in result["peak_kib"].items():
        kind = "worker" if name.startswith("ray::") else "daemon"
        if name.startswith("memory-"):  # the last argument of the command, its root
            kind = "driver"
        peaks[kind] = max(peaks[kind], round(kib / 1024, 1))
    print(shards, largest(result["peak_kib"]), file=sys.stderr)
    return {**peaks, "object_store": round(result["object_store_bytes"] / 2**20, 1)}


def measure_reading(directory: Path) -> dict[str, float]:
    """Shuffled batches from many memory-mapped shards, and opening them."""
    rng = np.random.default_rng(0)
    files = []
    for k in range(NUM_READ_SHARDS):
        pixels = rng.integers(0, 256, (ITEMS_PER_READ_SHARD, 1, 32, 32), np.uint8)
        names = [f"{k}.tar/{i}.png" for i in range(len(pixels))]
        path = directory / f"{k}.arrow"
        labels = [i % 10 for i in range(len(pixels))]
        path.write_bytes(join_content(write_arrow(pixels, labels, names)))
        files.append(ArrowFile(path))
    started = time.monotonic()
    items = ArrowItems(files)
    open_s = time.monotonic() - started
    order = rng.permutation(len(items))
    rates = []
    for _ in range(3):
        started = time.monotonic()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            items.gather(order[start : start + BATCH])
        rates.append(len(order) / (time.monotonic() - started))
    return {"read_images_per_s": round(float(np.median(rates))), "open_s": round(open_s, 3)}


if __name__ == "__main__":
    main()
