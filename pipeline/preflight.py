"""Checks before work: what would hang, or fail hours later, is refused here within seconds.

`before_ray` needs no Ray, `on_cluster` one that runs; a run asks for both and stops at the first
failure (`require`), `doctor` shows them all (`examine`). How workers and tasks are counted is in
`capacity.py`; what a node is asked, in `probes.py`; what its answer means, in `node_checks.py`.
"""

import contextlib
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.capacity import Note, check_drawing, check_fid, check_tasks, check_workers, list_nodes
from pipeline.checkpoint_steps import complete_steps
from pipeline.cluster import Node, connect, free_now, local_nodes, max_temp_length, ray_environment
from pipeline.errors import ClusterError, ConfigError, DataError, RaydiffusionError, StorageError
from pipeline.identities import InputFile
from pipeline.node_checks import (
    check_answers,
    check_collectives,
    check_gpus,
    check_input,
    check_shared_memory,
    check_storage,
    check_temps,
    check_versions,
    judge_temp,
)
from pipeline.probes import Facts, Question, ask, look
from pipeline.settings import Config
from pipeline.sources import find_first_files
from pipeline.storage import LocalStorage, Storage, check_writable, in_bytes, open_storage
from pipeline.torchrun import World, torchrun_world
from pipeline.torchrun import check_gpus as torchrun_gpus
from pipeline.workflow import Resources

SAVED_BYTES_PER_WEIGHT = 16  # of a checkpoint: weights, EMA, AdamW
CHECKPOINTS = 4  # the latest two and the best are kept while another is written
V2_VARIABLE = "RAY_TRAIN_V2_ENABLED"
START_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
PROGRESS_VARIABLE = "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S"
TIMEOUTS = (START_VARIABLE, PROGRESS_VARIABLE)
SWITCHED_OFF = ("0", "false")


@dataclass(frozen=True)
class Check:
    """What came of looking at one thing; `error` is what a run would raise."""

    name: str
    status: Literal["ok", "note", "failed"]
    detail: str
    error: RaydiffusionError | None = None


def require(checks: Iterable[Check]) -> list[str]:
    """Raises the first failure; returns the notes.

    Raises:
        RaydiffusionError: of the first check that failed.
    """
    notes = []
    for check in checks:
        if check.error is not None:
            raise check.error
        if check.status == "note":
            notes.append(f"{check.name}: {check.detail}")
    return notes


def examine(config: Config) -> Iterator[Check]:
    """All checks, for a run that does everything, as `doctor` wants them; starts or joins Ray."""
    storage = open_storage(config.storage.root)
    yield _check("input", _check_input, config, storage)
    yield from before_ray(config, storage, trains=True, draws=True)
    try:
        with connect(config) as nodes:
            way = f"joined at {config.cluster.address}" if config.cluster.address else "started"
            yield Check("cluster", "ok", f"Ray was {way}; {list_nodes(nodes)}")
            yield from on_cluster(
                config,
                storage,
                nodes,
                trains=True,
                draws=True,
                reads_input=True,
                opens_gpus=True,
            )
    except ClusterError as error:  # of connecting: those of a check are in its result
        yield Check("cluster", "failed", str(error), error)


def before_ray(
    config: Config,
    storage: Storage,
    *,
    trains: bool,
    draws: bool = False,
    series: str | None = None,
) -> Iterator[Check]:
    """The checks that need no Ray.

    Args:
        config: the whole config.
        storage: its root.
        trains: whether training will run, under Ray Train or torchrun.
        draws: whether samples will be drawn.
        series: directory of the training that may go on, below the root.
    """
    yield _check("model", _check_model, config)
    yield _check("storage", _check_storage, storage)
    yield _check("disk", _check_disk, storage, config, trains, series)
    yield _check("time-outs", _check_timeouts, ray_environment(config))
    nodes = local_nodes(config)
    if trains and (world := torchrun_world()) is not None:
        yield _check("workers", _check_ranks, config, world)
        if config.train.fid_every is not None:
            yield _check("fid", check_fid, config, [], True)
    if nodes is not None:
        trains = trains and torchrun_world() is None
        yield from _count_resources(config, nodes, None, trains, draws)


