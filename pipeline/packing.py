"""What a job takes along to a cluster: this project's packages, the config, what it needs beside.

A `Package` is a list of files by their names in the job's working directory; nothing is copied
before `stage`. Its hash is of names and contents alone, so that the same code and config make the
same package anywhere.
"""

import fnmatch
import hashlib
import importlib.util
import os
import shutil
import site
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import PACKAGES
from pipeline.errors import ConfigError
from pipeline.extractor_identity import hash_code
from pipeline.settings import Config
from pipeline.storage import in_bytes

# What a head's dashboard takes in one request is 100 MiB: with some room for the archive itself.
MAX_BYTES = 95 << 20
SHOWN = 5  # of the largest files, when it is too much
EXCLUDED = (".*", "__pycache__", "*.py[co]", "*.egg-info")
WEIGHTS = "weights"  # the directory of the file that `features.weights` names


@dataclass(frozen=True)
class Package:
    """Files by their names in the job's working directory, with forward slashes."""

    files: Mapping[str, Path]
    config: str  # the name of the config's file
    weights: str | None  # of the file of weights, relative to the config's

    @property
    def num_bytes(self) -> int:
        """Of all files, not compressed."""
        return sum(path.stat().st_size for path in self.files.values())

    def sha256(self) -> str:
        """Of all names and contents."""
        return hash_tree(self.files)

    def stage(self, directory: Path) -> None:
        """Copies the files to where they are packed from."""
        for name, path in self.files.items():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def make_package(
    config: Config, path: Path, *, includes: Sequence[Path] = (), excludes: Sequence[str] = ()
) -> Package:
    """Finds what a job of this config needs.

    That is the three packages of this project; the config's file; the file of `features.weights`
    where it is a local one; and the package or module of an extractor of one's own, unless it is
    installed, as it then has to be on the cluster.

    Args:
        config: the whole config.
        path: of its file.
        includes: files and directories that are wanted too, under their own names.
        excludes: patterns of names, or of whole paths below what is packed, to leave out.

    Raises:
        ConfigError: something is not there, two things have one name, a link leads to where it
            lies, or all is too large.
    """
    files: dict[str, Path] = {}
    excluded = (*EXCLUDED, *excludes)
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        _add(files, root / name, excluded)
    own = find_own_code(config)
    for wanted in [*([own] if own is not None else []), *includes]:
        if not wanted.exists():
            raise ConfigError(f"There is no {wanted} to include. Correct the path.")
        _add(files, wanted.resolve(), excluded)
    _put(files, path.name, path)
    weights = config.features.weights
    if weights is not None:
        weights = None if "://" in weights else f"{WEIGHTS}/{Path(weights).name}"
        if weights is not None:
            file = Path(str(config.features.weights))
            if not file.is_file():
                raise ConfigError(f"features.weights = {file} is no file. Correct the path.")
            _put(files, weights, file)
    package = Package(dict(sorted(files.items())), path.name, weights)
    check_size(package)
    return package


def find_own_code(config: Config) -> Path | None:
    """The top-level module or package of an extractor of one's own; None where it is installed.

    Raises:
        ConfigError: there is none.
    """
    if not config.features.is_own:
        return None
    hash_code(config.features.extractor)  # the sentence for a module that is not there
    name = config.features.extractor.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(name)
    if name in PACKAGES or spec is None:
        return None
    places = spec.submodule_search_locations or [str(spec.origin)]
    found = Path(next(iter(places))).resolve()
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    installed |= {sysconfig.get_path("stdlib"), *site.getsitepackages()}
    if any(found.is_relative_to(Path(place).resolve()) for place in installed):
        return None
    return found


def check_size(package: Package) -> None:
    """Refuses what a cluster would refuse after the upload, and names the largest files.

    Raises:
        ConfigError: it is too large.
    """
    if (total := package.num_bytes) <= MAX_BYTES:
        return
    sizes = sorted(((path.stat().st_size, name) for name, path in package.files.items()))
    largest = ", ".join(f"{name} {in_bytes(size)}" for size, name in sizes[: -SHOWN - 1 : -1])
    raise ConfigError(
        f"The job's files are {in_bytes(total)}, and a cluster takes {in_bytes(MAX_BYTES)} at "
        f"most. The largest: {largest}. Leave files out with --exclude, or put them into storage "
        "and name their URI."
    )


def hash_tree(files: Mapping[str, Path]) -> str:
    """The SHA-256 of files by name: of the sorted names and contents.

    Args:
        files: paths by name.
    """
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _add(files: dict[str, Path], path: Path, excluded: Sequence[str]) -> None:
    """A file under its own name, or all of a directory below its own."""
    if not path.is_dir():
        _put(files, path.name, path)
        return
    for file in _walk(path, excluded):
        _put(files, f"{path.name}/{file.relative_to(path).as_posix()}", file)


def _walk(top: Path, excluded: Sequence[str]) -> Iterator[Path]:
    for directory, names, file_names in os.walk(top, followlinks=True):
        here = Path(directory)
        names[:] = [n for n in names if not _is_excluded(here / n, top, excluded)]
        for name in names:
            _refuse_loop(here / name, top)
        for name in file_names:
            file = here / name
            if file.is_file() and not _is_excluded(file, top, excluded):  # no sockets, dead links
                yield file


def _refuse_loop(path: Path, top: Path) -> None:
    """Refuses a link to a directory that the walk to it went through."""
    if path.is_symlink():
        real = path.resolve()
        above = [each for each in path.parents if each.is_relative_to(top)]
        if any(each.resolve().is_relative_to(real) for each in above):
            raise ConfigError(
                f"{path} is a link to {real}, in which it lies itself. Leave it out with --exclude."
            )


def _is_excluded(path: Path, top: Path, excluded: Sequence[str]) -> bool:
    """Whether a pattern fits its name, or its path from the directory that is packed."""
    whole = path.relative_to(top.parent).as_posix()
    return any(fnmatch.fnmatch(path.name, p) or fnmatch.fnmatch(whole, p) for p in excluded)


def _put(files: dict[str, Path], name: str, path: Path) -> None:
    if name in files and files[name] != path:
        raise ConfigError(
            f"Both {files[name]} and {path} would be {name} in the job's directory. Rename one, or "
            "leave it out with --exclude."
        )
    files[name] = path
