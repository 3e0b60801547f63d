"""The loop in one process: resuming, what is not finite, rows of metrics, precision."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_core import Diffusion
from pipeline.batches import Batch, BatchMaker
from pipeline.checkpoints import Checkpoint, CheckpointStore
from pipeline.config import load_config
from pipeline.errors import TrainingError
from pipeline.learner import Learner, learning_rate
from pipeline.loop import Hooks, _Training
from pipeline.meter import Meter
from pipeline.settings import Config, TrainConfig
from pipeline.stopwatch import Stopwatch
from pipeline.storage import LocalStorage
from pipeline.train import train_in_process
from pipeline.validation import loss_of

STEPS = 24


@pytest.fixture
def data(tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The manifest of 50 random images to train on and 20 to validate, in the root `tmp_path`."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 1, 8, 8), np.uint8)
    labels = [k % 3 for k in range(len(pixels))]
    return write_data_set(LocalStorage(str(tmp_path)), pixels, labels, num_validation=20)


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(
        tiny_config, [f"train.num_steps={STEPS}", "train.checkpoint_every=8", "model.dropout=0.1"]
    )


def train(
    config: Config, tmp_path: Path, data: dict[str, Any], name: str, **options: Any
) -> CheckpointStore:
    train_in_process(config, LocalStorage(str(tmp_path)), name, data, **options)
    return store_of(tmp_path, name)


def store_of(tmp_path: Path, name: str) -> CheckpointStore:
    return CheckpointStore(LocalStorage(str(tmp_path)), name)


def poisoned(
    make: Callable[..., Batch], numbers: set[int], value: float = torch.inf
) -> Callable[..., Batch]:
    """Batches as they are, but for these numbers the first noise is this value."""

    def make_poisoned(self: BatchMaker, number: int, num_rewinds: int) -> Batch:
        batch = make(self, number, num_rewinds)
        if number in numbers:
            batch.noise[0] = value
        return batch

    return make_poisoned


def load(store: CheckpointStore, step: int = STEPS) -> Any:
    checkpoint = store.load(step)
    assert checkpoint is not None
    return checkpoint


def learned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics without how long things took."""
    timing = {"images_per_s", "wall_s", "seconds"}
    return [{key: row[key] for key in row.keys() - timing} for row in history]


def test_the_same_run_twice_is_the_same_to_the_bit(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    one, two = (load(train(config, tmp_path, data, name)) for name in ("one", "two"))
    assert all(torch.equal(one.ema[name], two.ema[name]) for name in one.ema)
    assert learned(one.history) == learned(two.history)


@pytest.mark.parametrize(
    ("settings", "init_scale"),
    [
        ({}, 2.0**16),
        ({"accumulation_steps": 2}, 2.0**16),
        ({"precision": "fp16"}, 2.0**22),  # too large for the first gradients
    ],
    ids=["plain", "parts", "fp16"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    init_scale: float,
) -> None:
    scale_losses_by(monkeypatch, init_scale)
    config = settings_of(smaller(config) if "precision" in settings else config, **settings)
    whole = load(train(config, tmp_path, data, "whole"))
    train(settings_of(config, num_steps=16), tmp_path, data, "parts")
    assert_same_to_the_bit(load(train(config, tmp_path, data, "parts")), whole)
    if config.train.precision == "fp16":
        assert whole.optimizer["scaler"]["scale"] < init_scale


def scale_losses_by(monkeypatch: pytest.MonkeyPatch, init_scale: float) -> None:
    """The scale that fp16 begins with."""
    monkeypatch.setattr(
        torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=init_scale)
    )


def settings_of(config: Config, **settings: Any) -> Config:
    train = config.train.model_copy(update=settings)
    return config.model_copy(update={"train": train})


def smaller(config: Config) -> Config:
    """For fp16, which a CPU is slow at."""
    model = config.model.model_copy(update={"dim": 4, "norm_groups": 2})
    return settings_of(config.model_copy(update={"model": model}), global_batch_size=16)


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in theirs)
    return ours == theirs


def assert_same_to_the_bit(ours: Checkpoint, theirs: Checkpoint) -> None:
    for kind in ("model", "ema", "optimizer"):
        assert equal(getattr(ours, kind), getattr(theirs, kind)), kind
    assert learned(list(ours.history)) == learned(list(theirs.history))


