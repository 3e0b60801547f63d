"""The checkpoint store: one for every way of running, complete or absent, checksummed.

A checkpoint `<directory>/checkpoints/<step>/` holds weights, EMA weights, optimiser state and the
metrics so far in files named with the hash of their content, and, written last and created once,
`manifest.json` with those names and a hash of its own. Nothing is unpickled but tensors.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.checkpoint_steps import (
    checkpoint_directory,
    complete_steps,
    is_complete,
    named_steps,
)
from pipeline.errors import StorageError
from pipeline.storage import Storage, claim, hashed_name

logger = logging.getLogger(__name__)

KEPT = 2  # a damaged latest one must leave another to go back to

Row = dict[str, Any]  # of metrics; JSON


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after `global_step` optimiser steps.

    Args:
        global_step: number of optimiser steps done.
        model: the network's weights and buffers.
        ema: those of its moving average.
        optimizer: states of the optimiser and, with fp16, of the loss scale.
        history: the rows of metrics so far.
        skipped: numbers of the batches that gave no finite loss.
        num_rewinds: how often training went back.
        environments: what the last bit depends on, of all ranks, since which step; the last one is
            that of the ranks that wrote this.
    """

    global_step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    history: Sequence[Row]
    skipped: tuple[int, ...] = ()
    num_rewinds: int = 0
    environments: Sequence[dict[str, Any]] = ()

    @property
    def validation_loss(self) -> float | None:
        """That of this very step, if it was measured."""
        row = self.history[-1] if self.history else {}
        return row.get("validation_loss") if row.get("global_step") == self.global_step else None


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one training, in `<directory>/checkpoints` of the storage root.

    Args:
        storage: the root.
        directory: of the training, below the root.
        keep_every: those at multiples of so many steps are never dropped.
    """

    storage: Storage
    directory: str
    keep_every: int | None = None
    # What this process knows of checkpoints, so that one of a thousand costs no more than the
    # first: validation losses of complete ones, and steps of those that `load_latest` passed over.
    _losses: dict[int, float | None] = field(default_factory=dict, init=False, repr=False)
    _passed_over: set[int] = field(default_factory=set, init=False, repr=False)

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint whole, then drops those no longer needed.

        The latest two up to it stay, the one with the least validation loss, and every multiple
        of `keep_every`. One that is there already is kept, if it was not passed over: equal runs
        write equal checkpoints.
        """
        step = checkpoint.global_step
        directory = checkpoint_directory(self.directory, step)
        optimizer = io.BytesIO()
        torch.save(checkpoint.optimizer, optimizer)
        files = {
            "model.safetensors": to_safetensors(checkpoint.model),
            "ema.safetensors": to_safetensors(checkpoint.ema),
            "optimizer.pt": optimizer.getvalue(),
            "metrics.jsonl": to_lines(checkpoint.history),
        }
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = {
            "global_step": checkpoint.global_step,
            "skipped": checkpoint.skipped,
            "num_rewinds": checkpoint.num_rewinds,
            "environments": list(checkpoint.environments),
            "validation_loss": checkpoint.validation_loss,
            "files": {
                name: {"file": hashed_name(name, sha256), "sha256": sha256}
                for name, sha256 in hashes.items()
            },
        }
        is_there = is_complete(self.storage, self.directory, step)
        if is_there and (step in self._passed_over or self.load(step) is None):
            self._delete(step)  # this one takes its place
            is_there = False
        if not is_there:
            for name, content in files.items():
                path = f"{directory}/{hashed_name(name, hashes[name])}"
                if not claim(self.storage, path, content):
                    self.storage.replace(path, content)  # of a damaged one, half deleted
            self._passed_over.discard(step)
            manifest["sha256"] = _hash_of(manifest)
            self.storage.create(f"{directory}/manifest.json", json.dumps(manifest).encode())
        # Also where it is there: who made it may have failed before the rest was done.
        self._losses[step] = checkpoint.validation_loss
        self._show(files["metrics.jsonl"])
        self._drop_old(step)

    def show_metrics(self, history: Sequence[Row]) -> None:
        """Writes `<directory>/metrics.jsonl`, for people, up to the checkpoint that counts."""
        self._show(to_lines(history))

    def _show(self, lines: bytes) -> None:
        self.storage.replace(f"{self.directory}/metrics.jsonl", lines)

    @property
    def has_passed_over(self) -> bool:
        """Whether `load_latest` met one that it could not use."""
        return bool(self._passed_over)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return complete_steps(self.storage, self.directory)

    def load_latest(
        self, max_step: int, *, passes_over_unreadable: bool = False
    ) -> Checkpoint | None:
        """The latest undamaged checkpoint at or before a step; None when there is none.

        Args:
            max_step: the step.
            passes_over_unreadable: whether one that the storage does not give back is passed over
                as a damaged one is, if there is another.

        Raises:
            StorageError: the storage cannot be read.
        """
        fault = None
        for step in reversed(named_steps(self.storage, self.directory)):
            if step > max_step or not is_complete(self.storage, self.directory, step):
                continue
            try:
                checkpoint, what = self.load(step), "is damaged"
            except StorageError as error:
                if not passes_over_unreadable:
                    raise
                checkpoint, what, fault = None, "cannot be read", fault or error
            if checkpoint is not None:
                return checkpoint
            self._passed_over.add(step)
            logger.warning(
                "The checkpoint at step %d in %s %s; the one before it is tried.",
                step,
                self.directory,
                what,
            )
        if fault is not None:  # a training that begins anew would be worse than one that ends
            raise fault
        return None

    def load(self, step: int) -> Checkpoint | None:
        """The checkpoint at a step; None when it is missing or damaged."""
        directory = checkpoint_directory(self.directory, step)
        if (manifest := self._manifest(step)) is None:
            return None
        try:
            files = {
                name: self.storage.read(f"{directory}/{entry['file']}")
                for name, entry in manifest["files"].items()
            }
        except FileNotFoundError:
            return None
        for name, content in files.items():
            if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
                return None
        return Checkpoint(
            global_step=manifest["global_step"],
            model=safetensors.torch.load(files["model.safetensors"]),
            ema=safetensors.torch.load(files["ema.safetensors"]),
            optimizer=torch.load(io.BytesIO(files["optimizer.pt"]), weights_only=True),
            history=[json.loads(line) for line in files["metrics.jsonl"].splitlines()],
            skipped=tuple(manifest["skipped"]),
            num_rewinds=manifest["num_rewinds"],
            environments=manifest["environments"],
        )

    def _drop_old(self, last: int) -> None:
        # Of all that are named, also those that are no checkpoint any more: a kill left half of
        # them, or they cannot be read.
        named = [s for s in named_steps(self.storage, self.directory) if s <= last]
        losses = self._losses_of([s for s in named if s not in self._passed_over])
        kept = set(list(losses)[-KEPT:])
        finite = {n: loss for n, loss in losses.items() if loss is not None and isfinite(loss)}
        if finite:
            kept.add(min(finite, key=lambda step: (finite[step], step)))
        if self.keep_every is not None:
            kept |= {step for step in losses if step % self.keep_every == 0}
        for step in named:
            if step not in kept:
                self._delete(step)

    def _losses_of(self, steps: Sequence[int]) -> dict[int, float | None]:
        """Validation losses of those of these steps that have a complete checkpoint."""
        for step in steps:
            if step not in self._losses and (manifest := self._manifest(step)) is not None:
                self._losses[step] = manifest["validation_loss"]
        return {step: self._losses[step] for step in steps if step in self._losses}

    def _delete(self, step: int) -> None:
        self._losses.pop(step, None)
        directory = checkpoint_directory(self.directory, step)
        # The manifest goes first: half a deletion is no checkpoint either.
        self.storage.delete(f"{directory}/manifest.json")
        self.storage.delete(directory)
        self._passed_over.discard(step)

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """That of a checkpoint; None when it is missing or damaged."""
        try:
            directory = checkpoint_directory(self.directory, step)
            manifest = json.loads(self.storage.read(f"{directory}/manifest.json"))
            is_whole = manifest.pop("sha256") == _hash_of(manifest)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # not there, no JSON, or not what was written
        return manifest if is_whole else None


def to_safetensors(weights: Mapping[str, Tensor]) -> bytes:
    """Weights as a safetensors file, contiguous and on the CPU."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in weights.items()})


def _hash_of(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def to_lines(history: Sequence[Row]) -> bytes:
    """Rows of metrics as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in history).encode()
