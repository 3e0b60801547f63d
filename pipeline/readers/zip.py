"""Archived image folders: zip files, in the order of their central directory."""

from collections.abc import Iterator
from typing import IO
from zipfile import ZipInfo

from pipeline.readers.entries import Entry, Ignored, Item, Refusal, Refused
from pipeline.readers.labels import LABEL_SUFFIXES, MAX_LABEL_BYTES, TOO_LARGE, label_of
from pipeline.readers.names import item_suffixes, judge_member, show
from pipeline.readers.zip_members import ZipInput, kind_of, name_of
from pipeline.settings import DataConfig


def iter_zip(file: IO[bytes], data: DataConfig) -> Iterator[Entry]:
    """Yields the images of a zip file, in the order of its directory.

    The label of an image is what `.cls`, `.json` or `.txt` of the same name say, wherever they
    lie in the archive; without them, the directory that the image lies in is its class.

    Args:
        file: can be read at random.
        data: tells images from sequences, and the field of `.json`.
    """
    try:
        archive = ZipInput(file)
    except Refused as refused:
        yield Refusal("", refused.reason, refused.detail, hides_more=True)
        return
    if (detail := archive.unlisted) is not None:
        yield Refusal("", "unreadable_shard", detail, hides_more=True)
    suffixes = item_suffixes(data)
    companions = _find_companions(archive, suffixes)
    seen: set[str] = set()
    for info in archive.members:
        name, kind = name_of(info), kind_of(info)
        if kind == "a directory":
            continue
        if (entry := judge_member(name, kind, suffixes)) is not None:
            yield entry
            continue
        stem, suffix = _split(name)
        if suffix not in suffixes and suffix not in companions.get(stem, ()):
            yield Ignored(show(name))
        elif name in seen:
            yield Refusal(show(name), "duplicate_key", "the archive has this name already")
        else:
            seen.add(name)
            if suffix in suffixes:
                yield _read_item(archive, info, companions.get(stem, {}), data.label_field)


def _read_item(
    archive: ZipInput, info: ZipInfo, companions: dict[str, ZipInfo], label_field: str
) -> Item | Refusal:
    name = name_of(info)
    directory = name.rpartition("/")[0].rpartition("/")[2]
    try:
        texts = {suffix: _read_companion(archive, info) for suffix, info in companions.items()}
        label = label_of(texts, label_field, directory if label_field else "")
        return Item(show(name), archive.read(info), label)
    except Refused as refused:
        return Refusal(show(name), refused.reason, refused.detail)


def _read_companion(archive: ZipInput, info: ZipInfo) -> bytes | str:
    if info.file_size > MAX_LABEL_BYTES:
        return TOO_LARGE
    try:
        return archive.read(info)
    except Refused as refused:
        return f"cannot be read: {refused.detail}"


def _find_companions(archive: ZipInput, suffixes: tuple[str, ...]) -> dict[str, dict[str, ZipInfo]]:
    """The files beside images that can have their labels: by stem, then by suffix."""
    found: dict[str, dict[str, ZipInfo]] = {}
    images = set()
    for info in archive.members:
        name = name_of(info)
        stem, suffix = _split(name)
        if judge_member(name, kind_of(info), suffixes) is not None:
            continue
        if suffix in LABEL_SUFFIXES:
            found.setdefault(stem, {}).setdefault(suffix, info)
        elif suffix in suffixes:
            images.add(stem)
    return {stem: files for stem, files in found.items() if stem in images}


def _split(name: str) -> tuple[str, str]:
    """The name without its last suffix, and that in lower case; both parts of the last name."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix.lower()) if "/" not in suffix else (name, "")
