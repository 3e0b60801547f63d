"""One side of `bench/evaluate.py`: samples in a process of its own, as fast as it can.

    python bench/evaluate_sides.py ours|diffusers --threads N

It warms up, prints a line, waits for one, and samples; the last line is one JSON object.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TQDM_DISABLE"] = "1"

import torch
from train_sides import (
    EQUAL_WIDTHS,
    RESOLUTION,
    SPEED,
    count_flops,
    diffusers_network,
)

CHUNK, CHUNKS, NUM_STEPS = 64, 4, 50


def ours() -> tuple[Callable[[int], None], int]:
    from pipeline.config import load_config
    from pipeline.host import keep_freed_memory
    from pipeline.models import make_unet
    from pipeline.sampling import sample_items

    config = load_config(SPEED)
    model = make_unet(config, 0).eval()
    keep_freed_memory()

    def sample(chunk: int) -> None:
        with torch.inference_mode():
            sample_items(config, model, range(chunk * CHUNK, (chunk + 1) * CHUNK))

    assert config.evaluate.num_steps == NUM_STEPS
    return sample, count_flops(model)


def diffusers() -> tuple[Callable[[int], None], int]:
    from diffusers import DDIMPipeline, DDIMScheduler  # pyright: ignore

    pipeline = DDIMPipeline(diffusers_network(EQUAL_WIDTHS).eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def sample(chunk: int) -> None:
        generator = torch.Generator().manual_seed(chunk)
        images = pipeline(
            batch_size=CHUNK, generator=generator, num_inference_steps=NUM_STEPS,
            output_type="np",
        ).images  # fmt: skip
        assert images.shape[:3] == (CHUNK, RESOLUTION, RESOLUTION)

    return sample, count_flops(pipeline.unet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sample, flops = SIDES[arguments.side]()
    sample(0)
    print("warm", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    for chunk in range(CHUNKS):
        sample(chunk)
    rate = CHUNK * CHUNKS / (time.perf_counter() - started)
    print(json.dumps({"images_per_s": rate, "flops": flops}))


SIDES = {"ours": ours, "diffusers": diffusers}

if __name__ == "__main__":
    main()
