"""What each setting of a recipe is worth: one changed at a time, at equal cost.

    python bench/settings.py [--recipe digits] [--seeds 1] [--output bench/results/settings.json]
    python bench/settings.py --images 36000 --variants "network: dim 24" "batch 32 + EMA 0.9"

Trains a recipe of examples/ for a part of its time, once as it is and once with each of its
variants, and scores samples against the validation split, so that the test split has no say. Equal
cost is equal images; another network sees as many as cost the same FLOPs. So the result does not
depend on what else the machine does. The recipe as it is is trained with three seeds: a difference
within their spread says nothing. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import train_sides
from machine import hardware, versions

from pipeline.config import load_config
from pipeline.driver import run_config
from pipeline.extractors import extract, load_extractor
from pipeline.models import make_unet
from pipeline.reference import read_features
from pipeline.scores.frechet import frechet_distance, sum_features
from pipeline.storage import LocalStorage

EXAMPLES = train_sides.ROOT / "examples"
NUM_STEPS = 25  # of DDIM
JOIN = " + "  # of the names of variants that are made together
NUM_SEEDS = 3  # of the recipe as it is
COMMON: dict[str, list[str]] = {
    "as it is": [],
    "objective pred_noise": ["diffusion.objective=pred_noise"],
    "schedule linear": ["diffusion.schedule=linear"],
    "schedule sigmoid": ["diffusion.schedule=sigmoid"],
    # Ceilings that the average's warm-up reaches in so few steps: those of recipes are beyond it.
    "EMA 0.9": ["train.ema_decay=0.9"],
    "EMA 0.97": ["train.ema_decay=0.97"],
    "network: dim 24": ["model.dim=24"],
    "network: dim 48": ["model.dim=48"],
}
CLOTHES: dict[str, list[str]] = {
    **COMMON,
    "objective pred_x0": ["diffusion.objective=pred_x0"],
    "weighting uniform": ["diffusion.weighting=uniform"],
    "learning rate 5e-4": ["train.learning_rate=5e-4"],
    "learning rate 2e-3": ["train.learning_rate=2e-3"],
    "not told the labels": ["model.class_conditional=false"],
    "batch 32": ["train.global_batch_size=32"],
    "batch 64": ["train.global_batch_size=64"],
    "network: mults 1, 2, 2": ["model.dim_mults=[1, 2, 2]"],
    "network: attention at two levels": ['model.attention=["none", "full", "full"]'],
}
DIGITS: dict[str, list[str]] = {
    **COMMON,
    "objective pred_v": ["diffusion.objective=pred_v"],
    "weighting uniform": ["diffusion.weighting=uniform"],
    "learning rate 1e-3": ["train.learning_rate=1e-3"],
    "learning rate 4e-3": ["train.learning_rate=4e-3"],
    "cosine decay of the rate": ["train.learning_rate_decay=cosine"],
    "not told the labels": ["model.class_conditional=false"],
    "batch 32": ["train.global_batch_size=32"],
}
LARGER_CLOTHES: dict[str, list[str]] = {
    "weighting uniform": ["diffusion.weighting=uniform"],
    "objective pred_noise": ["diffusion.objective=pred_noise"],
    "schedule linear": ["diffusion.schedule=linear"],
    "no decay of the rate": ["train.learning_rate_decay=constant"],
    "not told the labels": ["model.class_conditional=false"],
}


@dataclass(frozen=True)
class Recipe:
    """What is varied, and for how long it is trained.

    Args:
        config: of the recipe.
        images: that the recipe as it is sees.
        num_samples: that are scored.
        variants: by name, the settings that are another.
        common: settings of all of its trainings here, which are shorter than the recipe's.
    """

    config: Path
    images: int
    num_samples: int
    variants: Mapping[str, list[str]]
    common: Sequence[str] = ()


RECIPES = {
    "clothes": Recipe(train_sides.QUALITY, 12_000, 1000, CLOTHES),
    "clothes-28": Recipe(
        EXAMPLES / "fashion_mnist/fashion_mnist.toml",
        12_000,
        1000,
        LARGER_CLOTHES,
        ("train.num_workers=1", "train.global_batch_size=16", "train.precision=bf16"),
    ),
    "digits": Recipe(EXAMPLES / "digits/digits.toml", 24_000, 512, DIGITS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", choices=RECIPES, default="clothes")
    parser.add_argument("--seeds", type=int, default=1, help="of each variant")
    parser.add_argument("--images", type=int, help="that the recipe as it is sees")
    parser.add_argument(
        "--variants", nargs="+", help=f"by name, or several joined by {JOIN!r}; else all of them"
    )
    parser.add_argument("--threads", type=int, default=train_sides.NUM_THREADS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="goes on with what is there; else temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        recipe = choose(RECIPES[arguments.recipe], arguments.images, arguments.variants)
        rows = measure(recipe, arguments.seeds, arguments.threads, work)
    document = {
        "rows": rows,
        "recipe": recipe.config.name,
        "num_samples": recipe.num_samples,
        "common": list(recipe.common),
        "ddim_steps": NUM_STEPS,
        "hardware": hardware(),
        "versions": versions("torch"),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def choose(recipe: Recipe, images: int | None, names: Sequence[str] | None) -> Recipe:
    """The recipe with another length and some of its variants, where they are given."""
    parts = {name: name.split(JOIN) for name in names or recipe.variants}
    if unknown := {p for several in parts.values() for p in several} - set(recipe.variants):
        known = ", ".join(map(repr, recipe.variants))
        raise SystemExit(f"No variant is called {unknown.pop()!r}. There are {known}.")
    chosen = {
        name: [setting for part in several for setting in recipe.variants[part]]
        for name, several in parts.items()
    }
    variants = {"as it is": [], **chosen}
    return replace(recipe, images=images or recipe.images, variants=variants)


def measure(recipe: Recipe, num_seeds: int, threads: int, work: Path) -> list[dict[str, Any]]:
    """A row for each training: its name, seed, images seen, score and seconds."""
    config = load_config(recipe.config, [*recipe.common, f"storage.root={work / 'root'}"])
    manifests = run_config(config, ("reference",), observer=lambda event: None).manifests
    (work / "data.json").write_text(json.dumps(manifests["preprocess"]))
    storage = LocalStorage(config.storage.root)
    extractor = load_extractor(storage, manifests["features"])
    real = sum_features(read_features(storage, manifests["reference"], "validation"))
    wanted = [("as it is", seed) for seed in range(max(NUM_SEEDS, num_seeds))]
    wanted += [(name, seed) for seed in range(num_seeds) for name in recipe.variants]
    # Rows of the same recipe are gone on with, and of no other.
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
    path = work / f"rows-{digest}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name, seed in dict.fromkeys(wanted):
        images = round(recipe.images / relative_flops(recipe, recipe.variants[name]))
        if any((row["name"], row["seed"], row["images"]) == (name, seed, images) for row in rows):
            continue
        # Each begins with a fresh memory, and not with locks that threads of Ray held.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            done = process.submit(draw, work, recipe, name, seed, images, threads)
            samples, seconds = done.result()
        fid = frechet_distance(real, sum_features(extract(extractor, samples)))
        row = {"name": name, "seed": seed, "images": images, "fid": round(fid, 3)}
        rows.append({**row, "train_s": round(seconds, 1)})
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def draw(
    work: Path, recipe: Recipe, name: str, seed: int, images: int, threads: int
) -> tuple[np.ndarray, float]:
    """Trains and samples: uint8 [N, 1, H, W], and the seconds of the training."""
    settings = [
        *recipe.common,
        *recipe.variants[name],
        f"train.seed={seed}",
        f"evaluate.num_steps={NUM_STEPS}",
        "train.num_workers=1",
    ]
    batch = load_config(recipe.config, settings).train.global_batch_size
    run = train_sides.run_loop(work, recipe.config, settings, images // batch, None, threads)
    return run.sample(recipe.num_samples, 0), run.seconds


def relative_flops(recipe: Recipe, settings: list[str]) -> float:
    """Of the network with these settings over that of the recipe."""
    flops = []
    for given in (settings, []):
        config = load_config(recipe.config, given)
        flops.append(train_sides.count_flops(make_unet(config, 0, 10), config.data.shape))
    return flops[0] / flops[1]


if __name__ == "__main__":
    main()
