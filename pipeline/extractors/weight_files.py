"""Files of weights from elsewhere: a dictionary of tensors, read without running what is inside."""

import io
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.errors import EvaluationError


def read_state_dict(content: bytes, what: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in one that torch.save wrote.

    Args:
        content: of the file.
        what: names it in the error.

    Raises:
        EvaluationError: it holds something else, or is damaged.
    """
    try:
        found = _read(content)
    except Exception as error:  # a damaged pickle may raise anything
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _unreadable(what, line) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise _unreadable(what, "it is no dictionary of tensors")
    return dict(found)


def _read(content: bytes) -> Any:
    if content[8:9] == b"{":  # the length of the header in 8 bytes, then JSON
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from error
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _unreadable(what: str, reason: str) -> EvaluationError:
    return EvaluationError(
        f"{what} cannot be read as weights: {reason}. Give a state_dict that torch.save or "
        "safetensors wrote."
    )
