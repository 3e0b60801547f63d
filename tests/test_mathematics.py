"""`docs/mathematics.md` is kept true: what it names exists, and nothing is left out."""

import ast
import re
from pathlib import Path

import pytest
import torch

from diffusion_core import Diffusion, make_schedule, sample_ddim

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "mathematics.md").read_text()
ROWS = [
    re.findall(r"`([a-z_0-9]+(?:\.[A-Za-z_0-9]+)+)`", line)[-2:]
    for line in TEXT.splitlines()
    if re.search(r"`test_[a-z_]+\.test_", line)
]


def definitions(path: Path) -> dict[str, str]:
    """Qualified names of the functions and classes of a module, with their docstrings."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = ast.get_docstring(inner) or ""
    return found


def modules_below(*directories: str) -> dict[str, dict[str, str]]:
    """Definitions by module, those of all modules of one name together."""
    found: dict[str, dict[str, str]] = {}
    for directory in directories:
        for path in (ROOT / directory).rglob("*.py"):
            found.setdefault(path.stem, {}).update(definitions(path))
    return found


MODULES = modules_below("diffusion_core", "pipeline")
TESTS = modules_below("tests/diffusion_core", "tests/pipeline")


@pytest.mark.parametrize(("function", "test"), ROWS)
def test_every_row_names_what_is_there(function: str, test: str) -> None:
    module, _, name = function.partition(".")
    assert name in MODULES[module], function
    module, _, name = test.partition(".")
    assert name in TESTS[module], test


def test_nothing_published_is_left_out() -> None:
    with_reference = {
        f"{module}.{name}"
        for module, names in MODULES.items()
        for name, docstring in names.items()
        if "Reference:" in docstring
    }
    assert with_reference - {function for function, _ in ROWS} == set()


def test_the_tabulated_gains_are_those_of_the_sampler() -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith("| gain of DDIM"))
    written = [float(cell) for cell in row.split("|")[2:-1]]
    measured = []
    for T in (10, 100, 1000):
        schedule = make_schedule("cosine", T)
        a, b = schedule.signal_scale, schedule.noise_scale
        k = a * 0.36 / (a**2 * 0.36 + b**2)
        x = sample_ddim(
            Diffusion(schedule, "pred_x0"),
            lambda x, t, k=k: x * k[t][:, None],
            torch.ones(1, 1, dtype=torch.float64),
            num_steps=T,
            clip_x_start=False,
        )
        measured.append(float(x))
    assert written == pytest.approx(measured, abs=5e-5)
