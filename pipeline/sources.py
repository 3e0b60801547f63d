"""The input: which shards there are, and what each is made of.

A shard is one tar, zip, Parquet, npy or npz file, or an IDX file with its labels; it is the unit
of preprocessing. Loose images are gathered into buckets by the hash of their path, so that a new
file changes one bucket. Which files a pattern names is found in `patterns.py`; what identifies a
file's content is in `identities.py`; what is inside a shard is read by `readers/`.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pipeline.errors import DataError
from pipeline.escaping import show
from pipeline.identities import InputFile, OnHash, hash_files
from pipeline.patterns import match, match_beside
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
_IDX_IMAGES = re.compile(r"images[-.]idx[34]-ubyte(\.gz)?$", re.IGNORECASE)
_IDX_LABELS = re.compile(r"labels[-.]idx1-ubyte(\.gz)?$", re.IGNORECASE)
_IDX_PARTS = re.compile(  # of a URI, which may go on behind its path
    r"(.*)(images)([-.])(idx)[34](-ubyte)(?:\.gz)?(.*)", re.IGNORECASE | re.DOTALL
)


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
        """The hash of the content; names and classes included where there are several files.

        Of an npy file the class is, where its name does not tell it.
        """
        if any(file.sha256 is None for file in self.files):
            return None
        if self.format != "files" and len(self.files) == 1:
            (file,) = self.files
            if self.format != "npy" or PurePosixPath(file.name).parent.name == file.class_name:
                return file.sha256
        parts = [f"{f.sha256} {f.name}\0{f.class_name}\0" for f in self.files]
        return hashlib.sha256("".join(parts).encode(errors="surrogatepass")).hexdigest()

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
        DataError: a source matches nothing or cannot be read, or a shard is no file.
    """
    found: dict[str, InputFile] = {}  # by URI, for patterns may overlap
    uris: dict[str, set[str]] = {}  # by pattern
    ignored: dict[str, str] = {}  # name by URI
    for pattern in data.sources:
        matches = _with_labels(match(pattern, storage), storage)
        wanted = [file for file in matches if _is_wanted(file, pattern, data)]
        uris[pattern] = {file.uri for file in wanted}
        for file in matches:
            if file.uri not in uris[pattern]:
                ignored.setdefault(file.uri, file.name)
        for file in wanted:
            found.setdefault(file.uri, file)
    files = _with_unique_names(found.values())
    loose = [f for f in files if (kind := format_of(f.name)) and _is_loose(f, kind, data)]
    shards = [*_containers(files, data), *_buckets(loose)]
    used = {file.uri: file for shard in shards for file in shard.files}
    ignored |= {file.uri: file.name for file in files if file.uri not in used}  # labels alone
    unlabelled = {s.files[0].uri for s in shards if s.format == "idx" and len(s.files) == 1}
    paired = {_spelt_alike(uri) for uri in used}  # labels may also be there unpacked
    for pattern in data.sources:
        _check_pattern(pattern, [used[uri] for uri in uris[pattern] if uri in used], data)
        spare = {uri for uri in uris[pattern] - used.keys() if _spelt_alike(uri) not in paired}
        _check_pairs(uris[pattern] & unlabelled, spare)
    hashed = hash_files(list(used.values()), storage, read_remote=read_remote, on_hash=on_hash)
    known = {file.uri: file for file in hashed}
    shards = [replace(s, files=tuple(known[file.uri] for file in s.files)) for s in shards]
    used_shards = leave_out(shards, set(data.leave_out))
    if data.leave_out and not used_shards:
        raise DataError(
            "All input shards are named by data.leave_out. Give others in data.sources, or shorten "
            "data.leave_out."
        )
    return Inputs(used_shards, sorted(ignored.values()))


def loose_files(shards: Iterable[InputShard]) -> dict[str, str | None]:
    """SHA-256 by name of the files that are gathered into buckets."""
    return {f.name: f.sha256 for s in shards if s.format == "files" for f in s.files}


