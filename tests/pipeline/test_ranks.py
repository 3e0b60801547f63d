"""Two and three gloo ranks against one process. They start once, and train one job after another.

Three, for with two the order of a sum cannot show.
"""

import itertools
import json
import logging
import multiprocessing
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.batches import BatchMaker
from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.dataset import open_split
from pipeline.loop import Hooks
from pipeline.models import make_diffusion, make_unet
from pipeline.replica import Replica
from pipeline.settings import Config
from pipeline.storage import LocalStorage
from pipeline.train import process_group, train_in_process
from pipeline.validation import validation_loss

from ..conftest import DIGITS, TINY
from .test_loop import STEPS, assert_same_to_the_bit, equal, load, poisoned, settings_of

TWELVE = ["train.num_steps=12", "train.checkpoint_every=4", "train.global_batch_size=64"]
EVERYTHING = [
    "diffusion.self_condition=true",
    "diffusion.learned_variance=true",
    "diffusion.offset_noise=0.1",
    "train.timestep_draw=stratified",
    "data.shuffle_window=64",
    "train.horizontal_flip=true",
    "model.class_conditional=true",
    "model.norm=rms",
    "model.memory_kv=2",
    'model.attention=["linear", "full"]',
]


@dataclass(frozen=True)
class Job:
    """A training by several ranks.

    Args:
        name: of its directory.
        config: of all ranks.
        data: the manifest of the step `preprocess`.
        poison: a rank and a batch, and what the noise of both is.
        more_threads: a rank that has one thread more.
        cannot_compile: a rank, and the pass of its compiled network that fails.
        told_to_end: a rank, and how often it is asked before it says so.
    """

    name: str
    config: Config
    data: dict[str, Any]
    poison: tuple[int, int, float] | None = None
    more_threads: int | None = None
    cannot_compile: tuple[int, str] | None = None
    told_to_end: tuple[int, int] | None = None


class Root:
    """A storage root with random images and sequences, and what ranks trained below it."""

    def __init__(self, root: Path, write_data_set: Callable[..., dict[str, Any]]) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (110, 1, 8, 8), np.uint8)
        labels = [k % 3 for k in range(110)]
        storage = LocalStorage(str(root))
        self.images = write_data_set(storage, pixels, labels, num_validation=60)
        sequences = rng.normal(size=(50, 2, 16)).astype(np.float32)
        self.sequences = write_data_set(storage, sequences, key="sequences")

    def config(self, *settings: str, is_sequence: bool = False) -> Config:
        text = TINY.format(sources=DIGITS / "digits-*.tar")
        if is_sequence:
            text = text.replace("resolution = 8", "sequence_shape = [2, 16]")
            text = text.replace('mode = "L"\n', "")
        path = self.root / "tiny.toml"
        path.write_text(text)
        return load_config(
            path, [f"train.num_steps={STEPS}", "train.checkpoint_every=8", *settings]
        )

    def store(self, name: str) -> CheckpointStore:
        return CheckpointStore(LocalStorage(str(self.root)), name)

    def train(self, name: str, config: Config, data: dict[str, Any] | None = None) -> Any:
        """In this process; the last checkpoint."""
        storage = LocalStorage(str(self.root))
        train_in_process(config, storage, name, data or self.images)
        return load(self.store(name), config.train.num_steps)

    def run_ranks(self, world_size: int, jobs: list[Job]) -> dict[str, Any]:
        """Trains one job after another; what rank 0 tells."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        arguments = (world_size, port, str(self.root), jobs, self.config(), self.images)
        ranks = [
            context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        ends = time.monotonic() + 300
        for process in ranks:
            process.join(timeout=max(0.0, ends - time.monotonic()))
        exit_codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()  # one that waits for another in vain
        assert exit_codes == [0] * world_size
        return json.loads((self.root / "told.json").read_text())


def run_rank(
    rank: int,
    world_size: int,
    port: int,
    root: str,
    jobs: list[Job],
    config: Config,
    images: dict[str, Any],
) -> None:
    """One rank; rank 0 tells the buckets of gradients averaged by each, and what each was told."""
    buckets = {job.name: 0 for job in jobs}
    average, make, name = Replica._average, BatchMaker.make, ""
    ended: list[int] = []
    compiler, warnings = torch.compile, ListHandler()
    logging.getLogger("pipeline").addHandler(warnings)

    @wraps(average)
    def counted(*args: Any) -> Any:
        buckets[name] += 1
        return average(*args)

    Replica._average = counted  # pyright: ignore[reportAttributeAccessIssue]
    address = f"tcp://127.0.0.1:{port}"
    with process_group(config.train, init_method=address, rank=rank, world_size=world_size):
        for job in jobs:
            name, changed = job.name, job.config
            if job.poison is not None and job.poison[0] == rank:
                BatchMaker.make = poisoned(make, {job.poison[1]}, job.poison[2])
            if job.more_threads == rank:
                changed = settings_of(changed, cpus_per_worker=2)
            if job.cannot_compile is not None:
                who, how = job.cannot_compile
                torch.compile = pretended_compiler(how if who == rank else None)
            storage = LocalStorage(root)
            ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
            if job.told_to_end is not None:
                ranks["hooks"] = told_after(*job.told_to_end, rank)
            rows = train_in_process(changed, storage, job.name, job.data, **ranks)
            ended.append(rows[-1]["global_step"])
            BatchMaker.make, torch.compile = make, compiler
            dist.barrier()
        everyone: list[Any] = [None] * world_size
        loss = measure(config, root, images, rank, world_size)
        dist.all_gather_object(everyone, (buckets, loss, warnings.texts, ended))
    if rank == 0:
        names = ("buckets", "losses", "warnings", "ended")
        told = dict(zip(names, zip(*everyone, strict=True), strict=True))
        Path(root, "told.json").write_text(json.dumps(told))


def told_after(told_rank: int, num_asked: int, rank: int) -> Hooks:
    """Hooks that have one rank say that it is told to end, when it was asked so often."""
    asked = itertools.count(1)
    return Hooks(is_told_to_end=lambda: next(asked) == num_asked and rank == told_rank)


class ListHandler(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def pretended_compiler(fails_in: str | None) -> Any:
    """What changes nothing, or fails in the forward or the backward pass."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("no compiler\nwas found")

    def compiled(module: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if fails_in == "forward":
                refuse()
            output = module(*args, **more)
            if fails_in == "backward" and output.requires_grad:
                output.register_hook(refuse)
            return output

        return call

    return compiled


def measure(
    config: Config, root: str, images: dict[str, Any], rank: int = 0, world_size: int = 1
) -> float:
    """The validation loss of a network."""
    items = open_split(LocalStorage(root), images, "validation")
    model = make_unet(config, 0)
    with torch.no_grad():
        for weights in model.final_conv.parameters():
            weights += 0.1
    return validation_loss(
        model.eval(), make_diffusion(config), items, seed=0, rank=rank, world_size=world_size
    )


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., dict[str, Any]]
) -> Root:
    return Root(tmp_path_factory.mktemp("ranks"), write_data_set)


