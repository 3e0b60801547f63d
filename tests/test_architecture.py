"""jobs -> pipeline -> diffusion_core, never back, and nothing heavy at the start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "diffusion_core": {"pipeline", "jobs", "ray", "logging", "pathlib"},
    "pipeline": {"jobs", "typer", "rich"},
    "jobs": {"diffusion_core", "ray", "torch"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""]
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
                for name in names
                if name.split(".")[0] in FORBIDDEN[package]
            ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("diffusion_core", ("ray", "pyarrow", "pipeline")),
        ("jobs.cli", ("torch", "ray", "pyarrow", "numpy", "fsspec", "matplotlib", "optuna")),
    ],
)
def test_import_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
