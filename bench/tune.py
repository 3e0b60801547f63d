"""How much of an experiment's wall time is neither training nor scoring.

Runs `raydiffusion tune` on examples/digits with trials of about the time asked for, and divides:
the wall time of the step times the trials that ran at a time, against the seconds that trials spent
in training and in scoring. What is left is Ray Tune, processes, records, start and end.

    python bench/tune.py --trial-s 60 --output bench/results/tune.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "digits" / "digits.toml"
RAYDIFFUSION = Path(sys.executable).parent / "raydiffusion"
PROBE_STEPS = 100


def main() -> None:
    """Measures the speed of a training, then an experiment whose trials take the time asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial-s", type=float, default=60.0)
    parser.add_argument("--num-trials", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-tune-") as directory:
        probe = _tune(Path(directory), PROBE_STEPS, 1, "none")
        train_s = probe["metrics"]["tune"]["cost"]["train_s"]
        # Of the default and its two seeds; one trial at a time or two, as the cluster holds.
        steps = max(PROBE_STEPS, round(options.trial_s / (train_s / 3) * PROBE_STEPS))
        started = time.monotonic()
        found = _tune(Path(directory), steps, options.num_trials, "none")
        wall_s = time.monotonic() - started
    cost = found["metrics"]["tune"]["cost"]
    worked_s = cost["train_s"] + cost["score_s"]
    count = options.num_trials + 2 * min(2, options.num_trials)
    rows = {
        "trial_s": worked_s / count,
        "num_trials": options.num_trials,
        "train_steps": steps,
        "at_a_time": cost["at_a_time"],
        "command_wall_s": wall_s,
        "step_wall_s": found["step_s"],
        "train_s": cost["train_s"],
        "score_s": cost["score_s"],
        "machinery_share": 1 - worked_s / (cost["at_a_time"] * found["step_s"]),
        "hardware": hardware(),
        "versions": versions("ray", "torch", "optuna"),
    }
    text = json.dumps(rows, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


def _tune(directory: Path, steps: int, num_trials: int, stopping: str) -> dict:
    """What the command prints, with the seconds of its step."""
    settings = {
        "storage.root": str(directory / "runs"),
        "train.num_workers": 1,
        "tune.train_steps": steps,
        "tune.num_trials": num_trials,
        "tune.stopping": stopping,
        "tune.num_finalists": 1,
        "tune.num_seeds": 2,
        "tune.num_samples": 256,
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [str(RAYDIFFUSION), "tune", str(CONFIG), *given, "--json"],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(done.stdout)
    key = next(step["key"] for step in found["steps"] if step["step"] == "tune")
    manifest = directory / "runs" / "steps" / "tune" / key / "manifest.json"
    return found | {"step_s": json.loads(manifest.read_text())["seconds"]}


if __name__ == "__main__":
    main()
