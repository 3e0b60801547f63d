"""This process on its machine: its CPU threads and its memory."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

# Of glibc's mallopt, and the most it takes.
M_TRIM_THRESHOLD, MOST_BYTES = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK = -3, 32 << 20


def keep_freed_memory() -> None:
    """Makes glibc keep this process's freed memory for the next step, blocks up to 32 MiB.

    It gives memory back to the system from sizes that a step of a small network reaches, and then
    each step faults its memory in anew, which took a fifth of the time. With another allocator
    this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
        mallopt(M_TRIM_THRESHOLD, MOST_BYTES)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside the block, GPUs multiply float32 in full, as CPUs do: for scores."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Uses this many CPU threads inside the block: processes that share cores must not fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
