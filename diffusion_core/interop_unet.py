"""The U-Nets of denoising-diffusion-pytorch as ours: their config and weights.

Names, shapes and a version tell nearly everything; the rest is an argument. Whole checkpoints
are read in `interop.py`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from diffusion_core.unet import Attention, UNet, UNetConfig

LIBRARY = "denoising-diffusion-pytorch"
LIBRARY_HEADS = 4, 32  # number and width, where nothing else is set

# Their names to ours, applied in this order.
RENAMES = (
    (r"\.fn\.(fn\.)?", "."),
    (r"^(downs|ups)\.(\d+)\.0\.", r"\1.\2.block1."),
    (r"^(downs|ups)\.(\d+)\.1\.", r"\1.\2.block2."),
    (r"^(downs|ups)\.(\d+)\.2\.", r"\1.\2.attention."),
    (r"^(downs|ups)\.(\d+)\.3\.(1\.)?", r"\1.\2.resample."),
    (r"^mid_attn\.", "mid_attention."),
    (r"^final_res_block\.", "final_block."),
    (r"\.block([12])\.proj\.", r".conv\1."),
    (r"\.block([12])\.norm\.(g|weight)$", r".norm\1.weight"),
    (r"\.block([12])\.norm\.bias$", r".norm\1.bias"),
    (r"\.res_conv\.", ".skip."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.to_out\.1\.g$", ".norm_out.weight"),
    (r"\.norm\.g$", ".norm.weight"),
    (r"\.mem_kv$", ".memory"),
    (r"^time_mlp\.0\.weights$", "time_embedding.frequencies"),
    (r"^time_mlp\.1\.", "time_embedding.mlp.0."),
    (r"^time_mlp\.3\.", "time_embedding.mlp.2."),
)


def convert_unet(
    state_dict: Mapping[str, Tensor], *, library_version: str | None = None, **given: Any
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The config and weights of our `UNet` that computes what the library's network does.

    Args:
        state_dict: of the library's `Unet` or `Unet1D`.
        library_version: such as 1.6.4; asked for where versions that compute differently have
            equal weights: networks of before 1.8, and of sequences before 2.0.
        **given: fields of `UNetConfig`; they replace what is read off the shapes. The shapes do
            not tell `norm_groups`, `time_theta` and `dropout`, which default to the library's 8,
            10000 and 0; `time_features` (`learned` or `random`) of Fourier features; `heads` and
            `head_dim` of attention without memory, where not 4 and 32. In a sequence's network
            one number for these is the middle's: its levels always have 4 and 32.

    Raises:
        ValueError: not a network of the library, one of the versions that had an own formula for
            a few days (1.7.0 to 1.7.3, of sequences to 1.7.2), an unknown field, a value that does
            not fit the weights, or one that has to be given and was not.
    """
    fields = {field.name for field in dataclasses.fields(UNetConfig)}
    if unknown := sorted(given.keys() - fields):
        raise ValueError(
            f"UNetConfig has no {', '.join(unknown)}. Give some of {', '.join(sorted(fields))}."
        )
    if not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(
            f"A state dict holds tensors alone, got {type(state_dict).__name__} of other things. "
            "Give what state_dict() of the library's Unet or Unet1D returns."
        )
    named = _rename(state_dict)
    try:
        inferred = _read_config(named, given)
    except KeyError as error:
        raise ValueError(
            f"This is no U-Net of {LIBRARY}: it has no weight {error}. "
            "Give the state dict of its Unet or Unet1D."
        ) from error
    if "has_old_layout" not in given:
        is_prenorm = any(".fn." in name for name in state_dict)
        inferred["has_old_layout"] = is_prenorm and _has_old_layout(inferred, library_version)
    kept = {name: value for name, value in given.items() if name not in ("heads", "head_dim")}
    config = UNetConfig(**{**inferred, **kept})
    return config, convert_weights(state_dict, config)


def _rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, value in state_dict.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    return named


