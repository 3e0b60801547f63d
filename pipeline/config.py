"""Reading the configuration from strict TOML; the sections and their keys are in `settings/`.

The file chooses, `--set a.b=c` nudges. All faults are reported at once, an unknown key with the
nearest valid one.
"""

import contextlib
import copy
import difflib
import glob
import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.settings import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies `a.b=c` overrides, and validates the whole.

    Relative `data.sources` and `features.weights` are resolved against the file's directory, `~` is
    the home directory.

    Args:
        path: of the TOML file.
        overrides: each `section.key=value`; the value is TOML, or a bare string.

    Raises:
        ConfigError: the file is missing or no TOML, an override is malformed, or values are
            wrong: all faults at once, one a line, but for those that only a new file may not
            have, which come when the others are mended.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no config file at {path}. Give the path of a TOML file, such as "
            "examples/digits/digits.toml."
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory. Give the path of a TOML file in it.") from error
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config file {path}: {error.strerror}. Check the path and its "
            "permissions."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend that line.") from error
    for override in overrides:
        _apply_override(values, override)
    config = _validate(values, source=str(path))
    if faults := config.faults_of_new():
        raise _refusal(str(path), faults)
    return with_absolute_paths(config, path.resolve().parent)


def with_absolute_paths(config: Config, base: Path) -> Config:
    """A config whose `data.sources` and `features.weights` mean the same from anywhere.

    Args:
        config: the whole config.
        base: the directory that relative paths in it are from.
    """
    sources = tuple(absolute_source(source, base) for source in config.data.sources)
    sections: dict[str, Any] = {"data": config.data.model_copy(update={"sources": sources})}
    if (weights := config.features.weights) is not None and "://" not in weights:
        with contextlib.suppress(RuntimeError):  # no such user: a file may be called so
            weights = str(Path(weights).expanduser())
        path = str(base / weights)
        sections["features"] = config.features.model_copy(update={"weights": path})
    return config.model_copy(update=sections)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A config with `a.b=c` overrides applied: the one that the file with these would give.

    Raises:
        ConfigError: an override is malformed, or values are wrong.
    """
    values = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(values, override)
    changed = _validate(values, source=config.name)
    known = config.faults_of_new()  # what a model was kept with, it keeps
    if faults := [fault for fault in changed.faults_of_new() if fault not in known]:
        raise _refusal(config.name, faults)
    if "notify" in values:
        return changed
    return changed.model_copy(update={"notify": config.notify})  # which a dump leaves out


def parse_config(values: Mapping[str, Any], source: str) -> Config:
    """The config that was kept as JSON, with a version of a model for one.

    Args:
        values: by section, as `model_dump(mode="json")` made them.
        source: names it in the error.

    Raises:
        ConfigError: values are wrong, or no longer known.
    """
    return _validate(copy.deepcopy(dict(values)), source)


def command_line(verb: str, config: str | Path, overrides: Sequence[str]) -> str:
    """A verb of a config with its `--set` options, as it can be typed after `raydiffusion`.

    Without settings of the section `notify`, which may be secrets.
    """
    given = [part for text in overrides if not is_secret(text) for part in ("--set", text)]
    return shlex.join([verb, str(config), *given])


def is_secret(override: str) -> bool:
    """Whether a `section.key=value` is of `notify`, and must not be seen in records."""
    return override.partition("=")[0].partition(".")[0] == "notify"


def absolute_source(source: str, base: Path) -> str:
    """A source as an absolute path or glob, or the URI that it is."""
    if "://" in source:
        return source
    first, _, rest = source.partition("/")
    if first.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user: a file may be called so
            base, source = Path(first).expanduser(), rest
    return str(Path(glob.escape(str(base)), source))  # a directory may be called [a]


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    shown = dotted if is_secret(override) else override
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"--set takes section.key=value, got {shown!r}. "
            "Write for example --set train.num_steps=2000."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"--set {shown}: {section!r} is no section. Check the part before the dot."
            )
    values[key] = value


def _validate(values: dict[str, Any], source: str) -> Config:
    try:
        return _parse(values)
    except ValidationError as error:
        found = error.errors()
    faults = [line for fault in found for line in _fault_lines(fault)]
    # What spans several keys is only checked where each is well; look again without the unknown
    # ones, so that a misspelt key does not hide it.
    for fault in found:
        if fault["type"] == "extra_forbidden":
            *sections, key = fault["loc"]
            section: Any = values
            for name in sections:
                section = section[name]
            del section[key]
    try:
        _parse(values)
    except ValidationError as error:
        again = [line for fault in error.errors() for line in _fault_lines(fault)]
        faults += [line for line in again if line not in faults]
    raise _refusal(source, faults)


def _refusal(source: str, faults: Sequence[str]) -> ConfigError:
    heading = f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:"
    return ConfigError("\n  ".join([heading, *faults]))


def _parse(values: dict[str, Any]) -> Config:
    # By way of JSON: strict mode then takes arrays for tuples and still no "3" for 3.
    match values:
        # They are learned as they are, in whatever range.
        case {"data": {"sequence_shape": shape}} if shape is not None:
            evaluate = values.get("evaluate", {})
            if isinstance(evaluate, dict):
                values = {**values, "evaluate": {"clip_x_start": False, **evaluate}}
    return Config.model_validate_json(json.dumps(values, default=str))


def _fault_lines(fault: Any) -> list[str]:
    where = ".".join(str(part) for part in fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            valid = _valid_keys(fault["loc"][:-1])
            near = _nearest(str(fault["loc"][-1]), valid)
            return [f"{where} is not a known key. Did you mean {near!r}?"]
        case "missing":
            return [f"{where} is missing. Add it."]
        case "value_error":
            lines = str(fault["ctx"]["error"]).split("\n")
            return [f"{where}: {line}" if where else line for line in lines]
        case _:
            message = fault["msg"].removeprefix("Input ").rstrip(".")
            if not is_secret(where):
                message += f", got {fault['input']!r}"
            return [f"{where} {message}. Change it."]


def _nearest(key: str, valid: Sequence[str]) -> str:
    """The valid key that looks most like this one; `lr` is `learning_rate`."""
    for name in valid:
        if key == "".join(word[0] for word in name.split("_")):
            return name
    return difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]


def _valid_keys(loc: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in loc:
        model = model.model_fields[part].annotation
        if get_origin(model) in (Union, type(int | str)):
            model = next(kind for kind in get_args(model) if kind is not type(None))
    return list(model.model_fields)
