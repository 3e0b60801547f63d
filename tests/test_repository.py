"""The repository's own files: what is built from them, and what others validate."""

import copy
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), str(source)],
        check=True, timeout=120,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("raydiffusion-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "diffusion_core",
        "pipeline",
        "jobs",
    }
    for package in ("diffusion_core", "pipeline", "jobs"):
        assert f"{package}/py.typed" in names
        modules = [str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py")]
        assert set(modules) <= set(names)
    assert "pipeline/report/templates/report.html.jinja" in names


def test_cluster_yaml_is_valid_for_ray() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    document = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(document)))
    misspelt = {**document, "max_worker": 3}
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(copy.deepcopy(misspelt)))


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    names = [re.split(r"[\[<>=~ ;]", item)[0].lower().replace("_", "-") for item in wanted]
    assert [name for name in names if name not in pins] == []
    assert pins["torch"] == "2.13.0"
    assert pins["ray"] == "2.60.0"


def test_readme_targets_and_paths_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_the_shards_are_what_their_script_makes(tmp_path: Path) -> None:
    committed = ROOT / "examples" / "digits"
    script = tmp_path / "make_shards.py"
    script.write_bytes((committed / "make_shards.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.tar"))
    assert [str(p) for p in made] == [
        *(f"digits-000{k}.tar" for k in range(4)),
        "later/digits-0004.tar",
    ]
    for path in made:
        assert (tmp_path / path).read_bytes() == (committed / path).read_bytes(), path


def test_the_map_of_the_pipeline_is_whole() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = text.split("| about | modules |\n", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([a-z_]+/?)`", row)]
    there = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py"}
    there |= {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert sorted(named) == sorted(there - {"__init__"})


def test_the_page_of_settings_is_what_the_settings_make() -> None:
    done = subprocess.run(
        [sys.executable, "docs/make_configuration.py", "--check"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, "run python docs/make_configuration.py"
    rows = (ROOT / "docs" / "configuration.md").read_text().splitlines()
    assert [row for row in rows if row.endswith("|  |")] == []  # each says what it is


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_of_the_docs_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
