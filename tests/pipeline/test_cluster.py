"""Joining a cluster, and what it is sent."""

from pathlib import Path

import pytest

from pipeline.cluster import _code, connect
from pipeline.config import load_config
from pipeline.errors import ClusterError

from ..conftest import TINY


def test_what_python_compiled_makes_no_other_package(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import get_uri_for_directory

    def uri() -> str:
        excludes = _code()["excludes"]
        return get_uri_for_directory(
            str(tmp_path / "package"), include_gitignore=True, excludes=excludes
        )

    compiled = tmp_path / "package" / "inner" / "__pycache__"
    compiled.mkdir(parents=True)
    (compiled.parent / "module.py").write_text("x = 1")
    before = uri()
    (compiled / "module.cpython-311.pyc").write_bytes(b"compiled")
    assert uri() == before
    (compiled.parent / "module.py").write_text("x = 2")
    assert uri() != before


def test_the_address_of_rays_client_is_refused_when_ray_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.format(sources="*.tar"))
    config = load_config(tmp_path / "tiny.toml", ["cluster.address=auto"])
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    refused = pytest.raises(ClusterError, match="Ray at auto cannot be used: RAY_ADDRESS is of Ray")
    with refused, connect(config):
        pass
