"""The step `preprocess`: input shards to a data set of Arrow shards, with Ray Data.

Each shard is one unit (`units.py`), done once, in a task of Ray Data with a few others; the step
adds the units up (`dataset_document.py`) and refuses a data set of which too much cannot be used.
"""

import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from pipeline.cluster import place_tasks
from pipeline.convert import begin_shard
from pipeline.dataset_document import check_document, make_document
from pipeline.errors import ERRORS, ClusterError, DataError, RaydiffusionError
from pipeline.settings import DataConfig
from pipeline.sources import InputShard, list_inputs
from pipeline.storage import STORAGE_THREADS, Storage, open_storage
from pipeline.tasks import share_out
from pipeline.units import (
    SPLITS,
    missing_units,
    read_units,
    unit_directory,
)
from pipeline.workflow import StepContext

SHOWN = 4  # names of shards in an error
BYTES_PER_TASK = 1 << 29  # of input, at most where shards are small: about ten seconds
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
    inputs = context.planned.step.given or list_inputs(data, storage)
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
    with ThreadPoolExecutor(STORAGE_THREADS) as pool:  # of writers that were killed when done
        list(pool.map(storage.clean, (unit_directory(shard, data) for shard in shards)))
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
    from ray.exceptions import RayError, RayTaskError
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is ours to tell
    options = ray.data.DataContext.get_current()
    options.enable_progress_bars = False
    options.print_on_execution_start = False
    options.target_max_block_size = 1  # a row is sent when it is made: progress is by the shard
    # Rows need no room kept for them. Looking for some, Ray Data would run one task alone in its
    # first second, and leave a CPU idle for up to 0.3 s between two.
    options.op_resource_reservation_enabled = False
    place, cpus = place_tasks()
    groups = group_shards(missing, max(1, sum(cpus)))  # none yet, where a cluster starts small
    # More than one thread only where there are fewer tasks than CPUs.
    threads = max(1, min(sum(cpus) // len(groups), max(cpus, default=1)))
    tasks = [
        {
            "shards": json.dumps([asdict(shard) for shard in group]),
            "data": context.config.data.model_dump_json(),
            "storage": context.storage.uri,
            "threads": threads,
        }
        for group in groups
    ]
    progress = _Progress(context, [shard for group in groups for shard in group])
    try:
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        with warnings.catch_warnings():  # max_retries goes in Ray 2.64; without it, for ever
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.flat_map(
                _run_task, num_cpus=threads, max_retries=TASK_RETRIES, **place
            )
        for row in dataset.iter_rows():
            if row["error"]:
                raise ERRORS[row["kind"]](row["error"])
            progress.add(row)
    except RayError as error:
        lines = str(error).strip().splitlines()
        told = lines[-1] if isinstance(error, RayTaskError) else lines[0]  # what was raised there
        raise ClusterError(
            f"Preprocessing stopped on the cluster: {told} The "
            f"shards at work were among {progress.unfinished()}. Finished ones are kept; see that "
            "nodes have enough memory and run the same command again."
        ) from error


def group_shards(shards: Sequence[InputShard], num_cpus: int) -> list[list[InputShard]]:
    """The shards of each task: several, for while its last one is written it reads no other.

    Every CPU has as many tasks as any other, and they are as equal in bytes as can be.

    Args:
        shards: to be preprocessed.
        num_cpus: of the cluster, at least 1.
    """
    num_bytes = sum(shard.num_bytes for shard in shards)
    tasks_per_cpu = max(1, -(-num_bytes // (num_cpus * BYTES_PER_TASK)))
    return share_out(
        shards,
        tasks_per_cpu * num_cpus,
        size_of=lambda shard: shard.num_bytes,
        name_of=lambda shard: shard.name,
    )


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


def _run_task(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One task of Ray Data: a row for each shard when it is done.

    Our errors are a row as well, for as exceptions they would not stay themselves.
    """
    data = DataConfig.model_validate_json(row["data"])
    shards = [InputShard.from_json(value) for value in json.loads(row["shards"])]
    facts = {"name": "", "bytes": 0, "images": 0, "refused": 0, "error": "", "kind": ""}
    try:
        made = _make_units(shards, data, open_storage(row["storage"]), row["threads"])
        for shard, manifest in made:
            yield {
                **facts,
                "name": shard.name,
                "bytes": shard.num_bytes,
                "images": sum(split["count"] for split in manifest["splits"].values()),
                "refused": sum(item["count"] for item in manifest["refused"]),
            }
    except RaydiffusionError as error:
        yield {**facts, "error": str(error), "kind": type(error).__name__}


def _make_units(
    shards: Sequence[InputShard], data: DataConfig, storage: Storage, threads: int
) -> Iterator[tuple[InputShard, dict[str, Any]]]:
    """Each shard with its manifest. One is written while the next is read."""
    with ThreadPoolExecutor(1) as writer:
        writing: tuple[InputShard, Future[dict[str, Any]]] | None = None
        for shard in shards:
            if missing_units([shard], data, storage):
                finish = begin_shard(shard, data, storage, threads)
            else:  # an earlier attempt of this task made it
                finish = partial(_read_unit, shard, data, storage)
            if writing is not None:
                yield writing[0], writing[1].result()
            writing = shard, writer.submit(finish)
        if writing is not None:
            yield writing[0], writing[1].result()


def _read_unit(shard: InputShard, data: DataConfig, storage: Storage) -> dict[str, Any]:
    (manifest,) = read_units(storage, [shard], data)
    return manifest