def on_cluster(
    config: Config,
    storage: Storage,
    nodes: Sequence[Node],
    *,
    trains: bool,
    reads_input: bool,
    draws: bool = False,
    opens_gpus: bool = False,
) -> Iterator[Check]:
    """The checks that need a Ray that runs: whether every node can do its part.

    The one node of a Ray that was started by this process shares everything with it, and is not
    asked: a run on it must not pay for what cannot differ.

    Args:
        config: the whole config.
        storage: its root.
        nodes: that are alive.
        trains: whether Ray Train's workers will be needed.
        reads_input: whether nodes will read the sources.
        draws: whether samples will be drawn.
        opens_gpus: whether to open the GPUs of this machine, which takes a second or two.
    """
    is_alone = config.cluster.address is None and len(nodes) == 1
    if is_alone:
        facts = {nodes[0]: look(Question(temp=nodes[0].temp, imports_torch=trains))}
    else:
        yield from _count_resources(config, nodes, free_now(), trains, draws)
        facts = yield from _ask_nodes(config, storage, nodes, trains, reads_input)
    yield _check("shared memory", check_shared_memory, config, facts, trains)
    if trains:
        yield _check("collectives", check_collectives, config, facts)
    use_gpu = {
        "train.use_gpu": trains and config.train.use_gpu,
        "evaluate.use_gpu": draws and config.evaluate.use_gpu,
    }
    if any(use_gpu.values()):
        wanted = [name for name, is_wanted in use_gpu.items() if is_wanted]
        yield _check("GPUs", check_gpus, config, nodes, is_alone, opens_gpus, wanted)


def _check(name: str, function: Callable[..., str], *args: Any) -> Check:
    try:
        detail = function(*args)
    except RaydiffusionError as error:
        return Check(name, "failed", str(error), error)
    return Check(name, "note" if isinstance(detail, Note) else "ok", detail)


def _check_input(config: Config, storage: Storage) -> str:
    found = find_first_files(config.data, storage)
    more = f" and {len(found) - 1:,} more sources" if len(found) > 1 else ""
    return f"{found[0].uri}{more}"


def _check_model(config: Config) -> str:
    # torch: only where something has to run
    from pipeline.models import (
        BYTES_PER_WEIGHT,
        bytes_in_training,
        count_parameters,
        make_diffusion,
    )

    make_diffusion(config)
    each = ", ".join(f"{name} {size}" for name, size in BYTES_PER_WEIGHT.items())
    return (
        f"{count_parameters(config):,} weights; training keeps "
        f"{in_bytes(bytes_in_training(config))} on each device (bytes a weight: {each}), and "
        "activations beside"
    )


def _check_ranks(config: Config, world: World) -> str:
    from pipeline.batches import check_ranks

    check_ranks(config.train, world.world_size)
    if config.train.use_gpu:
        torchrun_gpus(world)
    return f"torchrun started {world.world_size} ranks"


def _check_storage(storage: Storage) -> str:
    check_writable(storage)
    return f"{storage.uri} is written and read back, and refuses to overwrite"


def _check_disk(storage: Storage, config: Config, trains: bool, series: str | None) -> str:
    details: list[str] = []
    if isinstance(storage, LocalStorage):
        free = shutil.disk_usage(_existing(storage.uri)).free
        if trains:
            _check_room(storage, config, free, series)
        details.append(f"{in_bytes(free)} free at the storage root")
    temp = tempfile.gettempdir()
    if config.cluster.address is None and len(temp) > max_temp_length():
        raise ClusterError(
            f"Ray's sockets below {temp} ({len(temp)} characters) would have paths longer than the "
            f"system takes. Set TMPDIR to a directory whose path has at most {max_temp_length()}, "
            "such as /tmp."
        )
    usage = shutil.disk_usage(temp)
    details.append(judge_temp("this machine", temp, usage.free, usage.total))
    detail = "; ".join(details)
    return Note(detail) if isinstance(details[-1], Note) else detail


