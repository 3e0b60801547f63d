"""The checkpoint store: one for every way of running, complete or absent, checksummed.

A checkpoint `<directory>/checkpoints/<step>/` holds weights, EMA weights and optimiser state in
files named with the hash of their content, and, written last and created once, `manifest.json`
with those names and the loss history. Nothing is unpickled but tensors.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.storage import Storage, hashed_name

logger = logging.getLogger(__name__)

KEPT = 2  # a damaged latest one must leave another to go back to


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after `global_step` optimiser steps."""

    global_step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one training, in `<directory>/checkpoints` of the storage root."""

    storage: Storage
    directory: str

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint whole, then drops all but the latest two up to it.

        One that is there already is kept: equal runs write equal checkpoints.
        """
        directory = self._directory(checkpoint.global_step)
        optimizer = io.BytesIO()
        torch.save(checkpoint.optimizer, optimizer)
        files = {
            "model.safetensors": to_safetensors(checkpoint.model),
            "ema.safetensors": to_safetensors(checkpoint.ema),
            "optimizer.pt": optimizer.getvalue(),
        }
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        manifest = {
            "global_step": checkpoint.global_step,
            "history": checkpoint.history,
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
        self.storage.create(f"{directory}/manifest.json", json.dumps(manifest).encode())
        for step in [s for s in self.steps() if s <= checkpoint.global_step][:-KEPT]:
            # The manifest goes first: half a deletion is no checkpoint either.
            self.storage.delete(f"{self._directory(step)}/manifest.json")
            self.storage.delete(self._directory(step))

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
        try:
            manifest = json.loads(self.storage.read(f"{directory}/manifest.json"))
            files = {
                name: self.storage.read(f"{directory}/{entry['file']}")
                for name, entry in manifest["files"].items()
            }
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        for name, content in files.items():
            if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
                return None
        return Checkpoint(
            global_step=manifest["global_step"],
            model=safetensors.torch.load(files["model.safetensors"]),
            ema=safetensors.torch.load(files["ema.safetensors"]),
            optimizer=torch.load(io.BytesIO(files["optimizer.pt"]), weights_only=True),
            history=manifest["history"],
        )

    def _directory(self, step: int) -> str:
        return f"{self.directory}/checkpoints/{step:09d}"


def to_safetensors(weights: Mapping[str, Tensor]) -> bytes:
    """Weights as a safetensors file, contiguous and on the CPU."""
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in weights.items()})
