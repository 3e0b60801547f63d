"""What a reader finds in an input shard: items, refusals, and what is passed over.

Every file of a shard ends as exactly one of the three, so that nothing is lost unseen.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from pipeline.errors import DataError

Reason = Literal[
    "empty",
    "truncated",
    "not_an_image",
    "undecodable",
    "too_many_pixels",
    "too_large",
    "unreadable_shard",
    "unreadable_tail",
    "duplicate_key",
    "label_missing",
    "label_invalid",
    "not_finite",
    "wrong_shape",
    "unsafe_name",
    "not_a_file",
]
Label = int | str | None

MAX_FILE_BYTES = 1 << 28  # a larger image or sequence is refused before it is read


class Item(NamedTuple):
    """One image or sequence, not yet decoded.

    Args:
        member: where in the shard it came from.
        content: the encoded file, or pixels uint8 [H, W] or [H, W, C], or a sequence.
        label: a class number, a class name, or None.
    """

    member: str
    content: bytes | np.ndarray
    label: Label = None


@dataclass(frozen=True)
class Refusal:
    """Something that cannot be used.

    Args:
        member: where in the shard it is; empty for the shard as a whole.
        reason: its kind, to be counted.
        detail: the fault in words.
        count: how many images it stands for, as far as is known; 0 where nothing is lost by it.
        hides_more: whether the images behind it cannot be counted, so that their number is
            estimated from the size of the file when the data set is added up.
    """

    member: str
    reason: Reason
    detail: str
    count: int = 1
    hides_more: bool = False


@dataclass(frozen=True)
class Ignored:
    """A file that is no image by its name and belongs to none."""

    member: str


Entry = Item | Refusal | Ignored


class Refused(Exception):  # noqa: N818 - not an error of the program: it becomes a `Refusal`
    """Raised by decoders for content that cannot be used."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


class MismatchError(DataError):
    """Raised by readers where a file lacks what the config names; `iter_entries` names the file."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault, remedy)
        self.fault, self.remedy = fault, remedy

    def __str__(self) -> str:
        return f"It {self.fault}. {self.remedy}"