def _read_config(named: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of UNetConfig from shapes, but for the layout."""
    first = named["init_conv.weight"]
    is_sequence = first.ndim == 3
    dim = named["time_embedding.mlp.2.weight"].shape[0] // 4
    levels = sum(re.fullmatch(r"downs\.\d+\.resample\.weight", name) is not None for name in named)
    resamples = [named[f"downs.{i}.resample.weight"] for i in range(max(levels, 1))]
    attentions = [f"downs.{i}.attention" for i in range(len(resamples))]
    kinds: list[Attention] = [
        "linear" if f"{name}.norm_out.weight" in named else "full" for name in attentions
    ]
    memory = named.get("mid_attention.memory")
    heads, head_dim = _read_heads(named, [*attentions, "mid_attention"], is_sequence, given)
    is_strided = resamples[0].shape[-1] == 4 if levels > 1 else is_sequence
    config = {
        **_read_channels(first.shape[1], named["final_conv.weight"].shape[0], given),
        "dim": dim,
        "dim_mults": tuple(weight.shape[0] // dim for weight in resamples),
        "attention": tuple(kinds),
        "heads": heads,
        "head_dim": head_dim,
        "norm": "group" if "mid_block1.norm1.bias" in named else "rms",
        "is_sequence": is_sequence,
        "init_dim": None if first.shape[0] == dim else first.shape[0],
        "memory_kv": 0 if memory is None else memory.shape[2],
        "downsample": "strided" if is_strided else "unshuffle",
    }
    frequencies = named.get("time_embedding.frequencies")
    if frequencies is not None:
        if "time_features" not in given:
            raise ValueError(
                "Fourier features of time were either learned or random and fixed, and the "
                "weights do not tell which. Give time_features='learned' or 'random'."
            )
        config["time_features_dim"] = 2 * frequencies.shape[0]
    return config


def _read_channels(inputs: int, outputs: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Self-condition doubles the inputs, learned variance the outputs."""
    channels = given.get("channels", min(inputs, outputs))
    if inputs not in (channels, 2 * channels) or outputs not in (channels, 2 * channels):
        raise ValueError(
            f"This U-Net takes {inputs} and gives {outputs} channels, and each must be the "
            f"data's {channels} or twice as many. Networks with an out_dim of their own are not "
            "read."
        )
    return {
        "channels": channels,
        "self_condition": inputs != channels,
        "learned_variance": outputs != channels,
    }


def _read_heads(
    named: Mapping[str, Tensor], attentions: list[str], is_sequence: bool, given: Mapping[str, Any]
) -> tuple[int | tuple[int, ...], int | tuple[int, ...]]:
    """Heads and their width, of the levels and the middle."""
    pairs = []
    for i, name in enumerate(attentions):
        hidden = named[f"{name}.to_qkv.weight"].shape[0] // 3
        heads, head_dim = (given.get("heads"), given.get("head_dim"))
        if is_sequence and i < len(attentions) - 1:  # only the middle can be set there
            heads, head_dim = (v if isinstance(v, tuple) else None for v in (heads, head_dim))
        heads, head_dim = (
            v[min(i, len(v) - 1)] if isinstance(v, tuple) else v for v in (heads, head_dim)
        )
        memory = named.get(f"{name}.memory")
        if memory is not None and heads is None:
            heads = memory.shape[1]
        pairs.append(_split_heads(name, hidden, heads, head_dim))
    heads, head_dims = zip(*pairs, strict=True)
    return _shorten(heads), _shorten(head_dims)


def _split_heads(
    name: str, hidden: int, heads: int | None, head_dim: int | None
) -> tuple[int, int]:
    """Heads and width of an attention of so many channels in all."""
    if heads is None and head_dim is None:
        heads, head_dim = LIBRARY_HEADS
    elif heads is None:
        heads = hidden // cast("int", head_dim)
    elif head_dim is None:
        head_dim = hidden // heads
    if heads * cast("int", head_dim) != hidden:
        raise ValueError(
            f"The attention {name} has {hidden} channels in all, which are not {heads} heads of "
            f"{head_dim}. Give heads or head_dim as it was trained with."
        )
    return heads, cast("int", head_dim)


def _shorten(values: tuple[int, ...]) -> int | tuple[int, ...]:
    if len(set(values)) == 1:
        return values[0]
    return values[:-1] if values[-1] == values[-2] else values


def _has_old_layout(config: Mapping[str, Any], library_version: str | None) -> bool:
    """Of a network whose names are those of before 1.8, or of any sequence's network."""
    is_sequence = config["is_sequence"]
    if config["norm"] == "rms":  # 2.0 and later
        return False
    if config["downsample"] == "strided" and not is_sequence:  # before 1.0
        return True
    if library_version is None:
        raise ValueError(
            f"Networks of {LIBRARY} with these weights compute differently before 1.7 and after. "
            "Give library_version, such as '1.6.4', or has_old_layout."
        )
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", library_version)
    if match is None:
        raise ValueError(
            f"library_version must be three numbers, got {library_version!r}. "
            "Give one such as '1.6.4'."
        )
    version = tuple(map(int, match.groups()))
    if version < (0, 31, 0):
        raise ValueError(
            f"{LIBRARY} is read from 0.31.0 on, got {library_version}. Train anew, or give "
            "has_old_layout=True if its network was the same."
        )
    if (1, 7, 0) <= version < ((1, 7, 3) if is_sequence else (1, 7, 4)):
        raise ValueError(
            f"{LIBRARY} {library_version} had formulas that no other version has, and which are "
            "not built here. Train anew with another version."
        )
    return version < (1, 7, 0)


def convert_weights(state_dict: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The state dict of UNet(config): renamed, reshaped, the modulations in one."""
    with torch.device("meta"):
        model = UNet(config)
    named = _rename(state_dict)
    blocks = [name.removesuffix(".conv1.weight") for name, _ in model.named_parameters()
              if name.endswith(".conv1.weight")]  # fmt: skip
    for kind in ("weight", "bias"):
        parts = [named.pop(f"{block}.mlp.1.{kind}", None) for block in blocks]
        if all(part is not None for part in parts):
            named[f"modulation.{kind}"] = torch.cat(cast("list[Tensor]", parts))
    for name in [name for name in named if name.endswith(".memory")]:
        if name.replace(".memory", ".norm_out.weight") in named:  # linear: [2, h, d, memory]
            named[name] = named[name].transpose(2, 3)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    wrong = sorted(wanted.keys() ^ named.keys()) or [
        f"{name} {tuple(named[name].shape)}, which is to be {tuple(shape)}"
        for name, shape in wanted.items()
        if not _fits(tuple(named[name].shape), tuple(shape))
    ]
    if wrong:
        raise ValueError(
            f"These weights are not those of a U-Net of {LIBRARY} with these settings: "
            f"{', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}. Check the settings given."
        )
    return {name: named[name].reshape(shape).contiguous() for name, shape in wanted.items()}


def _fits(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Equal but for axes of length 1, or a pixel-unshuffle's channels."""
    if len(ours) == 4 and theirs[1:] == (ours[1] * ours[2] * ours[3],) + (1,) * (len(theirs) - 2):
        return theirs[0] == ours[0]
    return [n for n in theirs if n != 1] == [n for n in ours if n != 1]
