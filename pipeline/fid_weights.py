"""Weights on their way from rank 0 to be scored while training goes on: see `fid_validation.py`.

    <training>/fid/<protocol>/weights/<step>-<hash of the weights>.safetensors   to be scored
    <training>/fid/<protocol>/scores/<step>-<hash of the weights>.json           made once
    <training>/fid.jsonl                                                         for people

A score belongs to weights, not to a step alone: a resumed training that comes by the same weights
finds it, and one that comes by others (after a rewind, or on a GPU) drops it and has its own made.
"""

import logging
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor, nn

from pipeline.checkpoints import to_safetensors
from pipeline.errors import StorageError
from pipeline.storage import Storage, hash_content, hashed_name

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9]{9,}-")


class WeightsHandover:
    """On rank 0: leaves weights to be scored, unless some are still waiting for it.

    Args:
        storage: the root.
        directory: of the scores, below the root.
    """

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage, self._directory = storage, directory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fid")
        self._writing: Future[None] | None = None
        self._passed: dict[int, str] = {}  # name by step, where others are still to be dropped
        self._seen: set[int] | None = None  # steps with weights or scores, when last listed
        self._taken: set[int] = set()  # steps whose weights were taken
        self._skips = False

    def hand_over(self, step: int, model: nn.Module) -> None:
        """Takes a copy of the weights after so many steps and writes it on a thread."""
        is_busy = self._writing is not None and not self._writing.done()
        if is_busy:
            self._skip(step, "the weights before it are still being written")
            if self._seen is not None and step not in self._seen | self._taken:
                return  # there is nothing of other weights
        weights = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
        if is_busy:
            self._passed[step] = _name(step, to_safetensors(weights))
            return
        self._taken.add(step)
        self._writing = self._pool.submit(self._leave, step, weights)

    def close(self) -> None:
        """Until nothing is being written."""
        self._pool.submit(self._drop_others_at_the_end)
        self._pool.shutdown(wait=True)

    def _leave(self, step: int, weights: Mapping[str, Tensor]) -> None:
        content = to_safetensors(weights)
        name = self._passed[step] = _name(step, content)
        try:
            self._drop_others()
            if self._storage.exists(f"{self._directory}/scores/{name}.json"):
                return
            waiting = self._list("weights")
            if f"{name}.safetensors" in waiting:
                return
            if waiting:
                self._skip(step, f"that at step {step_of(waiting[0]):,} is not done")
                return
            self._storage.create(f"{self._directory}/weights/{name}.safetensors", content)
            self._skips = False
        except StorageError as error:
            logger.warning("There is no FID at step %s, training goes on: %s", f"{step:,}", error)

    def _drop_others(self) -> None:
        """Deletes what other weights left at the steps that training came by since it last did."""
        passed, seen = dict(self._passed), set[int]()
        for kind in ("weights", "scores") if passed else ():  # the driver's order: score, weights
            for other in self._list(kind):
                seen.add(step_of(other))
                name = passed.get(step_of(other))
                if name is not None and not other.startswith(name):
                    self._storage.delete(f"{self._directory}/{kind}/{other}")
        self._seen = seen
        for step, name in passed.items():
            if self._passed[step] == name:  # training has not come by other ones meanwhile
                del self._passed[step]

    def _drop_others_at_the_end(self) -> None:
        try:
            self._drop_others()
        except StorageError as error:
            steps = ", ".join(f"{step:,}" for step in sorted(self._passed))
            logger.warning("The FID at step %s may be of other weights: %s", steps, error)

    def _list(self, kind: str) -> list[str]:
        return list_named(self._storage, f"{self._directory}/{kind}")

    def _skip(self, step: int, reason: str) -> None:
        if not self._skips:  # one line for all until the next that is scored
            logger.warning(
                "The FID at step %s is left out, and so are those after it until there is time: %s",
                f"{step:,}",
                reason,
            )
        self._skips = True


def list_named(storage: Storage, directory: str) -> list[str]:
    """The names of weights or scores in a directory, without what a file browser left there."""
    return [name for name in storage.list(directory) if _NAME.match(name)]


def step_of(name: str) -> int:
    """The step in the name of weights or of their score."""
    return int(name.partition("-")[0])


def _name(step: int, content: bytes) -> str:
    return hashed_name(f"{step:09d}", hash_content(content))
