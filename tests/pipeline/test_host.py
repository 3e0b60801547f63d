"""What a process sets on its machine, and sets back."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from pipeline.errors import ClusterError
from pipeline.host import full_precision, gpu_memory_told, torch_threads

COUNT_FAULTS = """
import ctypes, resource, torch
from pipeline.host import M_MMAP_THRESHOLD, keep_freed_memory
torch.set_num_threads(1)
def faults_of_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(20)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Where glibc starts from. It moves by itself, by a process's history, which no test rests on.
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
given_back = faults_of_steps()
keep_freed_memory()
faults_of_steps()  # the heap grows to what a step takes, with gaps
print(given_back, faults_of_steps())
"""


def test_full_precision_is_of_the_block() -> None:
    def allowed() -> tuple[Any, Any]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    assert True in before  # what PyTorch does where nobody says anything
    with full_precision():
        assert allowed() == (False, False)
        assert torch.backends.cudnn.deterministic
    assert allowed() == before
    assert not torch.backends.cudnn.deterministic


def test_full_precision_where_one_operator_was_given_its_own() -> None:
    conv: Any = torch.backends.cudnn.conv  # pyright: ignore
    matmul: Any = torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError):
            assert torch.backends.cudnn.allow_tf32
        with full_precision():
            assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", before[1])
    finally:
        conv.fp32_precision = before[0]
    assert torch.backends.cudnn.allow_tf32


def test_a_gpu_without_memory_is_told_with_a_remedy() -> None:
    @gpu_memory_told("Take less.")
    def take(error: Exception) -> None:
        raise error

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    says = r"little memory: CUDA out of memory\. Tried to allocate 2\.00 GiB\. Take less\.$"
    for _ in range(2):  # a function is called more than once
        with pytest.raises(ClusterError, match=says):
            take(full)
    with pytest.raises(RuntimeError, match="another"):
        take(RuntimeError("another"))


def test_threads_are_of_the_block() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    command = [sys.executable, "-c", COUNT_FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, kept = (int(count) for count in done.stdout.split())
    assert kept < 0.1 * given_back
