"""The demo as a whole: wall time, cold start, cached rerun, and the largest process.

    python bench/first_light.py [--output bench/results/first_light.json]

Runs `raydiffusion run examples/digits/digits.toml` in an empty directory, then again. Memory is
the high-water mark of resident memory (VmHWM) of every process that descends from the command,
read from /proc ten times a second, so Linux only. The last line is one JSON object. What it does
not show: anything about other data sets, networks or machines.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "digits" / "digits.toml"
SAMPLED_EVERY_S = 0.1


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
        "hardware": {"cpu": cpu_model(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "ray", "pyarrow", "torchmetrics")},
        },
    }
    text = json.dumps(document)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")
    print(text)


def measure(command: list[str], directory: str) -> dict[str, Any]:
    """Runs a command; its wall time, its JSON, and each descendant's peak memory in KiB."""
    started, clock = time.time(), time.monotonic()
    peak_kib: dict[str, int] = {}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command, cwd=directory, stdout=printed, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            for name, kib in descendants_kib(process.pid):
                peak_kib[name] = max(peak_kib.get(name, 0), kib)
            time.sleep(SAMPLED_EVERY_S)
        wall_s = time.monotonic() - clock
        printed.seek(0)
        outcome = json.load(printed)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {outcome}")
    return {"started": started, "wall_s": wall_s, "outcome": outcome, "peak_kib": peak_kib}


def descendants_kib(root: int) -> list[tuple[str, int]]:
    """(name and id, VmHWM in KiB) of a process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone since it was listed
            parents[int(entry.name)] = int(stat[1])
    family = {root}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    found = []
    for pid in family:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        peak = [row.split()[1] for row in status.splitlines() if row.startswith("VmHWM")]
        if peak:
            name = next((Path(a.decode()).name for a in line[::-1] if a), "?")
            found.append((f"{name} {pid}", int(peak[0])))
    return found


def largest(peak_kib: dict[str, int], count: int = 8) -> dict[str, int]:
    """The largest processes by peak memory in MiB."""
    ordered = sorted(peak_kib.items(), key=lambda item: -item[1])[:count]
    return {name[:60]: kib // 1024 for name, kib in ordered}


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of the only run below a directory."""
    (path,) = directory.glob("runs/runs/*/events.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def cpu_model() -> str:
    """The processor's name as Linux knows it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
