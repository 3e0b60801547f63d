import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from pipeline.checkpoints import CheckpointStore
from pipeline.config import load_config
from pipeline.loop import Hooks
from pipeline.models import make_unet
from pipeline.storage import LocalStorage, Storage, open_storage
from pipeline.train import train_in_process
from pipeline.training_views import LatestWriter, TensorBoard, TrainingViews


def read_events(content: bytes) -> list[tuple[str, int, float]]:
    """Tag, step and value of all scalars in a file of TensorBoard."""
    events = iter_events(content)
    return [(v.tag, event.step, v.simple_value) for event in events for v in event.summary.value]


def iter_events(content: bytes) -> Iterator[Any]:
    """The events of a file, whose checksums are right."""
    place = 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        body = content[place + 12 : place + 12 + size]
        for part, at in ((content[place : place + 8], 8), (body, 12 + size)):
            checksum = content[place + at : place + at + 4]
            assert int.from_bytes(checksum, "little") == masked_crc32c(part)
        yield Event.FromString(body)
        place += 16 + size


def run(
    config: Any, storage: Storage, data: dict[str, Any], started: float = 0.0
) -> list[dict[str, Any]]:
    with closing(TrainingViews(config, storage, "t", started)) as views:
        hooks = Hooks(on_row=views.on_row, on_samples=views.on_samples)
        return train_in_process(config, storage, "t", data, hooks=hooks)


def load_ema(storage: Storage, step: int) -> Mapping[str, torch.Tensor]:
    checkpoint = CheckpointStore(storage, "t").load(step)
    assert checkpoint is not None
    return checkpoint.ema


