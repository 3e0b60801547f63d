"""What determines an extractor beside its settings, found without running it: hashes of files.

They are part of the key of the step `features`, so that other weights at the same path, or other
code, make other features. Nothing here imports torch: a plan must answer at once.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from pipeline.errors import ConfigError, DataError, EvaluationError
from pipeline.escaping import show
from pipeline.identities import OnHash, as_data_error, hash_files
from pipeline.patterns import match
from pipeline.settings import FeaturesConfig
from pipeline.storage import Storage

UNREAD = "unread"  # weights on a remote place that nobody has read yet
OF_THE_LIBRARY = "of the library"
WEIGHTS, CODE = "features.weights", "features.code"


def identify_extractor(
    features: FeaturesConfig,
    storage: Storage,
    *,
    read_remote: bool = True,
    on_hash: OnHash | None = None,
) -> dict[str, str]:
    """The SHA-256 of the weights that are given and of the file of code, as settings of the step.

    Args:
        features: the section of the config.
        storage: the root that remembers hashes.
        read_remote: whether remote weights that are not known are read to be hashed.
        on_hash: told the number of files and bytes that are about to be read.

    Raises:
        ConfigError: there is no such module.
        DataError: the weights cannot be read.
        EvaluationError: their hash is not `features.weights_sha256`.
    """
    found = {}
    if features.is_own:
        found[CODE] = hash_code(features.extractor)
    if features.weights is not None:
        found[WEIGHTS] = _hash_weights(features, storage, read_remote, on_hash)
    elif features.extractor == "inception":
        found[WEIGHTS] = features.weights_sha256 or OF_THE_LIBRARY
    return found


def read_weights(features: FeaturesConfig, sha256: str) -> bytes:
    """The content of the file of weights.

    Args:
        features: the section of the config.
        sha256: of the plan.

    Raises:
        DataError: it cannot be read, or is no longer what it was.
        EvaluationError: its hash is not `features.weights_sha256`.
    """
    uri = features.weights
    assert uri is not None  # else nobody asks
    with as_data_error(uri):
        if "://" in uri:
            import fsspec  # only here: a plan reads no file that it knows

            with fsspec.open(uri, "rb") as file:
                content = file.read()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            content = Path(uri).read_bytes()
    check_hash(content, features.weights_sha256, f"features.weights = {show(uri)}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(
            f"features.weights = {show(uri)} changed since the run was planned. Run the same "
            "command again: it takes the weights as they are then."
        )
    return content


def check_hash(content: bytes, sha256: str | None, what: str) -> None:
    """Refuses weights with another hash than they must have.

    Args:
        content: of the file.
        sha256: that it must have; None: any.
        what: names it in the error.

    Raises:
        EvaluationError: its hash is another.
    """
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise _wrong_hash(what, found, sha256)


def hash_code(extractor: str) -> str:
    """The SHA-256 of the file that a user's module is in, which is found and not imported.

    Args:
        extractor: `package.module:factory`.

    Raises:
        ConfigError: there is no such module here.
    """
    module = extractor.partition(":")[0]
    file = _find_file(module.split("."))
    if file is None or not Path(file).is_file():
        raise ConfigError(
            f"features.extractor = {extractor!r} needs a module {module}, and there is none on "
            f"Python's path here ({sys.executable}). Install it, or add the directory that it is "
            "in to PYTHONPATH."
        )
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _find_file(parts: Sequence[str]) -> str | None:
    """The file of a module in packages, none of which is imported."""
    try:
        spec = importlib.util.find_spec(parts[0])
    except ValueError:  # what is imported already and came from no file
        return None
    for part in parts[1:]:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # By its last name: by the whole one, the packages around it would have to be imported.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return None if spec is None else spec.origin


def _hash_weights(
    features: FeaturesConfig, storage: Storage, read_remote: bool, on_hash: OnHash | None
) -> str:
    assert features.weights is not None
    expected = features.weights_sha256
    if "://" in features.weights and expected is not None:
        return expected  # checked when it is read
    files = match(features.weights, storage)
    if len(files) != 1 or files[0].fault or not files[0].is_named:
        what = f"is {files[0].fault}" if len(files) == 1 and files[0].fault else "is no file"
        raise DataError(
            f"features.weights = {show(features.weights)} {what}. Give the path or URI of a file "
            "of weights."
        )
    (file,) = hash_files(files, storage, read_remote=read_remote, on_hash=on_hash)
    if expected is not None and file.sha256 is not None and file.sha256 != expected:
        what = f"features.weights = {show(features.weights)}"
        raise _wrong_hash(what, file.sha256, expected)
    return file.sha256 or UNREAD


def _wrong_hash(what: str, found: str, expected: str) -> EvaluationError:
    return EvaluationError(
        f"The SHA-256 of {what} is {found}, where it must be {expected}. Get the file again, or "
        "change features.weights_sha256 if these are the weights that are meant."
    )
