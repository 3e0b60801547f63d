"""What a process sets on its machine, and sets back."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from pipeline.host import full_precision, torch_threads

COUNT_FAULTS = """
import resource, sys, torch
from pipeline.host import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def step():
    blocks = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(20)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_full_precision_is_of_the_block() -> None:
    def allowed() -> tuple[Any, Any]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = allowed()
    assert True in before  # what PyTorch does where nobody says anything
    with full_precision():
        assert allowed() == (False, False)
    assert allowed() == before


def test_threads_are_of_the_block() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    def faults(way: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS, way], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("kept") < 0.1 * faults("given back")