def keep_to(
    inputs: Inputs, shards: Mapping[str, str | None], loose: Mapping[str, str | None]
) -> Inputs | None:
    """The input as it was when it had these shards; None where one has changed since, or is gone.

    Args:
        inputs: what there is now.
        shards: SHA-256 by name of what there was.
        loose: SHA-256 by name of the files that were gathered into buckets.
    """
    of_files = [shard for shard in inputs.shards if shard.format == "files"]
    files = [f for shard in of_files for f in shard.files if loose.get(f.name) == f.sha256]
    others = [shard for shard in inputs.shards if shard.format != "files"]
    kept = [*(s for s in others if shards.get(s.name) == s.sha256), *_buckets(files)]
    if {shard.name: shard.sha256 for shard in kept} != shards:
        return None
    return Inputs(sorted(kept, key=lambda shard: shard.name), inputs.ignored)


def leave_out(shards: Sequence[InputShard], hashes: Set[str]) -> list[InputShard]:
    """The shards by name but for some, and but for some loose files: as if these were not there.

    Args:
        shards: of the input.
        hashes: SHA-256 of shards, and of files that are gathered into buckets.
    """
    kept = [shard for shard in shards if shard.sha256 not in hashes]
    loose = [file for shard in kept if shard.format == "files" for file in shard.files]
    others = [file for file in loose if file.sha256 not in hashes]
    if len(others) < len(loose):
        kept = [*(shard for shard in kept if shard.format != "files"), *_buckets(others)]
    return sorted(kept, key=lambda shard: shard.name)


def find_first_files(data: DataConfig, storage: Storage) -> list[InputFile]:
    """The first file that each source names, found and not read.

    Args:
        data: the sources and what they hold.
        storage: the root, which is no input itself.

    Raises:
        DataError: a source matches nothing, or cannot be listed.
    """
    first = []
    for pattern in data.sources:
        matches = _with_labels(match(pattern, storage), storage)
        wanted = [file for file in matches if _is_wanted(file, pattern, data)]
        _check_pattern(pattern, wanted, data)
        first.append(next(file for file in wanted if file.num_bytes and not file.fault))
    return first


def _check_pattern(pattern: str, files: Sequence[InputFile], data: DataConfig) -> None:
    """Raises where a pattern gives nothing to read."""
    present = [file for file in files if not file.fault]
    if not present:
        braces = " Braces such as {0..9} are not expanded." if "{" in pattern else ""
        raise DataError(
            f"There are no {'sequences' if data.is_sequence else 'images'} at {show(pattern)}. "
            "Check data.sources: each is a file, a directory, a glob such as shards/*.tar, or a "
            f"URI.{braces}"
        )
    if not any(file.num_bytes for file in present):
        what = present[0].name + (" and all others there are" if len(present) > 1 else " is")
        raise DataError(
            f"{what} empty (0 bytes), at {show(pattern)}. Write it again or leave it out of "
            "data.sources."
        )


def _check_pairs(images: Set[str], labels: Set[str]) -> None:
    """Raises where IDX images lack labels though there are labels that lack images."""
    if images and labels:
        raise DataError(
            f"{show(min(images))} has no labels beside it, and {show(min(labels))} no images. Name "
            "them like train-images-idx3-ubyte and train-labels-idx1-ubyte, in one directory, or "
            "leave the labels out of data.sources."
        )


def _with_unique_names(files: Iterable[InputFile]) -> list[InputFile]:
    """Files of one name in several sources get more of their paths, until all are told apart."""
    named: dict[str, InputFile] = {}
    for file in files:
        uri = show(file.uri)
        whole = uri.split("://", 1)[-1].lstrip("/")
        numbered = (f"{number}/{whole}" for number in itertools.count(2))
        names = itertools.chain((file.name, whole, uri), numbered)
        name = next(name for name in names if name not in named)
        named[name] = replace(file, name=name)
    return list(named.values())


def format_of(name: str) -> Format | None:
    """What kind of shard a file is by its name; None when the name does not tell."""
    lower = PurePosixPath(name).name.lower()
    if _IDX_IMAGES.search(name):
        return "idx"
    if lower.endswith(IMAGE_SUFFIXES):
        return "files"
    if lower.endswith((".npy", ".npz")):
        return "npy" if lower.endswith(".npy") else "npz"
    return next((fmt for suffix, fmt in _SUFFIXES.items() if lower.endswith(suffix)), None)


