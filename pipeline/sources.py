"""The input: which shards there are, found by path, glob or URI, and what each is made of.

A shard is one tar, zip, Parquet, npy or npz file, or an IDX file with its labels; it is the unit
of preprocessing. Loose images are gathered into buckets by the hash of their path, so that a new
file changes one bucket. What identifies a file's content is in `identities.py`; what is inside a
shard is read by `readers/`.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.errors import DataError
from pipeline.identities import InputFile, OnHash, as_data_error, hash_files, identity_of
from pipeline.settings import DataConfig
from pipeline.storage import Storage

Format = Literal["tar", "zip", "parquet", "idx", "npy", "npz", "files"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FILES_PER_BUCKET = 512  # of loose files, on average at most; a task of about a second
MAX_BUCKETS = 1024
LOOSE_ITEMS = 16  # an npy file that could hold more sequences is a shard of its own
_SUFFIXES: dict[str, Format] = {
    ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar",
    ".zip": "zip", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_IDX_IMAGES = re.compile(r"images([-.])idx[34]-ubyte(\.gz)?$")
_IDX_LABELS = re.compile(r"labels[-.]idx1-ubyte(\.gz)?$")


@dataclass(frozen=True)
class Inputs:
    """What the sources hold: the shards by name, and files that are nothing by their names."""

    shards: list["InputShard"]
    ignored: list[str]


@dataclass(frozen=True)
class InputShard:
    """The unit of preprocessing: one file, an IDX file with its labels, or a bucket of files."""

    name: str
    format: Format
    files: tuple[InputFile, ...]

    @property
    def sha256(self) -> str | None:
        """The hash of the content, file names included where there are several."""
        if any(file.sha256 is None for file in self.files):
            return None
        if self.format != "files" and len(self.files) == 1:
            return self.files[0].sha256
        text = "".join(f"{file.sha256} {file.name}\0" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.num_bytes for file in self.files)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "InputShard":
        """Takes back what `dataclasses.asdict` made."""
        files = tuple(
            InputFile(**{**file, "identity": file["identity"] and tuple(file["identity"])})
            for file in value["files"]
        )
        return cls(value["name"], value["format"], files)


def list_inputs(
    data: DataConfig,
    storage: Storage,
    *,
    read_remote: bool = True,
    on_hash: OnHash | None = None,
) -> Inputs:
    """Finds the shards that the sources name, by name, with the hash of each.

    Args:
        data: the section of the config.
        storage: the root that remembers hashes.
        read_remote: whether remote files that are not known yet are read to be hashed; otherwise
            their hash is None.
        on_hash: told the number of files and bytes that are about to be read.

    Raises:
        DataError: a source matches nothing, or cannot be read.
    """
    files: dict[str, InputFile] = {}  # by name
    ignored: set[str] = set()
    for pattern in data.sources:
        matches = _with_labels(_match(pattern))
        found = [f for f in matches if _is_wanted(f, pattern, data)]
        ignored.update({f.name for f in matches} - {f.name for f in found})
        if not found:
            raise DataError(
                f"There are no {'sequences' if data.is_sequence else 'images'} at {pattern}. Check "
                "data.sources: each is a file, a directory, a glob such as shards/*.tar, or a URI."
            )
        if not any(file.num_bytes for file in found):
            what = found[0].name + (" and all others there are" if len(found) > 1 else " is")
            raise DataError(
                f"{what} empty (0 bytes), at {pattern}. Write it again or leave it out of "
                "data.sources."
            )
        hashed = hash_files(found, storage, pattern, read_remote=read_remote, on_hash=on_hash)
        known = {f.uri for f in files.values()}
        for file in hashed:
            if file.uri not in known:  # patterns may overlap
                name = file.name
                if name in files:  # another source has a file of this name: use the whole path
                    name = file.uri.split("://", 1)[-1].lstrip("/")
                files[name] = replace(file, name=name)
    shards = [*_containers(files.values(), data), *_buckets(files.values(), data)]
    return Inputs(sorted(shards, key=lambda shard: shard.name), sorted(ignored))


def format_of(name: str) -> Format | None:
    """What kind of shard a file is by its name; None when the name does not tell."""
    lower = PurePosixPath(name).name.lower()
    if _IDX_IMAGES.search(lower):
        return "idx"
    if lower.endswith(IMAGE_SUFFIXES):
        return "files"
    if lower.endswith((".npy", ".npz")):
        return "npy" if lower.endswith(".npy") else "npz"
    return next((fmt for suffix, fmt in _SUFFIXES.items() if lower.endswith(suffix)), None)


def _is_wanted(file: InputFile, pattern: str, data: DataConfig) -> bool:
    """Whether a file takes part; one that was named itself must."""
    kind = format_of(file.name)
    if kind is None and file.is_named and not _IDX_LABELS.search(file.name.lower()):
        raise DataError(
            f"{pattern} does not tell by its name what it is. Name it .tar, .zip, .parquet, "
            ".npy, .npz, *-images-idx3-ubyte, or give a directory of images."
        )
    if data.is_sequence:
        return kind in ("tar", "zip", "parquet", "npy", "npz")
    return kind in ("tar", "zip", "parquet", "idx", "files") or bool(
        _IDX_LABELS.search(file.name.lower())
    )


def _containers(files: Iterable[InputFile], data: DataConfig) -> list[InputShard]:
    by_name = {file.name: file for file in files}
    shards = []
    for file in by_name.values():
        kind = format_of(file.name)
        if kind is None or _is_loose(file, kind, data):
            continue
        parts = [file]
        if kind == "idx" and (labels := _labels_of(file, by_name)) is not None:
            parts.append(labels)
        shards.append(InputShard(file.name, kind, tuple(parts)))
    return shards


def _is_loose(file: InputFile, kind: Format, data: DataConfig) -> bool:
    """Whether a file is gathered into a bucket rather than being a shard itself."""
    if kind == "files":
        return True
    return kind == "npy" and file.num_bytes < LOOSE_ITEMS * 4 * data.shape[0] * data.shape[1]


def _labels_of(images: InputFile, by_name: dict[str, InputFile]) -> InputFile | None:
    """The labels that lie beside an IDX file of images."""
    return next((by_name[n] for n in _label_names(images.name) if n in by_name), None)


def _label_names(images: str) -> list[str]:
    """What the labels of an IDX file of images may be called, compressed or not."""
    plain = re.sub(r"\.gz$", "", images)
    start = plain.lower().rindex("images")
    rest = re.sub(r"idx[34]", "idx1", plain[start + len("images") :], flags=re.IGNORECASE)
    return [f"{plain[:start]}labels{rest}{suffix}" for suffix in ("", ".gz")]


def _with_labels(found: list[InputFile]) -> list[InputFile]:
    """Adds the labels of IDX files whose pattern matches only the images."""
    by_name = {file.name: file for file in found}
    for images in found:
        if format_of(images.name) != "idx" or _labels_of(images, by_name) is not None:
            continue
        for uri, name in zip(_label_names(images.uri), _label_names(images.name), strict=True):
            for labels in _match(uri if images.is_remote else glob.escape(uri)):
                by_name.setdefault(name, replace(labels, name=name))
    return list(by_name.values())


def _buckets(files: Iterable[InputFile], data: DataConfig) -> list[InputShard]:
    """Loose files by the hash of their name, into a power of two of buckets."""
    loose = [f for f in files if (kind := format_of(f.name)) and _is_loose(f, kind, data)]
    count = 1
    while count * FILES_PER_BUCKET < len(loose) and count < MAX_BUCKETS:
        count *= 2
    buckets: dict[int, list[InputFile]] = {}
    for file in sorted(loose, key=lambda f: f.name):
        digest = hashlib.sha256(file.name.encode()).digest()
        buckets.setdefault(int.from_bytes(digest[:4], "big") % count, []).append(file)
    return [
        InputShard(f"files-{number:04d}-of-{count:04d}", "files", tuple(members))
        for number, members in buckets.items()
    ]


def _match(pattern: str) -> list[InputFile]:
    """The files that a pattern names, or that lie below a directory that it names."""
    found = _match_remote(pattern) if "://" in pattern else _match_local(pattern)
    visible = [f for f in found if f.is_named or not _is_hidden(f.name)]
    return sorted(visible, key=lambda f: f.name)


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _match_local(pattern: str) -> list[InputFile]:
    fixed, is_glob = Path(), False
    parts = Path(pattern).parts
    for index, part in enumerate(parts):
        is_glob = glob.has_magic(_unescape(part)) and part == _unescape(part)
        is_named_file = index == len(parts) - 1 and not Path(fixed, _unescape(part)).is_dir()
        if is_glob or is_named_file:
            break
        fixed /= _unescape(part)
    found = []
    with as_data_error(pattern):
        for match in glob.glob(pattern, recursive=True) if is_glob else _existing(pattern):
            for path in _files_below(match):
                name = Path(path).relative_to(fixed).as_posix()
                is_named = not is_glob and path == match
                found.append(InputFile(name, path, *identity_of(os.stat(path)), is_named=is_named))
    return list({f.uri: f for f in found}.values())  # a recursive glob names files twice


def _existing(pattern: str) -> Sequence[str]:
    path = "/".join(_unescape(part) for part in pattern.split("/"))
    return [path] if Path(path).exists() else []


def _files_below(path: str) -> list[str]:
    """The regular files in a directory and below, or the file itself."""
    if not Path(path).is_dir():
        return [path] if Path(path).is_file() else []
    return [
        file
        for directory, _, names in os.walk(path)
        for file in (os.path.join(directory, name) for name in names)
        if Path(file).is_file()
    ]


def _unescape(part: str) -> str:
    """Takes back what glob.escape did to a part of a path."""
    return re.sub(r"\[([*?[])\]", r"\1", part)


def _match_remote(pattern: str) -> list[InputFile]:
    with as_data_error(pattern):
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(pattern)
        filesystem.invalidate_cache()
        protocol = pattern.split("://", 1)[0]
        is_glob = glob.has_magic(path)
        if is_glob:
            matches = dict(filesystem.glob(path, detail=True))
            fixed = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        elif not filesystem.exists(path):
            return []
        else:
            facts = filesystem.info(path)
            matches = {path: facts}
            fixed = path if facts["type"] == "directory" else path.rpartition("/")[0]
        files: dict[str, Any] = {}
        for match, facts in matches.items():
            below = facts["type"] == "directory"
            files |= filesystem.find(match, detail=True) if below else {match: facts}
        return [
            InputFile(
                name.removeprefix(fixed).lstrip("/"),
                f"{protocol}://{name}",
                *identity_of(facts),
                is_named=not is_glob and name == path,
            )
            for name, facts in files.items()
            if facts["type"] == "file"
        ]
