"""The files that a source names: a path, a directory, a glob, or a URI of fsspec.

Links are followed, but not round in circles. The storage root is passed over, so that what a run
writes is not the input of the next. What the files are is decided in `sources.py`.
"""

import errno
import fnmatch
import functools
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn
from urllib.parse import unquote

from pipeline.errors import DataError
from pipeline.escaping import show
from pipeline.identities import InputFile, as_data_error, identity_of, is_web
from pipeline.storage import Storage

INFO_THREADS = 8
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OF_THE_ROOT = (  # what it holds
    "cache",
    "features",
    "garbage",
    "models",
    "models-elsewhere",
    "probes",
    "runs",
    "schedules",
    "steps",
)


def match(pattern: str, storage: Storage) -> list[InputFile]:
    """The files that a source names, or that lie below a directory that it names, by name.

    Hidden files and those of the storage root are passed over unless they are asked for.

    Args:
        pattern: a path, a glob or a URI. What is there by this very name is not a glob.
        storage: the root.

    Raises:
        DataError: something cannot be read, or the URI is of a kind that cannot be used.
    """
    if "://" in pattern and "::" in pattern:
        raise DataError(
            f"{show(pattern)} is a chain of file systems, which data.sources do not take. Name "
            "the archive itself: what is inside is found."
        )
    with as_data_error(pattern):
        if "://" in pattern and not pattern.startswith("file://"):
            found = list(_match_remote(pattern, storage))
        else:
            found = list(_match_local(pattern.removeprefix("file://"), storage))
    once = {f.uri: f for f in found if f.is_named or not is_hidden(f.name)}
    return sorted(once.values(), key=lambda f: f.name)


def match_beside(file: InputFile, uri: str, name: str, storage: Storage) -> list[InputFile]:
    """The file of this URI and name beside another, if there is one."""
    found = match(uri if file.is_remote else glob.escape(uri), storage)
    return [
        InputFile(name, f.uri, f.num_bytes, f.identity, is_named=f.is_named, fault=f.fault)
        for f in found
        if f.uri == uri
    ]


def is_hidden(name: str) -> bool:
    """Whether a file is hidden: by a leading dot, or by macOS."""
    if not name.startswith(".") and "/." not in name and "__MACOSX" not in name:
        return False  # nearly every one, in a fifth of the time
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in parts)


def _make_file(
    name: str, uri: str, facts: os.stat_result | dict[str, Any], is_named: bool, fault: str = ""
) -> InputFile:
    """A file that was found; its name as it is below the pattern."""
    class_name = PurePosixPath(name).parent.name
    size, identity = (0, None) if fault else identity_of(facts)
    return InputFile(
        show(name), uri, size, identity, is_named=is_named, class_name=class_name, fault=fault
    )


def _match_local(pattern: str, storage: Storage) -> Iterator[InputFile]:
    plain = _unescape(pattern)
    is_named = False
    parts = Path(pattern).parts
    first = next((k for k, part in enumerate(parts) if _is_glob(part)), None)
    if first is not None and not os.path.lexists(plain):
        fixed = os.path.realpath(os.path.join("", *map(_unescape, parts[:first])))
        paths = _glob(fixed, parts[first:], _make_walk(fixed, storage))
    elif Path(plain).is_dir():
        fixed = os.path.realpath(plain)
        paths = _make_walk(fixed, storage)(fixed)
    else:
        directory, name = os.path.split(Path(plain).absolute())
        fixed = os.path.realpath(directory)
        path = os.path.join(fixed, name)
        paths = iter([path] * os.path.lexists(path))
        is_named = True
    for path in paths:
        with as_data_error(path):
            try:
                facts = os.stat(path)
            except OSError as error:
                if error.errno not in _LEADS_NOWHERE:
                    raise
                facts, fault = {}, "a link to nothing"
            else:
                fault = "" if stat.S_ISREG(facts.st_mode) else "no regular file"
        yield _make_file(os.path.relpath(path, fixed), path, facts, is_named, fault)


def _is_glob(part: str) -> bool:
    """Whether a part of a path is a glob, not what glob.escape makes of a name."""
    return glob.has_magic(re.sub(r"\[[*?[]\]", "", part))


