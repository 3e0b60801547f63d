"""Names of the members of archives: judged and shown, never used as a path."""

import re
import unicodedata

from pipeline.escaping import MAX_NAME_CHARACTERS, show
from pipeline.patterns import is_hidden
from pipeline.readers.entries import Entry, Ignored, Refusal
from pipeline.settings import DataConfig
from pipeline.sources import IMAGE_SUFFIXES

_DRIVE = re.compile(r"[A-Za-z]:")


def item_suffixes(data: DataConfig) -> tuple[str, ...]:
    """How the names of images, or of sequences, end in an archive; in lower case."""
    return (".npy",) if data.is_sequence else IMAGE_SUFFIXES


def strip_here(name: str) -> str:
    """The name without the "." that some programs put before every one, or amid it."""
    if "./" not in name:
        return name
    return "/".join(part for part in name.split("/") if part != ".")


def fault_of_name(name: str) -> str | None:
    """What makes a name unsafe to be a path, or None."""
    if not name:
        return "the name is empty"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"the name has {len(name):,} characters, more than {MAX_NAME_CHARACTERS:,}"
    if not name.isprintable() and any(unicodedata.category(c) == "Cc" for c in name):
        return "the name has control characters"
    if "\\" in name:
        return "the name has a backslash"
    if name.startswith("/") or _DRIVE.match(name):
        return "the name is an absolute path"
    if ".." in name and ".." in name.split("/"):
        return "the name leaves its directory"
    return None


def judge_member(name: str, kind: str, suffixes: tuple[str, ...]) -> Entry | None:
    """What becomes of a member by its name and kind alone; None: it is a file to look at.

    Args:
        name: as in the archive.
        kind: "a file", or in words what it is instead.
        suffixes: those of images, or of sequences.
    """
    fault = fault_of_name(name)
    if fault is None and is_hidden(name):
        return Ignored(show(name))
    if fault is None and kind == "a file":
        return None
    if not name.lower().endswith(suffixes):
        return Ignored(show(name))
    if fault is not None:
        return Refusal(show(name), "unsafe_name", fault)
    return Refusal(show(name), "not_a_file", f"it is {kind}")


def describe(error: BaseException) -> str:
    """What a library says went wrong, on one short line."""
    return show(" ".join(str(error).split()) or type(error).__name__, 200)
