"""Training against denoising-diffusion-pytorch and diffusers, side by side on two CPU threads.

    python bench/train.py --peers peers/bin/python [--output bench/results/train.json]
    python bench/train.py --peers peers/bin/python --quality [--output bench/results/quality.json]

In the project's environment; `--peers` is the interpreter of one with both libraries
(bench/requirements-peers.txt), in which every side of a comparison runs, ours too, each in a
process of its own and one after another. Fashion-MNIST at 16x16.

Speed, in images per second of the whole loop (data, noise, gradient, optimiser, EMA), batch 64,
medians of the ratios of alternating rounds:

`vs_denoising_diffusion_pytorch`  over its Trainer, with equal weights.
`vs_diffusers`                    over what its unconditional script does, with as many FLOPs:
                                  `flops` of a forward pass of one image, refused beyond 5%.
`ray_overhead`, `data_overhead`   of a training under Ray Train: the shares of its steps' time
                                  that are spent in the adapter's callbacks, and waiting for data.

Quality (`--quality`): FID after as many seconds of training, by one extractor (the data set's
classifier, trained by the step `features`) against the test split, 1,000 samples, DDIM-50.
`fid_denoising_diffusion_pytorch` and `fid_diffusers` are with the recipes that are their defaults,
and with networks of a size for these images: those of their documentation see a tenth as many in
the time (`--sides ddp_default_large ddp_recipe_large`). The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import hardware
from PIL import Image

from pipeline.config import load_config
from pipeline.dataset import open_split
from pipeline.driver import run_config
from pipeline.extractors import extract, load_extractor
from pipeline.reference import read_features
from pipeline.scores.frechet import frechet_distance, sum_features
from pipeline.storage import LocalStorage
from pipeline.workflow import read_artifact

BENCH = Path(__file__).resolve().parent
SPEED = BENCH / "train_speed.toml"
NUM_SAMPLES = 1000
EQUAL_WITHIN = 0.05  # FLOPs of networks that are compared as equals
SPEED_SIDES = ("ddp_speed", "ours_equal_weights", "diffusers_speed", "ours_equal_flops")
RATIOS = {
    "vs_denoising_diffusion_pytorch": ("ours_equal_weights", "ddp_speed"),
    "vs_diffusers": ("ours_equal_flops", "diffusers_speed"),
}
QUALITY_SIDES = ("ours", "ddp_recipe", "ddp_default", "diffusers_default")
DEFAULTS = ("ddp_default", "diffusers_default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", required=True, help="interpreter with both libraries")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", type=Path, help="kept and used again; else a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of each side and round")
    parser.add_argument("--ray-steps", type=int, default=300)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seconds", type=float, default=600, help="of training, for --quality")
    parser.add_argument("--sides", nargs="+", default=QUALITY_SIDES, help="for --quality")
    parser.add_argument("--picture", type=Path, help="of the first samples, for --quality")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = measure_quality(arguments, work) if arguments.quality else measure(arguments, work)
    document = {
        **found,
        "hardware": {**hardware(), "threads": 2},
        "versions": {
            "python": platform.python_version(),
            "ray": version("ray"),
            "torch of the project": version("torch"),
            **versions_of(arguments.peers),
        },
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Speed and overheads."""
    flops = run_side(arguments.peers, "flops", work, [])
    if max(flops.values()) > (1 + EQUAL_WITHIN) * min(flops.values()):
        raise SystemExit(
            f"The networks that are compared as equals have {json.dumps(flops)} FLOPs. Change "
            "EQUAL_WIDTHS in bench/train_sides.py or model.dim_mults in bench/train_speed.toml."
        )
    prepare(work, ("preprocess",))
    speeds: dict[str, list[float]] = {side: [] for side in SPEED_SIDES}
    parts: list[dict[str, float]] = []
    for number in range(arguments.rounds):
        for side in SPEED_SIDES:
            facts = run_side(arguments.peers, side, work, ["--steps", str(arguments.steps)])
            speeds[side].append(facts["images_per_s"])
        parts.append(train_under_ray(work, number, arguments.ray_steps))
        say(f"round {number + 1}: {json.dumps({s: v[-1] for s, v in speeds.items()})} {parts[-1]}")
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    shares = {name: round(statistics.median(part[name] for part in parts), 5) for name in parts[0]}
    return {
        "ray_overhead": shares["callbacks"],
        "data_overhead": shares["data"],
        **{name: median_ratio(speeds, *sides) for name, sides in RATIOS.items()},
        "ratios_of_medians": {
            name: round(medians[ours] / medians[theirs], 3)
            for name, (ours, theirs) in RATIOS.items()
        },
        "flops": flops,
        "images_per_s": medians,
        "all_images_per_s": speeds,
        "shares_under_ray": shares,
        "all_shares_under_ray": [
            {name: round(share, 5) for name, share in part.items()} for part in parts
        ],
    }


