"""The first lines that run: prove that the project's packages are its own, then go on.

`pipeline` and `jobs` are everyday names. Another package of that name earlier on the path
would be imported in place of ours and fail in a way that nobody understands.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("diffusion_core", "pipeline")
USAGE_EXIT_CODE = 2


def find_shadow() -> str | None:
    """The sentence for a package that is not found where `jobs` is, or None."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin else None
        found = origin.resolve().parent if origin else None
        if spec is not None and found is None:  # a directory without __init__.py
            found = Path(next(iter(spec.submodule_search_locations or [""]))).resolve()
        if found != home / name:
            where = found or "nowhere"
            return (
                f"The package {name!r} was found at {where}, not in {home}, where raydiffusion "
                "is. Run from another directory, or take that package's parent off PYTHONPATH."
            )
    return None


def main() -> None:
    """The console script `raydiffusion`."""
    shadow = find_shadow()
    if shadow is not None:
        print(f"error: {shadow}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE)
    from jobs.cli import app

    app()
