"""What a cluster that is joined is sent."""

from pathlib import Path

from pipeline.cluster import _code


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