def median_ratio(speeds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Over the rounds: what a round has in common, the machine's mood, cancels out."""
    pairs = zip(speeds[ours], speeds[theirs], strict=True)
    return round(statistics.median(mine / other for mine, other in pairs), 3)


def measure_quality(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """FID of every side after as many seconds."""
    manifests, storage = prepare(work, ("reference",))
    features, reference = manifests["features"], manifests["reference"]
    extractor = load_extractor(storage, features)
    real = sum_features(read_features(storage, reference, "test"))
    train = read_features(storage, reference, "train")
    chosen = np.random.default_rng(0).permutation(len(train))[:NUM_SAMPLES]
    sides: dict[str, Any] = {}
    for side in arguments.sides:
        samples = work / f"{side}.npy"
        options = ["--seconds", str(arguments.seconds), "--samples", str(NUM_SAMPLES)]
        facts = run_side(arguments.peers, side, work, [*options, "--output", str(samples)])
        generated = sum_features(extract(extractor, np.load(samples)))
        sides[side] = {"fid": round(frechet_distance(real, generated), 3), **facts}
        say(json.dumps(sides[side]))
    if arguments.picture is not None:
        drawn = {side: np.load(work / f"{side}.npy") for side in sides}
        draw(drawn, {side: facts["fid"] for side, facts in sides.items()}, arguments.picture)
    fids = {side: facts["fid"] for side, facts in sides.items()}
    floor = frechet_distance(real, sum_features(train[chosen]))
    found = {
        "fid_ours": fids.get("ours"),
        "fid_denoising_diffusion_pytorch": fids.get("ddp_default"),
        "fid_diffusers": fids.get("diffusers_default"),
        "fid_denoising_diffusion_pytorch_good_recipe": fids.get("ddp_recipe"),
        "fid_of_real_images": round(floor, 3),
        "train_seconds": arguments.seconds,
        "sides": sides,
        "extractor_accuracy": features["metrics"]["validation_accuracy"],
    }
    if all(side in fids for side in (*DEFAULTS, "ddp_recipe", "ours")):
        found["ours_over_best_default"] = round(fids["ours"] / min(fids[s] for s in DEFAULTS), 3)
        found["ours_over_good_recipe"] = round(fids["ours"] / fids["ddp_recipe"], 3)
    return found


def draw(samples: dict[str, np.ndarray], fids: dict[str, float], path: Path) -> None:
    """The first 64 samples of each side, not chosen."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(samples), figsize=(3 * len(samples), 3.3), squeeze=False)
    for axis, (side, images) in zip(axes[0], samples.items(), strict=True):
        grid = images[:64, 0].reshape(8, 8, *images.shape[2:]).swapaxes(1, 2)
        axis.imshow(grid.reshape(8 * images.shape[2], -1), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{side.replace('_', ' ')}: FID {fids[side]:.1f}", fontsize=9)
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def prepare(work: Path, targets: tuple[str, ...]) -> tuple[dict[str, Any], LocalStorage]:
    """The data set as shards, as an array and as PNG files, made once."""
    config = load_config(SPEED, [f"storage.root={work / 'root'}", "features.num_steps=2000"])
    outcome = run_config(config, targets, observer=lambda event: None)
    storage = LocalStorage(str(work / "root"))
    manifest = outcome.manifests["preprocess"]
    (work / "data.json").write_text(json.dumps(manifest))
    items = open_split(storage, manifest, "train")
    images = items.gather(np.arange(len(items)))
    np.save(work / "train.npy", images)
    if not (work / "png").is_dir():
        staged = work / "png-staged"
        staged.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            Image.fromarray(image[0]).save(staged / f"{number:05d}.png")
        staged.rename(work / "png")
    return outcome.manifests, storage


def run_side(peers: str, side: str, work: Path, options: list[str]) -> dict[str, Any]:
    """Runs a side in a process of its own; what it says last."""
    command = [peers, str(BENCH / "train_sides.py"), side, str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train_under_ray(work: Path, number: int, steps: int) -> dict[str, float]:
    """Shares of the steps' time of one training through Ray Train."""
    settings = [
        f"storage.root={work / 'root'}", f"train.num_steps={steps}", f"train.seed={1000 + number}",
        f"train.checkpoint_every={steps}",
    ]  # fmt: skip
    outcome = run_config(load_config(SPEED, settings), ("train",), observer=lambda event: None)
    manifest = outcome.manifests["train"]
    storage = LocalStorage(str(work / "root"))
    lines = read_artifact(storage, manifest, "metrics.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines][1:]
    wall = sum(row["wall_s"] for row in rows)
    return {name: sum(row["seconds"][name] for row in rows) / wall for name in rows[0]["seconds"]}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def versions_of(peers: str) -> dict[str, str]:
    names = ("torch", "denoising-diffusion-pytorch", "diffusers", "accelerate")
    code = (
        "import json; from importlib.metadata import version; "
        f"print(json.dumps({{n: version(n) for n in {names}}}))"
    )
    done = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
