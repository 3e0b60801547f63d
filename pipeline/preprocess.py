"""The step `preprocess`: input shards to a data set of Arrow shards, with Ray Data.

Each shard is one task of Ray Data and one unit (`units.py`), done once; the step adds the units
up (`dataset.py`) and refuses a data set of which too much cannot be used.
"""

import json
import logging
import time
import warnings
from dataclasses import asdict
from typing import Any

from pipeline.convert import preprocess_shard
from pipeline.dataset import check_document, make_document
from pipeline.errors import ERRORS, ClusterError, DataError, RaydiffusionError
from pipeline.settings import DataConfig
from pipeline.sources import InputShard, list_inputs
from pipeline.storage import open_storage
from pipeline.units import SPLITS, missing_units, read_units
from pipeline.workflow import StepContext

SHOWN = 4  # names of shards in an error
TASK_RETRIES = 3  # of a task whose worker died; more would hide content that kills


def preprocess(context: StepContext) -> dict[str, Any]:
    """Turns every input shard into Arrow shards by split; shards done before are kept.

    Raises:
        DataError: too many images cannot be used, a split is empty, a shard cannot be read, or the
            shards are no longer those of the plan.
        StorageError: results cannot be written, or nodes do not share the storage root.
        ClusterError: Ray lost the work.
    """
    data, storage = context.config.data, context.storage
    inputs = list_inputs(data, storage)
    shards = inputs.shards
    planned = context.planned.step.settings["shards"]
    if {shard.name: shard.sha256 for shard in shards} != planned:
        raise DataError(
            "The input changed since the run was planned. Run the same command again: it takes "
            "the input as it is then."
        )
    missing = missing_units(shards, data, storage)
    if missing:
        _run_ray_data(context, missing)
    units = read_units(storage, shards, data)
    document = make_document(data, storage, shards, units, inputs.ignored)
    lines = [json.dumps(item) + "\n" for item in document["refused"]["items"]]
    ledger = f"{context.directory}/quarantine.jsonl"
    storage.replace(ledger, "".join(lines).encode())  # also, and above all, when the step fails
    check_document(document, data, f"{storage.uri}/{ledger}")
    context.write_artifact("dataset.json", json.dumps(document, indent=1).encode())
    counts = ", ".join(f"{document['counts'][split]:,} {split}" for split in SPLITS)
    refused, left_out = document["refused"]["count"], sum(document["left_out"].values())
    context.note(
        f"{len(shards):,} shards ({len(missing):,} new), {counts}, {refused:,} refused, "
        f"{left_out:,} left out"
    )
    return _metrics(document)


def _metrics(document: dict[str, Any]) -> dict[str, Any]:
    """What other steps, the report and the command line show of the data set."""
    kept = ("counts", "shape", "dtype", "channel_mean", "channel_std", "classes", "left_out")
    return {
        **{key: document[key] for key in kept},
        "labels": document["labels"]["train"],
        "unlabelled": document["unlabelled"]["train"],
        "num_input_shards": len(document["inputs"]),
        "num_shards": sum(len(shard["files"]) for shard in document["shards"]),
        "bytes": sum(file["bytes"] for shard in document["shards"] for file in shard["files"]),
        "animated": document["animated"],
        "refused": document["refused"]["count"],
        "refused_by_reason": document["refused"]["by_reason"],
    }


def _run_ray_data(context: StepContext, missing: list[InputShard]) -> None:
    import ray.data
    from ray.exceptions import RayError
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is ours to tell
    options = ray.data.DataContext.get_current()
    options.enable_progress_bars = False
    options.print_on_execution_start = False
    threads = _threads_per_task(ray.nodes(), len(missing))
    # The largest first: the last tasks to end are then small ones.
    by_size = sorted(missing, key=lambda shard: (-shard.num_bytes, shard.name))
    tasks = [
        {
            "shard": json.dumps(asdict(shard)),
            "data": context.config.data.model_dump_json(),
            "storage": context.storage.uri,
            "threads": threads,
        }
        for shard in by_size
    ]
    progress = _Progress(context, by_size)
    try:
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        with warnings.catch_warnings():  # max_retries goes in Ray 2.64; without it, for ever
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map(_preprocess_row, num_cpus=threads, max_retries=TASK_RETRIES)
        for row in dataset.iter_rows():
            if row["error"]:
                raise ERRORS[row["kind"]](row["error"])
            progress.add(row)
    except RayError as error:
        raise ClusterError(
            f"Preprocessing stopped on the cluster: {str(error).strip().splitlines()[0]} The "
            f"shards at work were among {progress.unfinished()}. Finished ones are kept; see that "
            "nodes have enough memory and run the same command again."
        ) from error


def _threads_per_task(nodes: list[dict[str, Any]], num_tasks: int) -> int:
    """More than one only where there are fewer tasks than CPUs."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    return max(1, min(sum(cpus) // num_tasks, max(cpus, default=1)))


class _Progress:
    """How far the tasks are: what was done, how fast, and the time left by the bytes left."""

    def __init__(self, context: StepContext, missing: list[InputShard]) -> None:
        self.context = context
        self.num_shards, self.done = len(missing), 0
        self.names = [shard.name for shard in missing]
        self.total_bytes = sum(shard.num_bytes for shard in missing)
        self.bytes = self.images = self.refused = 0
        self.started = time.monotonic()
        context.progress(0, self.num_shards, "shards", bytes=0, total_bytes=self.total_bytes)

    def unfinished(self) -> str:
        """The names of the first shards that are not done."""
        return ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")

    def add(self, row: dict[str, Any]) -> None:
        """Counts a shard that is done."""
        self.names.remove(row["name"])
        self.done += 1
        self.images += row["images"]
        self.refused += row["refused"]
        self.bytes += row["bytes"]
        seconds = time.monotonic() - self.started
        self.context.progress(
            self.done,
            self.num_shards,
            "shards",
            rate=self.images / seconds,
            rate_unit="images/s",
            bytes=self.bytes,
            total_bytes=self.total_bytes,
            refused=self.refused,
            left_s=seconds * (self.total_bytes - self.bytes) / max(self.bytes, 1),
        )


def _preprocess_row(row: dict[str, Any]) -> dict[str, Any]:
    """One task of Ray Data: one input shard. Our errors return as values, to stay themselves."""
    shard = InputShard.from_json(json.loads(row["shard"]))
    data = DataConfig.model_validate_json(row["data"])
    facts = {"name": shard.name, "error": "", "kind": "", "bytes": shard.num_bytes}
    try:
        manifest = preprocess_shard(shard, data, open_storage(row["storage"]), row["threads"])
    except RaydiffusionError as error:
        return facts | {
            "error": str(error), "kind": type(error).__name__, "images": 0, "refused": 0,
        }  # fmt: skip
    return facts | {
        "images": sum(split["count"] for split in manifest["splits"].values()),
        "refused": sum(item["count"] for item in manifest["refused"]),
    }
