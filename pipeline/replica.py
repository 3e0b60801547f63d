"""The network as all ranks train it together: gradients averaged, and the wait for it measured."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from pipeline.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


class Replica:
    """One rank's copy of the network.

    Args:
        model: the network, on its device.
        world_size: number of ranks; with one, gradients stay as they are.
        watch: told how long a backward pass waited for other ranks.
    """

    def __init__(self, model: nn.Module, world_size: int, watch: Stopwatch) -> None:
        self._model, self._watch = model, watch
        self._is_gpu = next(model.parameters()).is_cuda
        self._last_bucket: Any = None  # when the last of the gradients was there
        self._end: Any = None  # of the backward pass, on a GPU
        self.module: nn.Module | Any = model  # to be called
        self._ddp: DistributedDataParallel | None = None
        self.is_compiled = False
        if world_size > 1:
            # Buffers are constants: a pass of one rank alone must not have to share them out.
            self._ddp = DistributedDataParallel(
                model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
            self._ddp.register_comm_hook(None, self._average)
            self.module = self._ddp

    def compile(self, rehearse: Callable[[], None]) -> None:
        """Has torch compile the network: on all ranks or, if one of them cannot, on none.

        Args:
            rehearse: goes through all that a step may be, without waiting for other ranks.
        """
        plain, fault = self.module, None
        try:
            # The backward pass is left without autocast, as it is where nothing is compiled. Else
            # it would take in fp16 what the forward pass takes out of it, and overflow.
            functorch.backward_pass_autocast = "off"
            self.module = torch.compile(plain)
            rehearse()
        except Exception as error:
            fault = (str(error).strip() or repr(error)).splitlines()[0]
        faults = [fault]
        if self._ddp is not None:
            faults = [None] * dist.get_world_size()
            dist.all_gather_object(faults, fault)
        failed = {rank: first for rank, first in enumerate(faults) if first is not None}
        self.is_compiled = not failed
        if not failed:
            return
        self.module = plain
        rank, first = failed.popitem()
        where = f" on rank {rank}" if self._ddp is not None else ""
        if self._ddp is None or dist.get_rank() == 0:
            logger.warning("torch.compile failed%s, training goes on without it: %s", where, first)

    def synchronised(self, is_last: bool) -> Any:
        """A context for a part of a batch: only the last one's gradients are averaged."""
        if self._ddp is None or is_last:
            return contextlib.nullcontext()
        return self._ddp.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass; what it waited for others is marked as `sync`, see `settle`."""
        self._last_bucket = None
        loss.backward()
        if self._last_bucket is None:
            return
        if self._is_gpu:
            self._end = torch.cuda.Event(enable_timing=True)
            self._end.record()
            return
        self._watch.mark("compute", at=self._last_bucket)
        self._watch.mark("sync")

    def settle(self) -> None:
        """Marks what the step waited for others on a GPU, which must have done it by now.

        To wait for the GPU in `backward` would leave it without work until the host has sent more.
        """
        if self._is_gpu and self._last_bucket is not None:
            self._watch.mark("compute")
            self._watch.move(self._last_bucket.elapsed_time(self._end) / 1000, "compute", "sync")

    def _average(  # DDP checks these types
        self,
        state: None,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[torch.Tensor]:
        if bucket.is_last():
            if self._is_gpu:
                self._last_bucket = torch.cuda.Event(enable_timing=True)
                self._last_bucket.record()
            else:
                self._last_bucket = time.perf_counter()
        group = dist.group.WORLD
        assert group is not None  # it is up: there is more than one rank
        return default_hooks.allreduce_hook(group, bucket)
