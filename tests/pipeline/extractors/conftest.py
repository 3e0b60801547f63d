import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.extractors import ARTIFACT
from pipeline.storage import LocalStorage


@pytest.fixture
def keep_extractor(tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keeps what a task told of an extractor, as the step `features` would; the manifest."""

    def keep(facts: dict[str, Any]) -> dict[str, Any]:
        facts = dict(facts)
        weights = facts.pop("weights")
        LocalStorage(str(tmp_path)).create("steps/features/k/w", weights)
        artifact = {"file": "w", "sha256": hashlib.sha256(weights).hexdigest()}
        return {"step": "features", "key": "k", "artifacts": {ARTIFACT: artifact}, "metrics": facts}

    return keep


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: Any) -> Iterator[Callable[[str], str]]:
    """Writes a module of a user's onto Python's path, in place of the one before; its name."""
    directory = tmp_path / "code"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    name = "extractor_of_a_test"

    def write(text: str) -> str:
        sys.modules.pop(name, None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        (directory / f"{name}.py").write_text("import torch\nfrom torch import nn\n\n" + text)
        return name

    yield write
    sys.modules.pop(name, None)