def _check_room(storage: Storage, config: Config, free: int, series: str | None) -> None:
    """Refuses a root without room for the checkpoints that are still to come."""
    from pipeline.models import count_parameters

    try:
        size = SAVED_BYTES_PER_WEIGHT * count_parameters(config)
    except ConfigError:  # said by the check of the model
        return
    train, most = config.train, CHECKPOINTS
    if train.keep_every is not None:  # of those that are made
        most += train.num_steps // math.lcm(train.keep_every, train.checkpoint_every)
    steps = [] if series is None else complete_steps(storage, series)
    there = sum(step <= train.num_steps for step in steps)
    # However many are there, the next one is written before any of them goes.
    count = max(most - there, 1)
    if free >= count * size:
        return
    more = " more" if there else ""
    needs = f"{count}{more} checkpoint needs" if count == 1 else f"{count}{more} checkpoints need"
    where = ""
    if there:
        where = f" elsewhere on that disk (training goes on from the {there} that are there)"
    raise StorageError(
        f"The storage root {storage.uri} has {in_bytes(free)} free, and {needs} "
        f"{in_bytes(count * size)}. Free space{where}, raise train.keep_every where it is set, or "
        "set storage.root to another place."
    )


def _existing(path: str) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(p for p in (Path(path), *Path(path).parents) if os.access(p, os.F_OK))


def _check_timeouts(expected: Mapping[str, str]) -> str:
    """Settings of the environment by which Ray would wait for ever, or be another Ray Train."""
    if os.environ.get(V2_VARIABLE, "1").lower() in SWITCHED_OFF:
        raise ClusterError(
            f"{V2_VARIABLE}={os.environ[V2_VARIABLE]} in the environment selects a Ray Train that "
            "does not know how this project trains. Unset it."
        )
    found = {}
    for name in TIMEOUTS:
        text = os.environ.get(name, expected[name])
        try:
            found[name] = float(text)
        except ValueError as error:
            raise ClusterError(
                f"{name} in the environment must be a number of seconds, got {text!r}. Unset it."
            ) from error
    start_s, progress_s = found.values()
    if start_s <= 0:
        raise ClusterError(
            f"{START_VARIABLE}={start_s:g} in the environment gives workers no time to start, so "
            "that Ray would try for ever. Unset it."
        )
    detail = f"workers that do not start within {start_s:g} s are asked for again"
    if progress_s <= 0:
        return Note(
            f"{detail}; {PROGRESS_VARIABLE}={progress_s:g} in the environment lets preprocessing "
            "wait for ever"
        )
    return f"{detail}; preprocessing ends after {progress_s:g} s without progress"


def _count_resources(
    config: Config, nodes: Sequence[Node], free: Resources | None, trains: bool, draws: bool
) -> Iterator[Check]:
    if trains:
        yield _check("workers", check_workers, config, nodes, free)
        if config.train.fid_every is not None:
            yield _check("fid", check_fid, config, nodes)
    if draws and config.evaluate.use_gpu:
        yield _check("samples", check_drawing, nodes)
    yield _check("tasks", check_tasks, config, nodes, free, trains)


def _ask_nodes(
    config: Config,
    storage: Storage,
    nodes: Sequence[Node],
    trains: bool,
    reads_input: bool,
) -> Generator[Check, None, dict[Node, Facts]]:
    """Sends each node that takes work one task, judges the answers, and returns them."""
    probe = f"probes/{uuid.uuid4().hex}"
    asked = [node for node in nodes if node.cpus or node.gpus]

    files: tuple[InputFile, ...] = ()
    if reads_input:
        with contextlib.suppress(DataError):  # said when the run was planned, or by `input`
            files = tuple(find_first_files(config.data, storage))

    def question(node: Node) -> tuple[Question]:
        return (Question(node.id, storage.uri, probe, node.temp, files, trains),)

    try:
        storage.create(f"{probe}/driver", probe.encode())
        answers = ask(asked, look, question)
        unseen = [n for n in asked if not _is_seen(storage, probe, n)]
    except StorageError as error:
        yield Check("shared storage", "failed", str(error), error)
        return {}
    finally:
        with contextlib.suppress(StorageError):
            storage.delete(probe)
    facts = {node: answer for node, answer in answers.items() if isinstance(answer, Facts)}
    yield _check("nodes", check_answers, answers)
    yield _check("shared storage", check_storage, storage, facts, unseen)
    if files:
        yield _check("shared input", check_input, facts)
    yield _check("versions", check_versions, facts)
    yield _check("disks", check_temps, facts)
    return facts


def _is_seen(storage: Storage, probe: str, node: Node) -> bool:
    try:
        return storage.read(f"{probe}/{node.id}") == node.id.encode()
    except FileNotFoundError:
        return False
