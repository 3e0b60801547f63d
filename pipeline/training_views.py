"""What a person sees of a training while it runs, written by rank 0 beside its checkpoints.

`progress.json` for the driver and `status`, `tensorboard/` with all of `metrics.jsonl`, and
`samples/<step>.png`. All of it is for the eye: training neither waits until it is written nor ends
when it cannot be.
"""

import contextlib
import json
import logging
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import masked_crc32c
from torch import nn

from diffusion_core import UNet
from pipeline.checkpoints import Row
from pipeline.errors import StorageError
from pipeline.sampling import quantise, sample_items
from pipeline.settings import Config
from pipeline.storage import LocalStorage, Storage

PROGRESS_EVERY_S = 1.0
WRITE_EVERY_S = 5.0  # TensorBoard's file
UPLOAD_EVERY_S = 30.0  # where the storage is remote
CLOSE_WITHIN_S = 60.0  # for what is still to be written at the end
NUM_SAMPLES, COLUMNS, TILE_PX = 64, 8, 64

logger = logging.getLogger(__name__)


class TrainingViews:
    """The hooks of the loop that show it.

    Args:
        config: the whole config.
        storage: the root.
        directory: of the training, below the root.
        started: when the step began, in seconds since the epoch.
    """

    def __init__(self, config: Config, storage: Storage, directory: str, started: float) -> None:
        self._config, self._storage, self._directory = config, storage, directory
        self._started, self._told_at = started, -math.inf
        self._first_step_s: float | None = None
        self._notes = _CollectedWarnings()
        logging.getLogger("pipeline").addHandler(self._notes)
        self._board: TensorBoard | None = None
        self._writer = LatestWriter()

    def close(self) -> None:
        """Until all is written, or for a minute."""
        logging.getLogger("pipeline").removeHandler(self._notes)
        if self._board is not None:
            self._board.flush()
        self._writer.close()

    def on_row(self, row: Row, first_step: int) -> None:
        """Shows a row of metrics; the progress at most once a second, and at the end."""
        now = time.time()
        if self._board is None:
            directory = f"{self._directory}/tensorboard"
            self._board = TensorBoard(self._storage, directory, first_step + 1, self._writer.put)
        is_last = row["global_step"] == self._config.train.num_steps
        self._board.add(row["global_step"], _scalars(row))
        if self._first_step_s is None:
            self._first_step_s = now - row["wall_s"] - self._started
        if time.monotonic() - self._told_at < PROGRESS_EVERY_S and not is_last:
            return
        self._told_at = time.monotonic()
        left = self._config.train.num_steps - row["global_step"]
        document = row | {
            "num_steps": self._config.train.num_steps,
            "resumed_from": first_step,
            "seconds_left": left * self._config.train.global_batch_size / row["images_per_s"],
            "at": now,
            "seconds_to_first_step": self._first_step_s,
            "notes": self._notes.texts,
        }
        self._replace("progress.json", json.dumps(document).encode())

    def on_samples(self, step: int, model: nn.Module) -> None:
        """Draws the same seeds after so many steps, of each class where there are any."""
        try:
            self._replace(f"samples/{step:09d}.png", self._draw(model))
        except Exception as error:  # out of memory, say: the step's checkpoint is still to come
            logger.warning("There is no picture at step %s: %s", f"{step:,}", error)

    def _draw(self, model: nn.Module) -> bytes:
        assert isinstance(model, UNet)
        num_classes = model.config.num_classes
        columns = _columns(num_classes)
        numbers = range(NUM_SAMPLES // columns * columns)
        labels = None if num_classes is None else torch.tensor(numbers) % num_classes
        with torch.random.fork_rng(devices=[]):
            samples = sample_items(self._config, model, numbers, class_labels=labels)
        from pipeline.report.plots import draw_grid, draw_sequences  # matplotlib: only for these

        if self._config.data.is_sequence:
            return draw_sequences(samples.cpu().numpy(), columns)
        return draw_grid(quantise(samples), columns, TILE_PX)

    def _replace(self, name: str, content: bytes) -> None:
        path = f"{self._directory}/{name}"
        self._writer.put(path, lambda: self._storage.replace(path, content))


class LatestWriter:
    """Writes on a thread of its own, of every path the latest: nobody waits for a storage.

    What fails is left out; the next one may pass.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def put(self, path: str, write: Callable[[], None]) -> None:
        """Has it written soon, in place of what is waiting for the same path."""
        with self._changed:
            self._waiting[path] = write
            if self._thread is None:
                # A daemon: a process must end though a storage does not answer.
                self._thread = threading.Thread(target=self._run, name="views", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Until what was put is written, or for a minute; nothing may be put afterwards."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_WITHIN_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                write = self._waiting.pop(next(iter(self._waiting)))
            with contextlib.suppress(StorageError, OSError):
                write()


def _at_once(path: str, write: Callable[[], None]) -> None:
    with contextlib.suppress(StorageError, OSError):
        write()


class TensorBoard:
    """A file of events that TensorBoard reads.

    What cannot be written is kept until it can be: a storage that is away or full holds nobody up.
    A local file grows, as TensorBoard expects of one that it has opened; a remote one is replaced.

    Args:
        storage: the root.
        directory: of the file, below the root.
        purge_step: events of earlier files of the directory from this step on are no more.
        put: told of a path and what writes it, on whatever thread; writes at once when not given.
    """

    def __init__(
        self,
        storage: Storage,
        directory: str,
        purge_step: int,
        put: Callable[[str, Callable[[], None]], None] = _at_once,
    ) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._storage, self._path = storage, f"{directory}/{name}"
        self._put, self._is_local = put, isinstance(storage, LocalStorage)
        self._lock = threading.Lock()  # of the content
        self._content = bytearray()  # not written yet; of a remote file all of it
        self._num_written, self._written_at = 0, -math.inf
        self._last_step = purge_step - 1
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._purge(purge_step)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds numbers by tag, in place of those from this step on."""
        if step <= self._last_step:  # training went back
            self._purge(step)
        self._last_step = step
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        every_s = WRITE_EVERY_S if self._is_local else UPLOAD_EVERY_S
        if time.monotonic() - self._written_at > every_s:
            self.flush()

    def flush(self) -> None:
        """Has all that was added written, unless the storage is away."""
        self._written_at = time.monotonic()
        self._put(self._path, self._grow if self._is_local else self._upload)

    def _grow(self) -> None:
        content = self._snapshot()
        path = Path(self._storage.uri, self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(self._num_written)  # half a record may be there, from a full disk
            file.write(content)
        self._num_written += len(content)
        with self._lock:
            del self._content[: len(content)]

    def _upload(self) -> None:
        self._storage.replace(self._path, self._snapshot())

    def _snapshot(self) -> bytes:
        with self._lock:
            return bytes(self._content)

    def _purge(self, step: int) -> None:
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=step, session_log=start))

    def _append(self, event: Event) -> None:
        """As a record of TFRecord: length and content, each with its checksum."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        parts = [part + struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        with self._lock:
            self._content += b"".join(parts)


def _columns(num_classes: int | None) -> int:
    """Of the samples: one or more for each class, unless that makes too many."""
    if num_classes is None or num_classes > 2 * COLUMNS:
        return COLUMNS
    return num_classes * max(1, COLUMNS // num_classes)


def _scalars(row: Row) -> dict[str, float]:
    """A row as TensorBoard's tags."""
    scalars = {
        f"train/{name}": row[name]
        for name in ("loss", "grad_norm", "learning_rate", "images_per_s")
        if row[name] is not None
    }
    for quarter, loss in enumerate(row["loss_by_noise"], 1):
        if loss is not None:
            scalars[f"loss_by_noise/{quarter}"] = loss
    for part, seconds in row["seconds"].items():
        scalars[f"time/{part}"] = seconds / row["wall_s"]
    if "validation_loss" in row:
        scalars["validation/loss"] = row["validation_loss"]
    return scalars


class _CollectedWarnings(logging.Handler):
    """Keeps the warnings of a worker, so that they reach the person at the driver."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