def test_another_number_of_threads_is_said_and_recorded(
    config: Config, tmp_path: Path, data: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    train(settings_of(config, num_steps=16), tmp_path, data, "x")
    two = settings_of(config, cpus_per_worker=2)
    done = load(train(two, tmp_path, data, "x"))
    assert "with threads = 2, and the checkpoint was made with 1: the last bits" in caplog.text
    assert [(e["since_step"], e["threads"]) for e in done.environments] == [(0, 1), (16, 2)]
    caplog.clear()
    (tmp_path / "x" / "checkpoints" / "000000024" / "manifest.json").unlink()
    again = load(train(two, tmp_path, data, "x"))
    assert "was made with 1" in caplog.text  # the one that is left is of step 16
    assert again.environments == done.environments


def test_what_is_done_again_after_a_rewind_is_recorded_as_done_here(
    config: Config, tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings_of(config, num_steps=16), tmp_path, data, "x")
    make = poisoned(BatchMaker.make, {17})
    resumed_from = tmp_path / "x" / "checkpoints" / "000000016" / "manifest.json"

    def make_and_damage(self: BatchMaker, number: int, num_rewinds: int) -> Batch:
        if number == 17:
            resumed_from.unlink()
        return make(self, number, num_rewinds)

    monkeypatch.setattr(BatchMaker, "make", make_and_damage)
    done = load(train(settings_of(config, cpus_per_worker=2), tmp_path, data, "x"))
    assert tuple(done.skipped) == (17,)
    assert [(e["since_step"], e["threads"]) for e in done.environments] == [(0, 1), (8, 2)]


def test_another_cpu_capability_is_said_and_recorded(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    train(settings_of(config, num_steps=16), tmp_path, data, "x")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE")
    done = load(train(config, tmp_path, data, "x"))
    assert f"with cpu_capability = NONE, and the checkpoint was made with {here}" in caplog.text
    assert [e["cpu_capability"] for e in done.environments] == [here, "NONE"]


def test_what_the_arithmetic_is_is_recorded_and_another_precision_is_said_as_such(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train(settings_of(config, num_steps=8), tmp_path, data, "x")
    # As where training moves to a GPU, with "auto".
    monkeypatch.setattr("pipeline.learner.choose_dtype", lambda config, device: torch.bfloat16)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    other = settings_of(config, num_steps=16, accumulation_steps=2, compile=True)
    done = load(train(other, tmp_path, data, "x"), 16)
    names = ("since_step", "precision", "compiled", "accumulation_steps")
    assert [tuple(e[name] for name in names) for e in done.environments] == [
        (0, "fp32", False, 1),
        (8, "bf16", True, 2),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "Training continues with accumulation_steps = 2, and the checkpoint was made with 1: the "
        "last bits may differ.",
        "Training continues with compiled = True, and the checkpoint was made with False: the last "
        "bits may differ.",
        "Training continues in bf16, and the checkpoint was made in fp32: results differ by more "
        "than the last bits. Give it a device of the kind it had, or set train.precision, with "
        "which training begins anew.",
    ]


def test_what_a_checkpoint_does_not_tell_is_recorded_and_not_said(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Checkpoints from before there was such a field."""
    with monkeypatch.context() as before:
        before.setattr("pipeline.loop.gather_environment", lambda *_, **more: {"threads": 1})
        train(settings_of(config, num_steps=8), tmp_path, data, "x")
    done = load(train(settings_of(config, num_steps=16), tmp_path, data, "x"), 16)
    assert [e.get("precision") for e in done.environments] == [None, "fp32"]
    assert caplog.records == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_without_a_finite_loss_is_skipped(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
) -> None:
    config = settings_of(smaller(config), precision=precision)
    monkeypatch.setattr(BatchMaker, "make", poisoned(BatchMaker.make, {13}))
    done = load(train(config, tmp_path, data, "done"))
    assert (done.skipped, done.num_rewinds) == ((13,), 1)
    assert re.search(r"not finite at step 14 \(rank 0, last finite loss [\d.]+\)", caplog.text)
    assert "went back to step 8 and skips that batch" in caplog.text
    assert [row["global_step"] for row in done.history] == [8, 16, 20, 24]
    assert all(math.isfinite(row["loss"]) for row in done.history)
    assert all(torch.isfinite(weight).all() for weight in done.ema.values())

    train(settings_of(config, num_steps=16), tmp_path, data, "stopped")
    assert_same_to_the_bit(load(train(config, tmp_path, data, "stopped")), done)


@pytest.mark.parametrize("bad_step", [16, STEPS])
@pytest.mark.parametrize("held", ["weights", "average", "moments"])
def test_what_is_not_finite_is_in_no_checkpoint(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bad_step: int,
    held: str,
) -> None:
    learn, times = Learner.learn, []

    def learn_badly(self: Learner, batch: Batch, step: int, meter: Meter) -> bool:
        is_learned = learn(self, batch, step, meter)
        if step + 1 == bad_step and not times:
            times.append(step)
            spoilt = next((self.ema.model if held == "average" else self.model).parameters())
            if held == "moments":
                spoilt = self.optimizer.state[spoilt]["exp_avg_sq"]
            with torch.no_grad():
                spoilt.view(-1)[0] = torch.nan
        return is_learned

    monkeypatch.setattr(Learner, "learn", learn_badly)
    store = train(config, tmp_path, data, "x")
    done = load(store)
    assert (done.num_rewinds, len(done.skipped)) == (1, 1)
    assert f"The weights were not finite at step {bad_step} (after a finite loss" in caplog.text
    assert f"went back to step {bad_step - 8} and skips" in caplog.text
    for step in store.steps():
        kept = load(store, step)
        assert all(torch.isfinite(w).all() for w in [*kept.model.values(), *kept.ema.values()])


@pytest.mark.parametrize("checkpoint_every", [8, 1])  # 1: no step is done after a rewind
def test_too_many_rewinds_end_the_training(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_every: int,
) -> None:
    config = settings_of(config, checkpoint_every=checkpoint_every)
    make = BatchMaker.make
    monkeypatch.setattr(BatchMaker, "make", poisoned(make, set(range(3, 100))))
    message = r"not finite at step 4 \(rank 0, last finite loss [\d.]+\), after 2 rewinds. Lower"
    for _ in range(2):  # the second process does no step, if there is a checkpoint
        with pytest.raises(TrainingError, match=message):
            train(config, tmp_path, data, "x")
    monkeypatch.setattr(BatchMaker, "make", poisoned(make, {9}))
    done = load(train(config, tmp_path, data, "x"))
    assert done.skipped == (9,)


def test_reading_a_checkpoint_to_go_back_to_is_no_wait_for_data(
    config: Config, tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, load_latest = [0.0], CheckpointStore.load_latest

    def tick() -> float:
        now[0] += 1
        return now[0]

    def load_slowly(self: CheckpointStore, *args: Any, **options: Any) -> Checkpoint | None:
        now[0] += 1e6
        return load_latest(self, *args, **options)

    monkeypatch.setattr("pipeline.loop.Stopwatch", lambda: Stopwatch(tick))
    monkeypatch.setattr(CheckpointStore, "load_latest", load_slowly)
    monkeypatch.setattr(BatchMaker, "make", poisoned(BatchMaker.make, {13}))
    rows = load(train(config, tmp_path, data, "x")).history
    seconds = next(row["seconds"] for row in rows if row["global_step"] == 16)
    assert seconds["checkpoint"] > 1e6 > sum(seconds.values()) - seconds["checkpoint"]


def test_what_the_loss_scale_skips_moves_nothing_and_is_in_no_row(
    config: Config, tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"num_steps": 1, "checkpoint_every": 1, "log_every": 1}
    scale_losses_by(monkeypatch, 2.0**40)
    store = train(settings_of(config, precision="fp16", **steps), tmp_path, data, "x")
    (row,) = load(store, 1).history
    assert row["grad_norm"] is None
    assert "Infinity" not in (tmp_path / "x" / "metrics.jsonl").read_text()
    assert equal(load(store, 1).ema, load(store, 1).model)


def without_gradient(steps: Container[int]) -> Callable[..., torch.Tensor]:
    """The loss as it is, but at these calls of it, from 1, with a gradient that is NaN."""
    calls = itertools.count(1)

    def make_loss(batch: Batch, model: torch.nn.Module, diffusion: Diffusion) -> torch.Tensor:
        losses = loss_of(batch, model, diffusion)
        if next(calls) in steps:  # the root of 0, whose slope is infinite, of 0 times a weight
            losses = losses + (0 * next(model.parameters()).sum()).sqrt()
        return losses

    return make_loss


@pytest.mark.parametrize("init_scale", [1.0, 2.0])
def test_a_gradient_that_no_loss_scale_mends_is_treated_as_a_loss_that_is_not_finite(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    init_scale: float,
) -> None:
    scale_losses_by(monkeypatch, init_scale)
    half = settings_of(smaller(config), precision="fp16")
    monkeypatch.setattr("pipeline.learner.loss_of", without_gradient({14}))
    once = load(train(half, tmp_path, data, "once"))
    assert once.skipped == ((13,) if init_scale == 1 else ())
    monkeypatch.setattr("pipeline.learner.loss_of", without_gradient(range(14, 100)))
    message = r"\(in the gradient only, last finite loss [\d.]+\), after 2 rewinds. Lower .*fp32"
    with pytest.raises(TrainingError, match=message):
        train(settings_of(half, num_steps=40), tmp_path, data, "always")


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.01, 0.05, 0.1, 0.1, 0.1]),
        # half of 1 + cos(pi step / 40)
        ("cosine", [0.01, 0.05 * 0.975528, 0.1 * 0.880203, 0.1 * 0.5, 0.1 * 0.00154]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(decay: Any, expected: list[float]) -> None:
    config = TrainConfig(
        learning_rate=0.1, warmup_steps=10, num_steps=40, learning_rate_decay=decay
    )
    rates = [learning_rate(config, step) for step in (0, 4, 9, 20, 39)]
    assert rates == pytest.approx(expected, rel=1e-2)


def test_gradients_are_clipped_and_shown_as_they_were(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    # AdamW does not see the scale of gradients until they are as small as its epsilon.
    ways = {"large": 1e9, "tiny": 1e-9}
    one = {"num_steps": 1, "checkpoint_every": 1}
    done = {
        name: load(train(settings_of(config, max_grad_norm=norm, **one), tmp_path, data, name), 1)
        for name, norm in ways.items()
    }
    norms = {name: saved.history[0]["grad_norm"] for name, saved in done.items()}
    assert norms["tiny"] == norms["large"] > 1e-3
    moments = {
        name: sum(float(s["exp_avg"].square().sum()) for s in state.values()) ** 0.5 / 0.1
        for name, saved in done.items()
        for state in [saved.optimizer["optimizer"]["state"]]
    }
    assert moments["large"] == pytest.approx(norms["large"], rel=1e-4)
    assert moments["tiny"] == pytest.approx(1e-9, rel=1e-2)


def test_metrics_are_cut_at_the_checkpoint_that_counts(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    train(config, tmp_path, data, "x")
    path = tmp_path / "x" / "metrics.jsonl"

    def steps_shown() -> list[int]:
        return [json.loads(line)["global_step"] for line in path.read_text().splitlines()]

    assert steps_shown() == [8, 16, 20, 24]
    (tmp_path / "x" / "checkpoints" / "000000024" / "manifest.json").unlink()
    seen = []

    def on_row(row: dict[str, Any], first_step: int) -> None:
        seen.append((row["global_step"], steps_shown()))

    train(config, tmp_path, data, "x", hooks=Hooks(on_row=on_row))
    assert seen[0] == (20, [8, 16])


def test_rows_tell_the_loss_by_noise_and_on_validation(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    settings = {"validate_every": 8, "keep_every": 16, "num_steps": 40, "log_every": 10}
    store = train(settings_of(config, **settings), tmp_path, data, "x")
    rows = load(store, 40).history
    assert [row["global_step"] for row in rows] == [8, 10, 16, 20, 24, 30, 32, 40]
    measured = {r["global_step"]: r["validation_loss"] for r in rows if "validation_loss" in r}
    assert measured.keys() == {8, 16, 24, 32, 40}
    assert measured[40] < measured[8]
    best = min(measured, key=lambda step: measured[step])
    assert store.steps() == sorted({16, 32, 40, best})
    quarters = np.array([row["loss_by_noise"] for row in rows], float)
    assert np.nanmean(quarters[:, 0]) != pytest.approx(np.nanmean(quarters[:, 3]), rel=0.05)


def test_samples_and_scores_are_due_between_rows_too(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    told: dict[str, list[int]] = {"samples": [], "fid": []}
    hooks = Hooks(
        on_samples=lambda step, model: told["samples"].append(step),
        on_fid=lambda step, model: told["fid"].append(step),
    )
    plain = load(train(config, tmp_path, data, "plain"))
    watched = settings_of(config, sample_every=9, fid_every=5)
    after = load(train(watched, tmp_path, data, "x", hooks=hooks))
    assert told == {"samples": [9, 18], "fid": [5, 10, 15, 20]}
    assert all(torch.equal(after.ema[name], plain.ema[name]) for name in plain.ema)
    assert learned(after.history) == learned(plain.history)


def test_half_precision_trains_and_is_told_apart(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    config = smaller(config)
    exact = load(train(config, tmp_path, data, "fp32"))
    for precision in ("bf16", "fp16"):
        half = load(train(settings_of(config, precision=precision), tmp_path, data, precision))
        assert half.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.05)
        assert all(weight.dtype == torch.float32 for weight in half.ema.values())
        assert not equal(half.model, exact.model)


def test_it_learns_and_the_ema_moves(config: Config, tmp_path: Path, data: dict[str, Any]) -> None:
    checkpoint = load(train(settings_of(config, num_steps=100), tmp_path, data, "x"), 100)
    losses = [entry["loss"] for entry in checkpoint.history]
    assert losses[-1] < 0.9 * losses[0]
    start = load(train(config, tmp_path, data, "start"))
    moved = [not torch.equal(checkpoint.ema[n], start.ema[n]) for n in start.ema]
    assert all(moved)


def test_what_cannot_be_compiled_is_trained_without_and_said(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(module: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            raise RuntimeError("no compiler\nwas found")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    wants = settings_of(config, compile=True)
    plain = load(train(config, tmp_path, data, "plain"))
    assert caplog.records == []
    without = load(train(wants, tmp_path, data, "without"))
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile failed, training goes on without it: no compiler"
    ]
    assert all(torch.equal(without.ema[name], plain.ema[name]) for name in plain.ema)
    assert [known["compiled"] for known in without.environments] == [False]


def test_what_is_compiled_is_what_trains(
    config: Config,
    tmp_path: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def compiled(module: Any) -> Any:
        return lambda *args, **more: calls.append(1) or module(*args, **more)

    monkeypatch.setattr(torch, "compile", compiled)
    wants = settings_of(config, compile=True)
    train(wants, tmp_path, data, "compiled")
    assert len(calls) == STEPS + 1  # one to warm up
    train(wants, tmp_path, data, "compiled")  # it was done
    assert caplog.records == []


def test_a_training_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    config: Config, tmp_path: Path, data: dict[str, Any]
) -> None:
    store = train(config, tmp_path, data, "t")
    for path in tmp_path.glob("t/checkpoints/*/model*"):
        path.write_bytes(b"x")
    with pytest.raises(TrainingError, match=r"below t are damaged, all of them\. Bring one"):
        train(config, tmp_path, data, "t")
    assert store.steps() == [16, 24]


def test_rows_tell_where_training_is(config: Config, tmp_path: Path, data: dict[str, Any]) -> None:
    decays = settings_of(config, learning_rate_decay="cosine")
    rows = load(train(decays, tmp_path, data, "x")).history
    for row, steps in zip(rows, (8, 8, 4, 4), strict=True):
        done = row["global_step"]
        assert row["images_seen"] == 32 * done
        assert row["learning_rate"] == learning_rate(decays.train, done - 1)  # of the last step
        assert row["images_per_s"] * row["wall_s"] == pytest.approx(32 * steps)


def test_what_is_shown_and_scored_on_the_way_is_the_average(
    config: Config, tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[torch.nn.Module] = []

    def show(step: int, model: torch.nn.Module) -> None:
        shown.append(copy.deepcopy(model))

    def validate(model: torch.nn.Module, *_: Any, dtype: torch.dtype, **__: Any) -> float:
        assert dtype == torch.bfloat16
        show(8, model)
        return 0.5

    monkeypatch.setattr("pipeline.loop.validation_loss", validate)
    every = dict.fromkeys(("sample_every", "fid_every", "validate_every"), 8)
    hooks = Hooks(on_samples=show, on_fid=show)
    watched = settings_of(config, num_steps=8, precision="bf16", **every)
    done = load(train(watched, tmp_path, data, "x", hooks=hooks), 8)
    assert not equal(done.ema, done.model)
    assert len(shown) == 3
    for model in shown:
        assert not model.training  # nothing is dropped
        assert equal(dict(model.state_dict()), dict(done.ema))


def test_each_step_of_each_rank_drops_units_of_its_own() -> None:
    def seed(number: int = 0, train_seed: int = 0, num_rewinds: int = 0, rank: int = 0) -> int:
        training: Any = SimpleNamespace(
            config=TrainConfig(seed=train_seed), num_rewinds=num_rewinds, rank=rank
        )
        return _Training._dropout_seed(training, number)

    seeds = {seed(), seed(number=1), seed(train_seed=1), seed(num_rewinds=1), seed(rank=1)}
    assert len(seeds) == 5
    assert seed() in seeds