def _glob(fixed: str, parts: Sequence[str], walk: "_Walk") -> Iterator[str]:
    """The files that match, and those below directories that match."""
    if "**" not in parts:
        for found in glob.glob(os.path.join(glob.escape(fixed), *parts)):
            yield from walk(found)
        return
    # Not by glob: it goes round in circles of links until a path is too long.
    first = parts.index("**")
    head = os.path.join(glob.escape(fixed), *parts[:first])
    for top in glob.glob(head):
        for path in walk(top) if Path(top).is_dir() else ():
            if _fits(Path(path).relative_to(top).parts, parts[first:]):
                yield path


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the path below a place matches the parts of a glob, or lies below one that does."""
    if not parts:
        return True
    if parts[0] == "**":
        return any(_fits(names[k:], parts[1:]) for k in range(len(names) + 1))
    is_fit = bool(names) and fnmatch.fnmatchcase(names[0], parts[0])
    return is_fit and _fits(names[1:], parts[1:])


_Walk = Callable[[str], Iterator[str]]


def _make_walk(fixed: str, storage: Storage) -> _Walk:
    """What yields the files at and below a place that is below the fixed part of a pattern."""

    @functools.cache
    def places(directory: str) -> tuple[str, ...]:
        """What the directories down to this one really are; none where it is passed over."""
        real = os.path.realpath(directory)
        if directory == fixed:
            return (real,)
        above = places(os.path.split(directory)[0])
        if not above or real in above or _is_of_the_root(real, fixed, storage):
            return ()
        return (*above, real)

    def walk(path: str) -> Iterator[str]:
        if not Path(path).is_dir():
            if places(os.path.split(path)[0]):
                yield path
            return
        if not places(path):
            return
        for directory, below, names in os.walk(path, followlinks=True, onerror=_fail):
            below[:] = [
                name
                for name in below
                if not is_hidden(name) and places(os.path.join(directory, name))
            ]
            yield from (os.path.join(directory, name) for name in names)

    return walk


def _fail(error: OSError) -> NoReturn:
    with as_data_error(os.fsdecode(error.filename)):
        raise error


def _is_of_the_root(path: str, fixed: str, storage: Storage) -> bool:
    """Whether something belongs to the storage root, and the pattern does not begin in there."""
    places = [storage.uri, *(f"{storage.uri}/{name}" for name in _OF_THE_ROOT)]
    return any(_is_below(path, place) and not _is_below(fixed, place) for place in places)


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def _unescape(path: str) -> str:
    """Takes back what glob.escape did."""
    return re.sub(r"\[([*?[])\]", r"\1", path)


def _match_remote(pattern: str, storage: Storage) -> Iterator[InputFile]:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(pattern)
    filesystem.invalidate_cache()
    uri_of = _make_uri_of(filesystem, pattern, path)
    magic = re.search(r"[*[]" if is_web(pattern) else r"[*?[]", path)
    facts = _info(filesystem, path)
    if facts is None and magic is None:
        return
    if facts is not None:
        below = facts["type"] == "directory" or path.endswith("/")
        fixed = path.rstrip("/") if below else path.rpartition("/")[0]
        found = {path: {**facts, "type": "directory" if below else facts["type"]}}
    else:
        assert magic is not None
        fixed = path[: magic.start()].rpartition("/")[0]
        found = dict(filesystem.glob(path, detail=True))
    files: dict[str, Any] = {}
    for name, facts in found.items():
        is_directory = facts["type"] == "directory"
        files |= filesystem.find(name, detail=True) if is_directory else {name: facts}
    root = uri_of(fixed)
    wanted = {
        name: facts
        for name, facts in files.items()
        if facts["type"] == "file" and not _is_of_the_root(uri_of(name), root, storage)
    }
    for name, facts in _with_facts(filesystem, wanted).items():
        fault = ""
        if facts is None:
            fault = "a link to nothing"
        elif facts.get("size") is None:
            fault = "of a size that its server does not tell"
        shown = name.removeprefix(fixed).lstrip("/")
        if is_web(pattern):
            shown = unquote(shown.split("?")[0])
        if shown:  # a listing on the web has links to itself
            yield _make_file(shown, uri_of(name), facts or {}, name == path, fault)


def _info(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What the store tells of the file or directory of this very name; None: there is none."""
    try:
        return filesystem.info(path)
    except FileNotFoundError as error:
        # The file system of the web takes every fault for this one.
        cause = error.__cause__
        if is_web(path) and getattr(cause, "status", None) not in (404, 410):
            raise cause or error from None
        return None


def _with_facts(filesystem: Any, files: dict[str, Any]) -> dict[str, Any]:
    """The facts of files, asked for one by one where a listing does not tell the size."""
    unknown = [name for name, facts in files.items() if facts.get("size") is None]
    with ThreadPoolExecutor(INFO_THREADS) as pool:
        asked = pool.map(functools.partial(_info, filesystem), unknown)
        return files | dict(zip(unknown, asked, strict=True))


def _make_uri_of(filesystem: Any, pattern: str, path: str) -> Callable[[str], str]:
    """What makes the URI of a path in a file system: one that leads back to just this path."""
    import fsspec

    before = pattern.rstrip("/").removesuffix(path.rstrip("/"))
    makers: tuple[Callable[[str], str], ...] = (
        filesystem.unstrip_protocol,
        lambda name: f"{before}{name}",
    )
    for make in makers:
        if fsspec.core.url_to_fs(make(path)) == (filesystem, path):
            return make
    raise DataError(
        f"Files at {show(pattern)} have no URIs of their own, by which other processes could find "
        "them. Mount the file system, or copy the files to a disk or an object store."
    )
