"""This process on its machine: its CPU threads and its memory."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.errors import ClusterError

# Of glibc's mallopt, and the most it takes.
M_TRIM_THRESHOLD, MOST_BYTES = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK = -3, 32 << 20
FAULT_LENGTH = 160  # characters of what torch says of a GPU without memory; more is advice on torch


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
    """Inside the block, GPUs multiply float32 in full, as CPUs do, and repeatably: for scores."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    name, value, places = "allow_tf32", False, (cudnn, matmul)
    try:
        before = [getattr(place, name) for place in places]
    except RuntimeError:  # somebody has set one operator's precision: then it cannot be read
        name, value, places = "fp32_precision", "ieee", (cudnn.conv, cudnn.rnn, matmul)
        before = [getattr(place, name) for place in places]
    was_deterministic = cudnn.deterministic
    for place in places:
        setattr(place, name, value)
    cudnn.deterministic = True
    try:
        yield
    finally:
        cudnn.deterministic = was_deterministic
        for place, was in zip(places, before, strict=True):
            setattr(place, name, was)


@contextlib.contextmanager
def gpu_memory_told(remedy: str) -> Iterator[None]:
    """Says what to do where a GPU has too little memory for what the block does.

    Args:
        remedy: a sentence.

    Raises:
        ClusterError: it has too little; another try may find that somebody has left.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        fault = str(error).partition("\n")[0][:FAULT_LENGTH].rstrip(". ")
        raise ClusterError(f"A GPU has too little memory: {fault}. {remedy}") from error


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Uses this many CPU threads inside the block: processes that share cores must not fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
