"""Reads the checkpoints of denoising-diffusion-pytorch's `Trainer` and `Trainer1D`.

A checkpoint holds tensors and no settings, so the settings are read off names, shapes and the
buffers of the process; what these do not tell is an argument. No checkpoint tells the resolution,
the strength of offset noise, or whether an old version's loss was absolute: ours is squared. The
networks are in `interop_unet.py`, diffusers' scheduler configs in `scheduler_config.py`.
"""

import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_core.interop_unet import LIBRARY, convert_unet, convert_weights
from diffusion_core.objectives import Objective, Weighting, check_objective, loss_weights
from diffusion_core.schedules import NoiseSchedule, make_schedule
from diffusion_core.unet import UNetConfig

BETA_TOLERANCE = 1e-3  # relative; the library takes two constants of `sigmoid` in float32
READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError)
WEIGHT_TOLERANCE = 1e-3  # relative; betas given in float32 leave this of the last SNR


@dataclass(frozen=True)
class ImportedModel:
    """What a checkpoint holds, in this package's terms.

    Args:
        config: of the network.
        schedule: the noise schedule, under its name where it is one of ours.
        objective: what the network predicts.
        weighting: the weights of the loss by timestep.
        gamma: the bound of `min_snr`; 5 with other weightings, where it has no effect.
        weights: the state dict of `UNet(config)`.
        ema_weights: likewise, of the moving average; None where none was saved.
        global_step: optimiser updates so far.
        library_version: of the library that wrote it; None where it is not known.
    """

    config: UNetConfig
    schedule: NoiseSchedule
    objective: Objective
    weighting: Weighting
    gamma: float
    weights: dict[str, Tensor]
    ema_weights: dict[str, Tensor] | None
    global_step: int
    library_version: str | None


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    objective: Objective | None = None,
    library_version: str | None = None,
    **given: Any,
) -> ImportedModel:
    """Reads a `model-*.pt` of denoising-diffusion-pytorch's trainers; runs no code from it.

    Args:
        path: the file.
        objective: what the network predicts, where the file does not say: before 1.5.
        library_version: of the library that wrote the file, such as 1.6.4, where the file does
            not say. It decides in place of the file's own.
        **given: fields of `UNetConfig`, as in `convert_unet`.

    A network with a learned variance gives the library's outputs; its loss here counts the
    variational bound T times as much.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is no such checkpoint, is damaged or wants to run code; its network
            is none of the library's; its schedule or weighting has no equal here; or something
            it does not tell is missing, in which case the message names the argument to give.

    Warns:
        UserWarning: as `make_schedule`.
    """
    content = _load(path)
    process = content["model"]
    version = library_version or content.get("version")
    network = _below(process, "model.")
    config, weights = convert_unet(network, library_version=version, **given)
    ema = content.get("ema")
    averages = _below(ema, "ema_model.model.") if isinstance(ema, dict) else {}
    if ema is not None and not averages:
        raise ValueError(
            f"{os.fspath(path)!r} has a moving average in a form of its own, without "
            f"'ema_model.model.'. Save it with ema_pytorch, as {LIBRARY} does from 0.31 on."
        )
    schedule = _read_schedule(process)
    found, weighting, gamma = _read_objective(process, schedule, objective)
    return ImportedModel(
        config=config,
        schedule=schedule,
        objective=found,
        weighting=weighting,
        gamma=gamma,
        weights=weights,
        ema_weights=convert_weights(averages, config) if averages else None,
        global_step=int(content["step"]),
        library_version=version,
    )


def _load(path: str | os.PathLike[str]) -> dict[str, Any]:
    name = os.fspath(path)
    with open(path, "rb") as file:  # noqa: PTH123  (this package does without pathlib)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except READ_ERRORS as error:
            raise ValueError(
                f"{name!r} is no checkpoint that can be read safely: it is damaged, of another "
                "kind, or holds more than tensors. Save it anew, or copy it again."
            ) from error
    if not isinstance(content, dict) or not {"step", "model"} <= content.keys():
        kind = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{name!r} is no checkpoint of {LIBRARY}, which has 'step' and 'model': got {kind}. "
            "Give a model-*.pt that its Trainer or Trainer1D has saved."
        )
    process = content["model"]
    if not isinstance(process, dict) or not isinstance(process.get("betas"), Tensor):
        raise ValueError(
            f"{name!r} holds no GaussianDiffusion: its model has no 'betas'. "
            "Checkpoints of the library's other processes are not read."
        )
    return content


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _read_schedule(process: Mapping[str, Tensor]) -> NoiseSchedule:
    """One of ours in float64 where the betas are its, else the betas as they are."""
    betas = process["betas"].double()
    num_train_timesteps = betas.shape[0]
    for name in ("linear", "cosine", "sigmoid"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                candidate = make_schedule(name, num_train_timesteps)
        except ValueError:  # too few steps for that one
            continue
        if torch.allclose(candidate.betas, betas, rtol=BETA_TOLERANCE, atol=0):
            return make_schedule(name, num_train_timesteps)
    return make_schedule("trained_betas", num_train_timesteps, betas=betas.tolist())


def _read_objective(
    process: Mapping[str, Tensor], schedule: NoiseSchedule, given: Objective | None
) -> tuple[Objective, Weighting, float]:
    """Objective, weighting and gamma from the weights of the loss."""
    if given is not None:
        check_objective(schedule, given)
    p2 = process.get("p2_loss_weight")
    if p2 is not None:
        if given is None:
            raise ValueError(
                "Checkpoints of before 1.5 do not tell what their network predicts. "
                "Give objective; pred_noise was the default."
            )
        if not torch.equal(p2, torch.ones_like(p2)):
            raise ValueError(
                "This network was trained with P2 weights, which are not built here. "
                "Only checkpoints with p2_loss_weight_gamma = 0 are read."
            )
        return given, "uniform", 5.0
    if "loss_weight" not in process:
        raise ValueError(
            f"The checkpoint has no 'loss_weight', which {LIBRARY} saves. "
            "Checkpoints of the library's other processes are not read."
        )
    weights = process["loss_weight"].double()
    known: tuple[Objective, ...] = ("pred_noise", "pred_x0", "pred_v")
    candidates = known if given is None else (given,)
    for objective in candidates:
        if _is_close(loss_weights(schedule, objective, "snr"), weights):
            return objective, "snr", 5.0
    for objective in candidates:
        # The least noisy step shows the bound: its weight on x_start's error is gamma itself.
        bound = float(weights[0] * (schedule.snr / loss_weights(schedule, objective, "snr"))[0])
        gamma = float(f"{bound:.6g}")
        if gamma > 0 and _is_close(loss_weights(schedule, objective, "min_snr", gamma), weights):
            return objective, "min_snr", gamma
    raise ValueError(
        f"The weights of the loss belong to none of {', '.join(candidates)}, with min-SNR or "
        "without. Leave objective out, or train anew with the library's own weights."
    )


def _is_close(a: Float64[Tensor, " t"], b: Float[Tensor, " t"]) -> bool:
    return torch.allclose(a, b, rtol=WEIGHT_TOLERANCE, atol=0)
