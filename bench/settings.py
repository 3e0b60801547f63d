"""What each setting of a recipe is worth: one changed at a time, at equal cost.

    python bench/settings.py [--images 12000] [--seeds 1] [--output bench/results/settings.json]

Trains examples/fashion_mnist/ten_minutes.toml for a part of its time, with cosine decay to the end,
once as it is and once with each of VARIANTS, and scores samples against the validation split, so
that the test split has no say. Equal cost is equal images; another network sees as many as cost the
same FLOPs. So the result does not depend on what else the machine does. The recipe as it is is
trained with three seeds: a difference within their spread says nothing. The last line is one JSON
object.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import train_sides
from machine import hardware, versions
from train import prepare

from pipeline.config import load_config
from pipeline.extractors import extract, load_extractor
from pipeline.models import make_unet
from pipeline.reference import read_features
from pipeline.scores.frechet import frechet_distance, sum_features

RECIPE = train_sides.QUALITY
NUM_SAMPLES = 1000
NUM_STEPS = 25  # of DDIM
NUM_SEEDS = 3  # of the recipe as it is
VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "objective pred_noise": ["diffusion.objective=pred_noise"],
    "objective pred_x0": ["diffusion.objective=pred_x0"],
    "schedule linear": ["diffusion.schedule=linear"],
    "schedule sigmoid": ["diffusion.schedule=sigmoid"],
    "weighting uniform": ["diffusion.weighting=uniform"],
    "EMA 0.99": ["train.ema_decay=0.99"],
    "EMA 0.9995": ["train.ema_decay=0.9995"],
    "learning rate 5e-4": ["train.learning_rate=5e-4"],
    "learning rate 2e-3": ["train.learning_rate=2e-3"],
    "network: dim 24": ["model.dim=24"],
    "network: dim 48": ["model.dim=48"],
    "network: mults 1, 2, 2": ["model.dim_mults=[1, 2, 2]"],
    "network: attention at two levels": ['model.attention=["none", "full", "full"]'],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=12_000, help="that the recipe sees")
    parser.add_argument("--seeds", type=int, default=1, help="of each variant")
    parser.add_argument("--threads", type=int, default=train_sides.NUM_THREADS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="goes on with what is there; else temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = measure(arguments, work)
    document = {
        "rows": rows,
        "recipe": RECIPE.name,
        "num_samples": NUM_SAMPLES,
        "ddim_steps": NUM_STEPS,
        "hardware": hardware(),
        "versions": versions("torch"),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def measure(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row for each training: its name, seed, images seen and score."""
    manifests, storage = prepare(work, ("reference",))
    extractor = load_extractor(storage, manifests["features"])
    real = sum_features(read_features(storage, manifests["reference"], "validation"))
    wanted = [("as it is", seed) for seed in range(max(NUM_SEEDS, arguments.seeds))]
    wanted += [(name, seed) for seed in range(arguments.seeds) for name in VARIANTS]
    path = work / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name, seed in dict.fromkeys(wanted):
        if any((row["name"], row["seed"]) == (name, seed) for row in rows):
            continue
        images = round(arguments.images / relative_flops(VARIANTS[name]))
        settings = [*VARIANTS[name], f"train.seed={seed}"]
        with ProcessPoolExecutor(1) as process:  # each begins with a fresh memory
            samples = process.submit(draw, work, settings, images, arguments.threads).result()
        fid = frechet_distance(real, sum_features(extract(extractor, samples)))
        rows.append({"name": name, "seed": seed, "images": images, "fid": round(fid, 3)})
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def draw(work: Path, settings: list[str], images: int, threads: int) -> np.ndarray:
    """Trains and samples; uint8 [NUM_SAMPLES, 1, 16, 16]."""
    train_sides.NUM_THREADS = threads
    settings = [*settings, f"evaluate.num_steps={NUM_STEPS}"]
    batch = load_config(RECIPE, settings).train.global_batch_size
    run = train_sides.run_loop(work, RECIPE, settings, images // batch, None)
    return run.sample(NUM_SAMPLES, 0)


def relative_flops(settings: list[str]) -> float:
    """Of the network with these settings over that of the recipe."""
    networks = [make_unet(load_config(RECIPE, s), 0, 10) for s in (settings, [])]
    ours, recipe = map(train_sides.count_flops, networks)
    return ours / recipe


if __name__ == "__main__":
    main()