@pytest.fixture(scope="module")
def told(root: Root) -> dict[str, Any]:
    """What two ranks tell after all their jobs."""
    plain, images = root.config("model.dropout=0.1"), root.images
    parts = {"global_batch_size": 64, "accumulation_steps": 2, "num_steps": 6}
    few = {"num_steps": 10, "checkpoint_every": 10, "log_every": 10}
    jobs = [
        Job("moved", settings_of(root.config(), num_steps=16), images),
        Job("threads", settings_of(plain, num_steps=2), images, more_threads=1),
        Job("not finite", plain, images, poison=(1, 13, torch.inf)),
        Job("too large", plain, images, poison=(1, 13, 1e25)),
        Job("parts", settings_of(root.config(), **parts), images),
        Job("validated", settings_of(plain, validate_every=8), images),
        Job("untold", settings_of(plain, **few), images),
        Job("told to end", settings_of(plain, **few), images, told_to_end=(1, 5)),
        Job("told to end", settings_of(plain, **few), images),
    ]
    return root.run_ranks(2, jobs)


@pytest.fixture(scope="module")
def compiled(root: Root) -> dict[str, Any]:
    """What two ranks tell that train without a compiler, with one, and with one that fails."""
    # The features are a buffer, which DDP might share out before each pass.
    config = root.config("diffusion.self_condition=true", "model.time_features=random")
    parts = {"global_batch_size": 64, "accumulation_steps": 2, "num_steps": 4}
    eager = settings_of(config, **parts)
    wants = settings_of(eager, compile=True)
    jobs = [
        Job("eager", eager, root.images),
        Job("compiled", wants, root.images, cannot_compile=(-1, "")),
        Job("forward", wants, root.images, cannot_compile=(1, "forward")),
        Job("backward", wants, root.images, cannot_compile=(1, "backward")),
    ]
    return root.run_ranks(2, jobs)


@pytest.fixture(scope="module")
def three(root: Root) -> dict[str, tuple[Config, dict[str, Any]]]:
    """Trained by three ranks, whole and in two parts: config and data by name."""
    ways = {
        "plain": (root.config(*TWELVE), root.images),
        "dropout": (root.config(*TWELVE, "model.dropout=0.1"), root.images),
        "everything": (root.config(*TWELVE, *EVERYTHING), root.images),
        "sequences": (root.config(*TWELVE, is_sequence=True), root.sequences),
    }
    jobs = []
    for name, (config, data) in ways.items():
        jobs.append(Job(f"three {name}", config, data))
        jobs.append(Job(f"stopped {name}", settings_of(config, num_steps=8), data))
        jobs.append(Job(f"stopped {name}", config, data))
    root.run_ranks(3, jobs)
    return ways


