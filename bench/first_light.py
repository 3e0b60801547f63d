"""The demo as a whole: wall time, cold start, cached rerun, and the largest process.

    python bench/first_light.py [--output bench/results/first_light.json]

Runs `raydiffusion run examples/digits/digits.toml` in an empty directory, then again. Memory is
the high-water mark of resident memory (VmHWM) of every process that descends from the command,
read from /proc ten times a second, so Linux only. The last line is one JSON object. What it does
not show: anything about other data sets, networks or machines.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import hardware, largest, measure, versions

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "digits" / "digits.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    program = str(Path(sys.executable).parent / "raydiffusion")
    with tempfile.TemporaryDirectory() as directory:
        first = measure([program, "run", str(CONFIG), "--json"], directory)
        again = measure([program, "run", str(CONFIG), "--json"], directory)
        started = first["started"]
        events = read_events(Path(directory))
    train = first["outcome"]["metrics"]["train"]
    score = first["outcome"]["metrics"]["evaluate"]
    train_started = next(
        e["time"] for e in events if e["event"] == "started" and e["step"] == "train"
    )
    document = {
        "demo_wall_s": round(first["wall_s"], 1),
        "first_training_step_s": round(train_started - started + train["seconds_to_first_step"], 1),
        "cached_rerun_s": round(again["wall_s"], 2),
        "peak_process_mib": max(first["peak_kib"].values()) // 1024,
        "peak_by_process_mib": largest(first["peak_kib"]),
        "train_images_per_s": round(train["images_per_s"]),
        "step_seconds": {
            e["step"]: round(e["seconds"], 1) for e in events if e["event"] == "finished"
        },
        "score": {k: score[k] for k in ("metric", "value", "floor", "ceiling")},
        "hardware": hardware(),
        "versions": versions("torch", "ray", "pyarrow", "torchmetrics"),
    }
    text = json.dumps(document)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")
    print(text)


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of the only run below a directory."""
    (path,) = directory.glob("runs/runs/*/events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