def _is_wanted(file: InputFile, pattern: str, data: DataConfig) -> bool:
    """Whether a file takes part; one that was named itself must."""
    kind = format_of(file.name)
    if kind is None and file.is_named and not _IDX_LABELS.search(file.name):
        raise DataError(
            f"{show(pattern)} does not tell by its name what it is. Name it .tar, .zip, .parquet, "
            ".npy, .npz, *-images-idx3-ubyte, or give a directory of images."
        )
    if data.is_sequence:
        return kind in ("tar", "zip", "parquet", "npy", "npz")
    return kind in ("tar", "zip", "parquet", "idx", "files") or bool(_IDX_LABELS.search(file.name))


def _containers(files: Sequence[InputFile], data: DataConfig) -> list[InputShard]:
    all_labels = _idx_labels(files)
    shards = []
    for file in files:
        kind = format_of(file.name)
        if kind is None or _is_loose(file, kind, data):
            continue
        parts = [file]
        if kind == "idx" and (labels := _labels_of(file, all_labels)) is not None:
            parts.append(labels)
        for part in parts:
            if part.fault:  # nobody knows how many images are missing
                raise DataError(
                    f"{show(part.uri)} is {part.fault}. Mend it or leave it out of data.sources."
                )
        shards.append(InputShard(file.name, kind, tuple(parts)))
    return shards


def _is_loose(file: InputFile, kind: Format, data: DataConfig) -> bool:
    """Whether a file is gathered into a bucket rather than being a shard itself."""
    if kind == "files":
        return True
    return kind == "npy" and file.num_bytes < LOOSE_ITEMS * 4 * data.shape[0] * data.shape[1]


def _idx_labels(files: Iterable[InputFile]) -> dict[str, InputFile]:
    """The IDX files of labels, by URI and by that with the name in lower case."""
    by_uri = {file.uri: file for file in files if _IDX_LABELS.search(file.name)}
    return {_lower_name(uri): file for uri, file in by_uri.items()} | by_uri


def _labels_of(images: InputFile, labels: Mapping[str, InputFile]) -> InputFile | None:
    """The labels that lie beside an IDX file of images, in whatever case."""
    names = _label_names(images.uri)
    found = (labels.get(uri) for uri in (*names, *map(_lower_name, names)))
    return next((file for file in found if file is not None), None)


def _lower_name(uri: str) -> str:
    directory, slash, name = uri.rpartition("/")
    return f"{directory}{slash}{name.lower()}"


def _spelt_alike(uri: str) -> str:
    """The same for all spellings of the name of an IDX file, compressed or not."""
    return _lower_name(uri).removesuffix(".gz").replace(".", "-")


def _label_names(images: str) -> list[str]:
    """What the labels of an IDX file of images may be called in its case, compressed or not."""
    parts = _IDX_PARTS.fullmatch(images)
    assert parts is not None  # `format_of` says so
    start, word, mark, idx, ubyte, rest = parts.groups()
    word = {"IMAGES": "LABELS", "Images": "Labels"}.get(word, "labels")
    marks = (mark, "." if mark == "-" else "-")
    return [
        f"{start}{word}{mark}{idx}1{ubyte}{suffix}{rest}"
        for mark in marks
        for suffix in ("", ".gz")
    ]


def _with_labels(found: list[InputFile], storage: Storage) -> list[InputFile]:
    """Adds the labels of IDX files whose pattern matches only the images."""
    by_uri = {file.uri: file for file in found}
    all_labels = _idx_labels(found)
    for images in found:
        if format_of(images.name) != "idx" or _labels_of(images, all_labels) is not None:
            continue
        for uri, name in zip(_label_names(images.uri), _label_names(images.name), strict=True):
            for labels in match_beside(images, uri, name, storage):
                by_uri.setdefault(labels.uri, labels)
    return list(by_uri.values())


def _buckets(loose: Sequence[InputFile]) -> list[InputShard]:
    """Loose files by the hash of their name, into a power of two of buckets."""
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
