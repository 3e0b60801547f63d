"""Where the checkpoints of a training are, and at which steps there are any.

Plans and the preflight ask this too, so nothing here imports torch. What is in a checkpoint is in
`checkpoints.py`. Names that are no steps, as a file manager leaves them, are passed over.
"""

from pipeline.storage import Storage


def checkpoint_directory(directory: str, step: int) -> str:
    """Where the checkpoint at a step is, below the directory of its training."""
    return f"{directory}/checkpoints/{step:09d}"


def named_steps(storage: Storage, directory: str) -> list[int]:
    """The steps that something is there of, whole or not, ascending."""
    names = storage.list(f"{directory}/checkpoints")
    return sorted(int(name) for name in names if _is_step(name))


def is_complete(storage: Storage, directory: str, step: int) -> bool:
    """Whether the checkpoint at a step was written whole."""
    return storage.exists(f"{checkpoint_directory(directory, step)}/manifest.json")


def complete_steps(storage: Storage, directory: str) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    return [s for s in named_steps(storage, directory) if is_complete(storage, directory, s)]


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and f"{int(name):09d}" == name