def test_rows_and_samples_are_to_be_seen(
    tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> None:
    storage = LocalStorage(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8)
    data = write_data_set(storage, pixels)
    settings = ["train.num_steps=8", "train.log_every=2", "train.sample_every=4"]
    config = load_config(tiny_config, [*settings, "evaluate.num_steps=3"])
    rows = run(config, storage, data)
    progress = json.loads((tmp_path / "t" / "progress.json").read_text())
    assert progress["global_step"] == progress["num_steps"] == 8
    assert progress["seconds_left"] == 0
    assert progress["loss"] == rows[-1]["loss"]
    (events,) = (tmp_path / "t" / "tensorboard").iterdir()
    scalars = read_events(events.read_bytes())
    losses = [value for tag, _, value in scalars if tag == "train/loss"]
    assert losses == pytest.approx([row["loss"] for row in rows])
    assert {tag for tag, *_ in scalars} >= {"train/grad_norm", "time/compute", "loss_by_noise/4"}
    names = sorted(path.name for path in (tmp_path / "t" / "samples").iterdir())
    assert names == ["000000004.png", "000000008.png"]
    first, second = ((tmp_path / "t" / "samples" / name).read_bytes() for name in names)
    assert Image.open(io.BytesIO(first)).size == (8 * 68 - 4, 8 * 68 - 4)
    assert first != second
    run(config, storage, data)  # it was done
    model = make_unet(config, 0)
    model.load_state_dict(dict(load_ema(storage, 8)))
    with closing(TrainingViews(config, storage, "again", 0.0)) as views:
        views.on_samples(8, model)
    assert (tmp_path / "again" / "samples" / names[1]).read_bytes() == second


def test_samples_of_sequences_are_curves_and_of_classes_columns(
    tiny_config: Path, tmp_path: Path, write_data_set: Callable[..., dict[str, Any]]
) -> None:
    storage = LocalStorage(str(tmp_path))
    sequences = np.random.default_rng(0).normal(size=(50, 2, 16)).astype(np.float32)
    data = write_data_set(storage, sequences, [k % 3 for k in range(50)])
    text = tiny_config.read_text().replace("resolution = 8", "sequence_shape = [2, 16]")
    tiny_config.write_text(text.replace('mode = "L"\n', ""))
    settings = ["train.num_steps=2", "train.sample_every=2", "model.class_conditional=true"]
    run(load_config(tiny_config, [*settings, "evaluate.num_steps=2"]), storage, data)
    picture = Image.open(tmp_path / "t" / "samples" / "000000002.png")
    assert len(np.unique(np.asarray(picture).reshape(-1, len(picture.getbands())), axis=0)) > 3


@pytest.mark.parametrize(
    ("num_classes", "columns", "rows"),
    [(2, 8, 8), (3, 6, 10), (8, 8, 8), (10, 10, 6), (16, 16, 4), (26, 8, 8), (64, 8, 8)],
)
def test_samples_show_every_class(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_classes: int,
    columns: int,
    rows: int,
) -> None:
    config = load_config(tiny_config, ["model.class_conditional=true"])

    def sample_labels(*_: Any, class_labels: torch.Tensor) -> torch.Tensor:
        """Images that are as bright as their label is high."""
        return (class_labels / 100)[:, None, None, None].expand(-1, 1, 8, 8)

    monkeypatch.setattr("pipeline.training_views.sample_items", sample_labels)
    with closing(TrainingViews(config, LocalStorage(str(tmp_path)), "t", 0.0)) as views:
        views.on_samples(2, make_unet(config, 0, num_classes))
    picture = Image.open(tmp_path / "t" / "samples" / "000000002.png").convert("L")
    assert picture.size == (columns * 68 - 4, rows * 68 - 4)
    shades = np.asarray(picture)[32::68, 32::68]
    assert len(np.unique(shades)) == num_classes
    if num_classes <= 16:
        assert (shades == shades[0]).all()


ROW: dict[str, Any] = {
    "global_step": 4, "images_seen": 64, "loss": 0.5, "loss_by_noise": [0.1, None, 0.2, 0.3],
    "grad_norm": 1.0, "learning_rate": 0.1, "num_rewinds": 0, "images_per_s": 10.0,
    "wall_s": 2.0, "seconds": {"compute": 2.0}, "validation_loss": 0.25,
}  # fmt: skip


def test_the_file_of_events_goes_to_remote_storage_too(
    object_store: Any, tiny_config: Path
) -> None:
    _, bucket = object_store
    storage = open_storage(f"s3://{bucket}/root")
    config = load_config(tiny_config, ["train.num_steps=4"])
    with closing(TrainingViews(config, storage, "t", 0.0)) as views:
        logging.getLogger("pipeline.loop").warning("it went back")
        views.on_row(ROW, 0)
    (name,) = storage.list("t/tensorboard")
    tags = {tag: value for tag, _, value in read_events(storage.read(f"t/tensorboard/{name}"))}
    assert tags["validation/loss"] == 0.25
    assert json.loads(storage.read("t/progress.json"))["notes"] == ["it went back"]


def test_a_storage_that_does_not_answer_holds_nobody_up(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def wait_before(written: Callable[..., None]) -> Callable[..., None]:
        def wait(*arguments: Any) -> None:
            assert threading.current_thread() is not threading.main_thread()
            if answers.wait(60):
                written(*arguments)

        return wait

    monkeypatch.setattr(LocalStorage, "replace", wait_before(LocalStorage.replace))
    monkeypatch.setattr(TensorBoard, "_grow", wait_before(TensorBoard._grow))
    for name in ("PROGRESS_EVERY_S", "WRITE_EVERY_S"):
        monkeypatch.setattr(f"pipeline.training_views.{name}", 0.0)
    monkeypatch.setattr("pipeline.training_views.CLOSE_WITHIN_S", 0.01)
    config = load_config(tiny_config, ["train.num_steps=9"])
    with closing(TrainingViews(config, LocalStorage(str(tmp_path)), "t", 0.0)) as views:
        for step in range(1, 10):
            views.on_row(ROW | {"global_step": step}, 0)
    assert not (tmp_path / "t").exists()  # nor has the end waited
    answers.set()
    assert views._writer._thread is not None
    views._writer._thread.join(60)
    assert json.loads((tmp_path / "t" / "progress.json").read_text())["global_step"] == 9
    (events,) = (tmp_path / "t" / "tensorboard").iterdir()
    steps = [step for tag, step, _ in read_events(events.read_bytes()) if tag == "train/loss"]
    assert steps == list(range(1, 10))


def test_a_file_that_grows_on_another_thread_has_all_events_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training_views.WRITE_EVERY_S", 0.0)
    writer = LatestWriter()
    board = TensorBoard(LocalStorage(str(tmp_path)), "t", 1, writer.put)
    for step in range(1, 2001):
        board.add(step, {"loss": 1.0})
    board.flush()
    writer.close()
    (events,) = (tmp_path / "t").iterdir()
    assert [step for _, step, _ in read_events(events.read_bytes())] == list(range(1, 2001))


def test_warnings_of_another_training_are_not_its_own(tiny_config: Path, tmp_path: Path) -> None:
    config, storage = load_config(tiny_config), LocalStorage(str(tmp_path))
    with closing(TrainingViews(config, storage, "t", 0.0)) as first:
        logging.getLogger("pipeline.loop").warning("it went back")
    with closing(TrainingViews(config, storage, "t", 0.0)):
        logging.getLogger("pipeline.loop").warning("another did")
    assert first._notes.texts == ["it went back"]


def test_samples_that_cannot_be_drawn_end_nothing(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("pipeline.training_views.sample_items", fail)
    config = load_config(tiny_config)
    with closing(TrainingViews(config, LocalStorage(str(tmp_path)), "t", 0.0)) as views:
        views.on_samples(1000, make_unet(config, 0))
    assert "There is no picture at step 1,000: out of memory" in caplog.text
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("steps", "expected"), [((2, 4, 6, 4, 6), [1, 4]), ((4, 8, 12, 12, 16), [1, 12]), ((1, 2), [1])]
)
def test_events_that_training_comes_by_again_replace_those_before(
    tmp_path: Path, steps: tuple[int, ...], expected: list[int]
) -> None:
    board = TensorBoard(LocalStorage(str(tmp_path)), "t", 1)
    for step in steps:
        board.add(step, {"loss": 1.0})
    board.flush()
    (path,) = (tmp_path / "t").iterdir()
    events = list(iter_events(path.read_bytes()))
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == expected
    assert [event.step for event in events if event.HasField("summary")] == list(steps)


def test_a_clock_that_is_set_back_holds_up_no_progress(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training_views.PROGRESS_EVERY_S", 0.0)
    config = load_config(tiny_config, ["train.num_steps=9"])
    with closing(TrainingViews(config, LocalStorage(str(tmp_path)), "t", 0.0)) as views:
        views.on_row(ROW | {"global_step": 1}, 0)
        an_hour_ago = time.time() - 3600
        monkeypatch.setattr(time, "time", lambda: an_hour_ago)
        views.on_row(ROW | {"global_step": 2}, 0)
    assert json.loads((tmp_path / "t" / "progress.json").read_text())["global_step"] == 2


def test_the_time_left_is_that_of_the_images_left(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, ["train.num_steps=9"])
    with closing(TrainingViews(config, LocalStorage(str(tmp_path)), "t", 0.0)) as views:
        views.on_row(ROW, 0)
    progress = json.loads((tmp_path / "t" / "progress.json").read_text())
    assert progress["seconds_left"] == 5 * 32 / 10
