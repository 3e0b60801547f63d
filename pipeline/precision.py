"""The precision of training, and what the last bit of its result depends on."""

import contextlib
import logging
import platform
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ConfigError
from pipeline.settings import TrainConfig

logger = logging.getLogger(__name__)

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as in settings


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type that the network computes in; its weights are float32 always.

    Raises:
        ConfigError: the device does not have it.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    match config.precision:
        case "auto":
            return torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
        case "fp32":
            return torch.float32
        case "bf16":
            if not has_bf16:
                raise ConfigError(
                    f"train.precision = bf16, and {torch.cuda.get_device_name(device)} has no "
                    'bf16. Use "fp16" or "auto".'
                )
            return torch.bfloat16
        case "fp16":
            return torch.float16


def autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """A context in which the network computes in this type."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def gather_environment(
    device: torch.device, world_size: int, arithmetic: Mapping[str, Any]
) -> dict[str, Any]:
    """What equal bits depend on beside what is learned, on all ranks; every rank calls it.

    What differs between ranks is a list, by rank.

    Args:
        device: of this rank.
        world_size: number of ranks.
        arithmetic: what more there is on this rank, by name.
    """
    here = {**_describe_environment(device), **arithmetic}
    if world_size == 1:
        return {"world_size": 1, **here}
    by_rank: list[Any] = [None] * world_size
    dist.all_gather_object(by_rank, here)
    environment: dict[str, Any] = {"world_size": world_size}
    for name in sorted({name for of_rank in by_rank for name in of_rank}):
        values = [of_rank.get(name) for of_rank in by_rank]
        environment[name] = values[0] if values.count(values[0]) == world_size else values
    return environment


def say_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns of each fact that is another now than when the checkpoint before was made."""
    for name in sorted(before.keys() & now.keys()):
        if now[name] == before[name]:
            continue
        if name == "precision":
            logger.warning(
                "Training continues in %s, and the checkpoint was made in %s: results differ "
                "by more than the last bits. Give it a device of the kind it had, or set "
                "train.precision, with which training begins anew.",
                now[name],
                before[name],
            )
        else:
            logger.warning(
                "Training continues with %s = %s, and the checkpoint was made with %s: the "
                "last bits may differ.",
                name,
                now[name],
                before[name],
            )


def _describe_environment(device: torch.device) -> dict[str, Any]:
    environment = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": device.type,
    }
    if device.type == "cpu":
        environment["threads"] = torch.get_num_threads()
        environment["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    else:
        environment["gpu"] = torch.cuda.get_device_name(device)
        conv: Any = torch.backends.cudnn.conv  # pyright: ignore
        products: Any = torch.backends.cuda.matmul
        environment["tf32"] = conv.fp32_precision == "tf32"  # of float32 in convolutions
        environment["tf32_products"] = products.fp32_precision == "tf32"
    return environment
