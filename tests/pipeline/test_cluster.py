"""Joining a cluster, and what it is sent."""

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import _code, _local_gpus, connect
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


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 3), ("", 0), ("-1", 0), ("0,2", 2), ("MIG-a,MIG-b,c,d", 3)]
)
def test_gpus_here_are_those_that_the_driver_tells_and_the_user_shows(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    def tell_count(pointer: Any) -> int:
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint))[0] = 3
        return 0

    driver = SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlDeviceGetCount_v2=tell_count, nvmlShutdown=lambda: 0
    )
    loaded = {"libnvidia-ml.so.1": driver}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: loaded[name])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _local_gpus() == count


def test_a_machine_without_the_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _local_gpus() == 0
