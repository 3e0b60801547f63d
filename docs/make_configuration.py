"""Writes `docs/configuration.md` from the settings themselves; a test holds that it is up to date.

.venv/bin/python docs/make_configuration.py            # writes it
.venv/bin/python docs/make_configuration.py --check    # its exit code says whether it is current
"""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.settings import Config, Section

PAGE = Path(__file__).resolve().parent / "configuration.md"
HEAD = """# Configuration: every setting

A config is a TOML file. Only `name`, `data.sources` and `data.resolution` (or
`data.sequence_shape`) must be there; everything else has a default. Paths in it are relative to the
file, `storage.root` alone to the directory you stand in. `--set section.key=value` changes one
setting of one command; the value is TOML, or a bare word. An unknown key is an error that names the
nearest one. All faults are told at once, but for those of settings that do not suit each other,
which may come when the others are mended.

*Made by `.venv/bin/python docs/make_configuration.py` from `pipeline/settings/`; change it there.*
"""
WORDS = {int: "integer", float: "number", str: "string", bool: "true or false"}


def make_page() -> str:
    """All of the page."""
    return "\n".join([HEAD, *_section_lines(Config, ""), ""]).rstrip() + "\n"


def _section_lines(section: type[Section], name: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    if name:
        yield f"## `[{name}]`\n"
        yield f"{(section.__doc__ or '').strip()}\n"
    rows, inner = [], []
    for key, field in section.model_fields.items():
        if _is_section(field.annotation):
            inner.append((f"{name}.{key}" if name else key, field.annotation))
        else:
            rows.append((f"`{key}`", _type_of(field), _default_of(field), field.description or ""))
    if rows:
        yield "| key | value | default | meaning |"
        yield "|---|---|---|---|"
        yield from ("| " + " | ".join(map(_cell, row)) + " |" for row in rows)
        yield ""
    for key, annotation in inner:
        yield from _section_lines(annotation, key)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _type_of(field: FieldInfo) -> str:
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Any = ()) -> str:
    """A type with its limits, as one writes it in TOML."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        constraints = [c for item in args[1:] for c in getattr(item, "metadata", [item])]
        return _describe(args[0], [*constraints, *metadata])
    if origin in (Union, types.UnionType):
        kinds = [_describe(arg, metadata) for arg in args if arg is not type(None)]
        return " or ".join(kinds)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            at_least = any(isinstance(c, MinLen) and c.min_length for c in metadata)
            return f"list of {_describe(args[0])}" + (", not empty" if at_least else "")
        return "[" + ", ".join(_describe(arg) for arg in args) + "]"
    if origin is dict:
        return f"table of {_describe(args[1])}"
    return " ".join([WORDS.get(annotation, str(annotation)), *_limits(metadata)])


def _limits(metadata: Any) -> Iterator[str]:
    for constraint in metadata:
        match constraint:
            case Ge(ge=value):
                yield f"from {_number(value)}"
            case Gt(gt=value):
                yield f"above {_number(value)}"
            case Le(le=value):
                yield f"to {_number(value)}"
            case Lt(lt=value):
                yield f"below {_number(value)}"
            case _:
                continue


def _number(value: Any) -> str:
    return "2^63" if value == 2**63 else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default_of(field: FieldInfo) -> str:
    if field.is_required() or field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    return f"`{json.dumps(field.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Writes the page, or checks it."""
    page = make_page()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.exists() and PAGE.read_text() == page else 1
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
