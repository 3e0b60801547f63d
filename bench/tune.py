"""How much of an experiment's wall time is neither training nor scoring.

Runs `raydiffusion tune` on examples/digits with trials of about the time asked for, ASHA and all,
and beside it the bare loop: as many processes as there were trials at a time, each trains and
scores once and does nothing else. What the experiment's steps and scores would have cost there is
divided by the wall time of the step times the trials at a time. What is left is Ray Tune, starting
processes, opening data, checkpoints, records, and places that stayed empty at the end:
`machinery_share`. `outside_share` is what is left beside the seconds that the trials themselves
trained and scored; opening data, checkpoints and what two trials take from each other are in these.

    python bench/tune.py --trial-s 60 --output bench/results/tune.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "digits" / "digits.toml"
RAYDIFFUSION = Path(sys.executable).parent / "raydiffusion"
PROBE_STEPS = 100


def main() -> None:
    """Measures the speed of the bare loop, then an experiment, then the loop again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial-s", type=float, default=60.0)
    parser.add_argument("--num-trials", type=int, default=6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bare", nargs=2, metavar=("ROOT", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        print(json.dumps(bare_loop(options.bare[0], int(options.bare[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as directory:
        root = Path(directory, "runs")
        _run("evaluate", root, PROBE_STEPS, 1)  # the data set, the extractor and the reference
        probe = _bare_side_by_side(root, PROBE_STEPS, 2)
        steps = max(PROBE_STEPS, round(options.trial_s / probe["train_s"] * PROBE_STEPS))
        before = _bare_side_by_side(root, steps, 2)
        started = time.monotonic()
        found = _run("tune", root, steps, options.num_trials)
        wall_s = time.monotonic() - started
        after = _bare_side_by_side(root, steps, 2)
    bare = {name: (before[name] + after[name]) / 2 for name in before}
    cost, document = found["metrics"]["tune"]["cost"], found["document"]
    num_scores = sum(len(trial["rungs"]) for trial in document["trials"])
    whole = cost["images"] / document["trials"][0]["rungs"][-1]["images_seen"]
    places_s = cost["at_a_time"] * found["step_s"]
    worked_s = whole * bare["train_s"] + num_scores * bare["score_s"]
    rows = {
        "machinery_share": 1 - worked_s / places_s,
        "outside_share": 1 - (cost["train_s"] + cost["score_s"]) / places_s,
        "trial_s": bare["train_s"] + bare["score_s"],
        "whole_trainings": whole,
        "num_scores": num_scores,
        "train_steps": steps,
        "at_a_time": cost["at_a_time"],
        "command_wall_s": wall_s,
        "step_wall_s": found["step_s"],
        "bare": bare,
        "in_trials": {name: cost[name] for name in ("train_s", "score_s")},
        "hardware": hardware(),
        "versions": versions("ray", "torch", "optuna"),
    }
    text = json.dumps(rows, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(json.dumps(rows))


def bare_loop(root: str, steps: int) -> dict[str, float]:
    """Seconds of one training and of one score of it, in this process alone."""
    from pipeline.config import load_config
    from pipeline.driver import make_plan
    from pipeline.loop import Hooks
    from pipeline.storage import LocalStorage
    from pipeline.train import train_in_process
    from pipeline.tune.scoring import open_score
    from pipeline.tune.trial import trial_config
    from pipeline.workflow import read_manifest

    base = load_config(CONFIG, [f"{k}={v}" for k, v in _settings(Path(root), steps, 1).items()])
    config, storage = trial_config(base, []), LocalStorage(root)
    train = config.train.model_copy(update={"checkpoint_every": steps, "fid_every": steps})
    config = config.model_copy(update={"train": train})
    inputs: dict[str, Any] = {
        p.step.name: read_manifest(storage, p.step.name, p.key)
        for p in make_plan(base, ("reference",)).steps
    }
    seconds: dict[str, float] = {}
    with open_score(config, storage, inputs) as score, tempfile.TemporaryDirectory() as scratch:

        def measure(step: int, model: Any) -> None:
            begun = time.monotonic()
            score(model)
            seconds["score_s"] = time.monotonic() - begun

        here = LocalStorage(scratch)
        (Path(scratch) / "steps").symlink_to(Path(root) / "steps")
        started = time.monotonic()
        rows = train_in_process(
            config, here, "bare", inputs["preprocess"], hooks=Hooks(on_fid=measure)
        )
        whole = time.monotonic() - started
    assert rows
    return {"train_s": whole - seconds["score_s"], **seconds}


def _bare_side_by_side(root: Path, steps: int, processes: int) -> dict[str, float]:
    """The mean of so many at the same time."""
    command = [sys.executable, __file__, "--bare", str(root), str(steps)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {name: sum(each[name] for each in found) / processes for name in found[0]}


def _settings(root: Path, steps: int, num_trials: int) -> dict[str, Any]:
    return {
        "storage.root": str(root),
        "train.num_workers": 1,
        "tune.train_steps": steps,
        "tune.num_trials": num_trials,
        "tune.num_finalists": 1,
        "tune.num_seeds": 2,
        "tune.num_samples": 256,
    }


def _run(verb: str, root: Path, steps: int, num_trials: int) -> dict[str, Any]:
    """What the command prints; of a search its document and the seconds of its step too."""
    settings = _settings(root, steps, num_trials)
    if verb != "tune":
        settings["train.num_steps"] = steps
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [str(RAYDIFFUSION), verb, str(CONFIG), *given, "--json"],
        cwd=root.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(done.stdout)
    if verb != "tune":
        return found
    key = next(step["key"] for step in found["steps"] if step["step"] == "tune")
    manifest = json.loads((root / "steps" / "tune" / key / "manifest.json").read_text())
    document = json.loads((root / "runs" / found["run"] / "tune.json").read_text())
    return found | {"step_s": manifest["seconds"], "document": document}


if __name__ == "__main__":
    main()
