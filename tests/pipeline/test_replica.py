"""One rank's copy of the network: compiled, and timed by a GPU's own clock."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from pipeline.replica import Replica
from pipeline.stopwatch import Stopwatch

# All of torch.compile but the kernels that it writes, for which no small test waits.
COMPARE_GRADIENTS = """
from functools import partial
import torch
from diffusion_core.attention import LinearAttention
from pipeline.replica import Replica
from pipeline.stopwatch import Stopwatch
torch.manual_seed(0)
network = LinearAttention(8, heads=2, head_dim=8)
replica = Replica(network, 1, Stopwatch())
x = torch.randn(1, 8, 32, 32)
def gradient():
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.float16):
        loss = 2**10 * replica.module(x).float().square().sum()
    replica.backward(loss)
    return torch.cat([p.grad.flatten() for p in network.parameters()])
eager = gradient()
torch.compile = partial(torch.compile, backend="aot_eager")
replica.compile(lambda: None)
print(float((gradient() - eager).norm() / eager.norm()))
"""

# Of a network of several of DDP's buckets, at which it is compiled in parts.
COMPARE_UNDER_DDP = """
from functools import partial
import torch
import torch.distributed as dist
from diffusion_core import UNet, UNetConfig
from pipeline.replica import Replica
from pipeline.stopwatch import Stopwatch
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
attention = ("linear", "linear", "full")
network = UNet(UNetConfig(channels=1, dim=64, dim_mults=(1, 2, 4), attention=attention))
torch.nn.init.normal_(network.final_conv.weight, std=0.1)
replica = Replica(network, 2, Stopwatch())  # more than one rank: with DDP
x, t = torch.randn(2, 1, 16, 16), torch.randint(0, 1000, (2,))
def gradient():
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = replica.module(x, t).float().square().sum()
    replica.backward(loss)
    return torch.cat([p.grad.flatten() for p in network.parameters()])
eager = gradient()
torch.compile = partial(torch.compile, backend="aot_eager")
replica.compile(gradient)
print(float((gradient() - eager).norm() / eager.norm()) if replica.is_compiled else "not compiled")
"""


class Event:
    """In place of a GPU's: it counts what was recorded before it."""

    recorded: ClassVar[list["Event"]] = []
    waited = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """The GPU comes to it."""
        self.recorded.append(self)

    def synchronize(self) -> None:
        """What a step should not do: the GPU would run out of work."""
        Event.waited += 1

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds: 250 from each to the next."""
        return 250.0 * (self.recorded.index(end) - self.recorded.index(self))


def test_the_wait_for_others_on_a_gpu_is_told_when_the_step_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    replica = Replica(nn.Linear(1, 1), 1, watch)
    replica._is_gpu = True

    def take_gradients() -> None:  # as DDP: its hook is told of the last bucket
        replica._last_bucket = Event(enable_timing=True)
        replica._last_bucket.record()

    loss: Any = SimpleNamespace(backward=take_gradients)
    replica.backward(loss)
    assert Event.waited == 0
    now[0] = 1.0  # the host has waited for the whole step
    replica.settle()
    parts = watch.take()[1]
    assert (parts["compute"], parts["sync"]) == (0.75, 0.25)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(COMPARE_GRADIENTS, id="linear-attention-in-fp16"),
        pytest.param(COMPARE_UNDER_DDP, id="under-ddp", marks=pytest.mark.slow),
    ],
)
def test_what_is_compiled_has_the_gradients_of_what_is_not(script: str) -> None:
    # In a process of its own: what checks shapes in tests cannot be compiled.
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.01
