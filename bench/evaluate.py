"""Evaluation: sampling against a bare loop and against diffusers' pipeline, and features.

    python bench/evaluate.py --peers peers/bin/python [--output bench/results/evaluate.json]

In the project's environment; `--peers` is the interpreter of one with diffusers
(bench/requirements-peers.txt). Two CPU threads; medians of alternating rounds.

`sampling_vs_bare`       images a second of the step `evaluate` on a local Ray, since each worker
                         has drawn a chunk and to the last one, features and files included, over
                         those of the bare sampler: as many processes of one thread each that do
                         nothing else, or one process with all threads, whichever is faster.
`sampling_vs_diffusers`  images a second of our sampler in one process over diffusers' DDIMPipeline
                         with a network of as many FLOPs (within 5%), in the same environment and
                         with the same threads; `step_vs_diffusers` is that of the whole step.
`features_vs_bare`       items a second of the reference's task, from Arrow files on disk to
                         features on disk, over those of the extractor's forward passes on the same
                         items in memory, one thread; `extract_vs_bare` is without the disk.

Fashion-MNIST's shape, 1x16x16, chunks of 64, DDIM-50. The last line is one JSON object. What it
does not show: GPUs, larger images, several nodes.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import hardware

from pipeline.config import load_config
from pipeline.dataset import open_split, read_dataset
from pipeline.driver import make_plan, run_config
from pipeline.extractors import extract, load_extractor
from pipeline.extractors.loading import BATCH
from pipeline.feature_cache import FeatureCache, list_files, make_features
from pipeline.host import torch_threads
from pipeline.storage import open_storage
from pipeline.workflow import Event, read_manifest

BENCH = Path(__file__).resolve().parent
SPEED = BENCH / "train_speed.toml"
PROCESSES = 2
FLOPS: dict[str, int] = {}  # of a forward pass of one image, by side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", required=True, help="interpreter with diffusers")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="kept and used again; else a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=512, help="of the step, each round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        document = measure(arguments, work) | {
            "samples": arguments.samples,
            "hardware": {**hardware(), "threads": PROCESSES},
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "ray")},
            },
        }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All ratios, and the rates they come from."""
    import ray

    rates: dict[str, list[float]] = {}
    # Ray's workers yield to all else by default, the bare loops beside them do not.
    os.environ.update(RAY_worker_niceness="0")
    ray.init(
        num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    try:
        prepare(work, arguments.samples)
        for number in range(arguments.rounds):
            found = {
                "step": step_rate(work, arguments.samples, number),
                "bare_processes": bare_rate(sys.executable, processes=PROCESSES),
                "bare_threads": bare_rate(sys.executable, processes=1),
                "ours": bare_rate(arguments.peers, processes=1),
                "diffusers": bare_rate(arguments.peers, processes=1, side="diffusers"),
                **feature_rates(work),
            }
            for name, rate in found.items():
                rates.setdefault(name, []).append(rate)
            print(f"round {number + 1}: {found}", file=sys.stderr, flush=True)
    finally:
        ray.shutdown()
    bare = [max(pair) for pair in zip(rates["bare_processes"], rates["bare_threads"], strict=True)]

    if not 0.95 <= FLOPS["ours"] / FLOPS["diffusers"] <= 1.05:
        raise SystemExit(f"the networks are not of equal FLOPs: {FLOPS}")

    def ratio(ours: list[float], theirs: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)

    return {
        "sampling_vs_diffusers": ratio(rates["ours"], rates["diffusers"]),
        "sampling_vs_bare": ratio(rates["step"], bare),
        "features_vs_bare": ratio(rates["features"], rates["extract_bare"]),
        "extract_vs_bare": ratio(rates["extract"], rates["extract_bare"]),
        "flops_vs_diffusers": round(FLOPS["ours"] / FLOPS["diffusers"], 3),
        "step_vs_diffusers": ratio(rates["step"], rates["diffusers"]),
        "items_per_s": {name: round(statistics.median(r), 1) for name, r in rates.items()},
        "all_items_per_s": {name: [round(r, 1) for r in all_] for name, all_ in rates.items()},
    }


def settings(work: Path, samples: int) -> list[str]:
    return [
        f"storage.root={work / 'root'}", "train.num_steps=20", "train.checkpoint_every=20",
        f"evaluate.num_samples={samples}", "features.num_steps=300",
    ]  # fmt: skip


def prepare(work: Path, samples: int) -> None:
    """A network, an extractor and a reference, and warm workers."""
    config = load_config(SPEED, settings(work, samples))
    run_config(config, ("evaluate",), observer=lambda event: None)


def step_rate(work: Path, samples: int, number: int) -> float:
    """Images a second of the step, since each worker has drawn a chunk and to the last."""
    changed = [*settings(work, samples), f"evaluate.seed={time.time_ns() % 10**9 + number}"]
    seen: list[tuple[float, int]] = []

    def observe(event: Event) -> None:
        if event.kind == "progress" and event.step == "evaluate":
            seen.append((time.monotonic(), event.fields["done"]))

    run_config(load_config(SPEED, changed), ("evaluate",), observer=observe)
    # Since every worker has drawn a chunk: what they drew before does not count.
    (first, before), (last, done) = seen[PROCESSES], seen[-1]
    return (done - before) / (last - first)


def bare_rate(interpreter: str, *, processes: int, side: str = "ours") -> float:
    """Images a second of samplers that do nothing else, side by side."""
    threads = PROCESSES // processes
    command = [interpreter, str(BENCH / "evaluate_sides.py"), side, "--threads", str(threads)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in started:  # all are warm before one begins
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    rates = []
    for process in started:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{side} failed")
        found = json.loads(out.splitlines()[-1])
        rates.append(found["images_per_s"])
        FLOPS[side] = found["flops"]
    return sum(rates)


@torch.inference_mode()
def feature_rates(work: Path) -> dict[str, float]:
    """Of the test split: the reference's task, `extract`, and forward passes alone."""
    storage = open_storage(str(work / "root"))
    config = load_config(SPEED, settings(work, BATCH))
    manifests = {
        p.step.name: read_manifest(storage, p.step.name, p.key)
        for p in make_plan(config, ("reference",)).steps
    }
    data, features = manifests["preprocess"], manifests["features"]
    assert data is not None
    assert features is not None
    document, cache = read_dataset(storage, data), FeatureCache(storage, features)
    files = [file for file in list_files(document) if file.split == "test"]
    with contextlib.closing(
        open_split(storage, data, "test", whole=True, cache_bytes=config.data.cache_bytes)
    ) as split:
        images = split.gather(np.arange(len(split)))
    extractor = load_extractor(storage, features)
    rates = {}
    with torch_threads(1):
        for name in ("extract_bare", "extract", "features") * 2:
            for file in files if name == "features" else ():
                storage.delete(cache.path_of(file))
            started = time.perf_counter()
            if name == "features":
                make_features(storage.uri, features, files, config.data.cache_bytes)
            elif name == "extract":
                extract(extractor, images)
            else:
                for start in range(0, len(images), BATCH):
                    extractor(torch.from_numpy(images[start : start + BATCH]))
            rates[name] = len(images) / (time.perf_counter() - started)
    return rates


if __name__ == "__main__":
    main()
