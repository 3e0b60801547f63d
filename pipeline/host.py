"""This process on its machine: its CPU threads and its memory."""

import contextlib
from typing import Any

import torch

LARGEST_HEAP_BLOCK = (32 << 20) - (64 << 10)  # bytes: just below glibc's limit


def keep_freed_memory() -> None:
    """Makes glibc keep this process's freed memory for the next step.

    It gives memory back to the system above twice the largest block that was ever freed, up to
    blocks of 32 MiB; small networks free none so large, and each step faults its memory in anew,
    which took a fifth of the time. With another allocator this does nothing.
    """
    block = torch.empty(LARGEST_HEAP_BLOCK, dtype=torch.uint8)
    del block


@contextlib.contextmanager
def torch_threads(count: int) -> Any:
    """Uses this many CPU threads inside the block: processes that share cores must not fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