@pytest.mark.parametrize("name", ["plain", "dropout", "everything", "sequences"])
def test_ranks_and_parts_see_the_same_and_resume_to_the_bit(
    root: Root, three: dict[str, tuple[Config, dict[str, Any]]], name: str
) -> None:
    """Shares of 2, 1 and 1 groups of 16."""
    config, data = three[name]
    whole, stopped = (load(root.store(f"{kind} {name}"), 12) for kind in ("three", "stopped"))
    assert_same_to_the_bit(stopped, whole)
    if config.model.dropout:  # each rank and part drops other units
        return
    one = root.train(f"one {name}", config, data)
    parts = root.train(f"parts {name}", settings_of(config, accumulation_steps=3), data)
    for other in (whole, parts):
        for key in one.ema:
            assert torch.allclose(one.ema[key], other.ema[key], atol=1e-5), key
        for ours, theirs in zip(other.history, one.history, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_run_goes_on_with_another_number_of_ranks(
    root: Root, told: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    moved, alone = (root.train(name, root.config()) for name in ("moved", "alone"))
    for name in alone.ema:
        assert torch.allclose(moved.ema[name], alone.ema[name], atol=1e-5), name
    assert "with world_size = 1, and the checkpoint was made with 2: the last" in caplog.text
    assert [(e["since_step"], e["world_size"]) for e in moved.environments] == [(0, 2), (16, 1)]


def test_what_differs_between_ranks_is_a_list(root: Root, told: dict[str, Any]) -> None:
    (environment,) = load(root.store("threads"), 2).environments
    assert (environment["world_size"], environment["threads"]) == (2, [1, 2])
    assert environment["torch"] == torch.__version__


def test_ranks_end_together_when_one_is_told_to(root: Root, told: dict[str, Any]) -> None:
    assert [ended[-3:] for ended in told["ended"]] == [[10, 5, 10]] * 2
    assert root.store("told to end").steps() == [5, 10]
    stopped, whole = (load(root.store(name), 10) for name in ("told to end", "untold"))
    assert equal(stopped.model, whole.model)
    assert equal(stopped.optimizer, whole.optimizer)


@pytest.mark.parametrize("name", ["not finite", "too large"])
def test_ranks_agree_on_what_is_not_finite(root: Root, told: dict[str, Any], name: str) -> None:
    """Also where a loss overflows on one rank alone, and its gradient does not."""
    assert load(root.store(name)).skipped == (13,)


def test_parts_of_a_batch_are_averaged_over_ranks_once(root: Root, told: dict[str, Any]) -> None:
    whole = {"global_batch_size": 64, "num_steps": 6}
    one = root.train("whole", settings_of(root.config(), **whole))
    two = load(root.store("parts"), 6)
    for name in one.ema:
        assert torch.allclose(one.ema[name], two.ema[name], atol=1e-5), name
    # One bucket: once to warm up and once a step, not once a part.
    assert [buckets["parts"] for buckets in told["buckets"]] == [7, 7]


@pytest.mark.parametrize("name", ["compiled", "forward", "backward"])
def test_ranks_compile_together_or_not_at_all(
    root: Root, compiled: dict[str, Any], name: str
) -> None:
    """Where one of them cannot, none waits for another, and all train as without."""
    assert_same_to_the_bit(load(root.store(name), 4), load(root.store("eager"), 4))
    assert [buckets[name] for buckets in compiled["buckets"]] == [5, 5]
    (environment,) = load(root.store(name), 4).environments
    assert environment["compiled"] is (name == "compiled")


def test_ranks_say_once_that_one_cannot_compile(compiled: dict[str, Any]) -> None:
    text = "torch.compile failed on rank 1, training goes on without it: no compiler"
    assert compiled["warnings"] == [[text, text], []]


@pytest.mark.slow
def test_ranks_train_what_torch_compiles(root: Root) -> None:
    config = root.config("diffusion.self_condition=true", "train.num_steps=4")
    jobs = [
        Job("as it is", config, root.images),
        Job("by torch", settings_of(config, compile=True), root.images),
    ]
    assert root.run_ranks(2, jobs)["warnings"] == [[], []]
    plain, compiled = (load(root.store(job.name), 4) for job in jobs)
    for name in plain.ema:
        assert torch.allclose(compiled.ema[name], plain.ema[name], atol=1e-4), name


def test_the_parts_of_the_time_add_up(root: Root, told: dict[str, Any]) -> None:
    rows = load(root.store("validated")).history
    for row in rows:
        assert sum(row["seconds"].values()) == pytest.approx(row["wall_s"], rel=0.02)
    assert all(row["seconds"]["sync"] > 0 for row in rows)
    assert all(row["seconds"]["compute"] > row["seconds"]["data"] > 0 for row in rows)


def test_the_validation_loss_is_the_same_again_and_on_two_ranks(
    root: Root, told: dict[str, Any]
) -> None:
    arguments = (root.config(), str(root.root), root.images)
    torch.manual_seed(1)
    first = measure(*arguments)
    torch.manual_seed(2)
    assert measure(*arguments) == first
    assert told["losses"] == [pytest.approx(first, rel=1e-6)] * 2
