"""Labels: what counts as one, and where those of archived files are found.

A label is a class number from 0, a class name, or None. What is none of these is refused.
"""

import json
import numbers
import re
from collections.abc import Mapping
from typing import Any

from pipeline.readers.entries import Label, Refused
from pipeline.readers.names import show
from pipeline.settings import LABEL_FIELD

LABEL_SUFFIXES = (".cls", ".json", ".txt")  # in this order of precedence
MAX_LABEL_BYTES = 1 << 20  # a larger file is not read to look for a label
TOO_LARGE = f"is larger than {MAX_LABEL_BYTES:,} bytes"
CUT_SHORT = "is cut short"
MAX_NAME_CHARACTERS = 100
_WHOLE_NUMBER = re.compile(r"-?[0-9]+")


def parse_label(value: Any) -> Label:
    """The class that a number or a text names.

    Args:
        value: whole numbers are class numbers, -1 is none (as Hugging Face writes it); other text
            is the name of a class.

    Raises:
        Refused: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise Refused("label_invalid", "the label is no UTF-8 text") from error
    if not isinstance(value, str):
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return _check_number(int(value))
        kind = type(value).__name__
        raise Refused("label_invalid", f"a {kind} is no label; use a whole number or a name")
    name = value.strip()
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
        raise Refused(
            "label_invalid",
            f"a label has 1 to {MAX_NAME_CHARACTERS} characters, this has {len(name):,}",
        )
    if _WHOLE_NUMBER.fullmatch(name):
        return _check_number(int(name))
    if not name.isprintable():
        raise Refused("label_invalid", f"the label {show(name)} has characters that do not print")
    return str(name)  # of numpy's strings, a plain one


def label_of(companions: Mapping[str, bytes | str], field: str, directory: str = "") -> Label:
    """The label that the files beside an image, or else its directory, give.

    Args:
        companions: by suffix the content of those that there are, or in words why it is not known.
        field: of the object in .json; there must be one if it is not the default, none is read
            if it is empty.
        directory: the name of the one the image lies in, where that is its class.

    Raises:
        Refused: what should be the label is none.
    """
    if ".cls" in companions:
        return parse_label(_content_of(companions, ".cls"))
    if ".json" in companions and field:
        try:
            value = json.loads(_content_of(companions, ".json"))
        except (ValueError, RecursionError) as error:
            raise Refused("label_invalid", "the .json file is no valid JSON") from error
        if isinstance(value, dict) and field in value:
            return parse_label(value[field])
        if field != LABEL_FIELD:
            raise Refused("label_missing", f"the .json file has no field {show(field, 100)}")
    text = companions.get(".txt")
    if isinstance(text, bytes) and re.fullmatch(rb"\s*(-1|[0-9]{1,18})\s*", text):
        return parse_label(text)  # any other text is a caption
    return parse_label(directory) if directory else None


def _content_of(companions: Mapping[str, bytes | str], suffix: str) -> bytes:
    content = companions[suffix]
    if isinstance(content, str):
        reason = "truncated" if content == CUT_SHORT else "label_invalid"
        raise Refused(reason, f"the {suffix} file {content}")
    return content


def _check_number(number: int) -> int | None:
    if number == -1:
        return None
    if not 0 <= number < 2**63:
        raise Refused("label_invalid", f"class numbers go from 0 to 2^63 - 1, got {number}")
    return number
