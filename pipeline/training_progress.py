"""What rank 0 writes while it trains, read by the driver and told as the step's progress."""

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from pipeline.errors import StorageError
from pipeline.fid_validation import Scorer
from pipeline.storage import Storage
from pipeline.training_views import PROGRESS_EVERY_S
from pipeline.workflow import StepContext


@contextlib.contextmanager
def tell_progress(context: StepContext, scorer: Scorer | None) -> Iterator[None]:
    """Passes on what rank 0 writes, from a thread of its own, while the block runs."""
    stop = threading.Event()
    context.storage.delete(f"{context.series_directory}/progress.json")

    def watch() -> None:
        told: tuple[tuple[int, float], int] | None = None
        noted = 0
        ended = False
        while not ended:
            ended = stop.wait(PROGRESS_EVERY_S)
            document = read_training_progress(context.storage, context.series_directory)
            if document is None:
                continue
            began = (document["resumed_from"], document["seconds_to_first_step"])
            now = (began, document["global_step"])
            if now == told:
                continue
            if told is None or told[0] != began:  # another group of workers, with notes of its own
                noted = 0
                note = f"first step after {document['seconds_to_first_step']:.0f} s"
                if began[0]:
                    note += f", resumed from the checkpoint at step {began[0]:,}"
                context.note(note)
                if scorer is not None:
                    scorer.begin(began[0])
            if scorer is not None:
                scorer.reach(now[1])
            for text in document["notes"][noted:]:
                context.note(text)
            noted, told = len(document["notes"]), now
            context.progress(
                document["global_step"],
                document["num_steps"],
                "steps",
                rate=document["images_per_s"],
                rate_unit="images/s",
                loss=document["loss"],
                left_s=document["seconds_left"],
            )

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def read_training_progress(storage: Storage, directory: str) -> dict[str, Any] | None:
    """What rank 0 has written last; None where it has not, or it cannot be read."""
    try:
        return json.loads(storage.read(f"{directory}/progress.json"))
    except (FileNotFoundError, StorageError):
        return None
