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
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.storage import Storage, hashed_name

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

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint whole, then drops those no longer needed.

        The latest two up to it stay, the one with the least validation loss, and every multiple
        of `keep_every`. One that is there already is kept: equal runs write equal checkpoints.
        """
        directory = self._directory(checkpoint.global_step)
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
        if self.storage.exists(f"{directory}/manifest.json"):
            if self.load(checkpoint.global_step) is not None:
                return
            self.storage.delete(directory)  # damaged: this one takes its place
        for name, content in files.items():
            self.storage.create(f"{directory}/{hashed_name(name, hashes[name])}", content)
        manifest["sha256"] = _hash_of(manifest)
        self.storage.create(f"{directory}/manifest.json", json.dumps(manifest).encode())
        self.show_metrics(checkpoint.history)
        self._drop_old(checkpoint.global_step)

    def show_metrics(self, history: Sequence[Row]) -> None:
        """Writes `<directory>/metrics.jsonl`, for people, up to the checkpoint that counts."""
        self.storage.replace(f"{self.directory}/metrics.jsonl", to_lines(history))

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(
            int(name)
            for name in self.storage.list(f"{self.directory}/checkpoints")
            if self.storage.exists(f"{self.directory}/checkpoints/{name}/manifest.json")
        )

    def load_latest(self, max_step: int) -> Checkpoint | None:
        """The latest undamaged checkpoint at or before a step; None when there is none."""
        for step in reversed([s for s in self.steps() if s <= max_step]):
            if (checkpoint := self.load(step)) is not None:
                return checkpoint
            logger.warning(
                "The checkpoint at step %d in %s is damaged; the one before it is used.",
                step,
                self.directory,
            )
        return None

    def load(self, step: int) -> Checkpoint | None:
        """The checkpoint at a step; None when it is missing or damaged."""
        directory = self._directory(step)
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

    def best_step(self) -> int | None:
        """The step with the least validation loss among those measured at a checkpoint."""
        manifests = {step: self._manifest(step) for step in self.steps()}
        losses = {step: known and known["validation_loss"] for step, known in manifests.items()}
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=lambda step: (measured[step], step)) if measured else None

    def _drop_old(self, last: int) -> None:
        steps = [step for step in self.steps() if step <= last]
        kept = {*steps[-KEPT:], self.best_step()}
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        # All that are no checkpoint any more, also those that a kill left half deleted.
        names = self.storage.list(f"{self.directory}/checkpoints")
        for step in [int(name) for name in names if int(name) <= last]:
            if step not in kept:
                # The manifest goes first: half a deletion is no checkpoint either.
                self.storage.delete(f"{self._directory(step)}/manifest.json")
                self.storage.delete(self._directory(step))

    def _manifest(self, step: int) -> dict[str, Any] | None:
        """That of a checkpoint; None when it is missing or damaged."""
        try:
            manifest = json.loads(self.storage.read(f"{self._directory(step)}/manifest.json"))
            is_whole = manifest.pop("sha256") == _hash_of(manifest)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # not there, no JSON, or not what was written
        return manifest if is_whole else None

    def _directory(self, step: int) -> str:
        return f"{self.directory}/checkpoints/{step:09d}"


def to_safetensors(weights: Mapping[str, Tensor]) -> bytes:
    """Weights as a safetensors file, contiguous and on the CPU."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in weights.items()})


def _hash_of(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but this."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def to_lines(history: Sequence[Row]) -> bytes:
    """Rows of metrics as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in history).encode()
