import shutil
from pathlib import Path

import pytest

from pipeline import packing
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.packing import Package, find_own_code, make_package

ROOT = Path(__file__).resolve().parent.parent.parent


def package(config: Path, *overrides: str, **options: list) -> Package:
    return make_package(load_config(config, overrides), config, **options)


def test_the_three_packages_and_the_config_are_packed_and_nothing_else(tiny_config: Path) -> None:
    names = set(package(tiny_config).files)
    assert {name.split("/")[0] for name in names} == {
        "diffusion_core", "pipeline", "jobs", "tiny.toml",
    }  # fmt: skip
    modules = {
        path.relative_to(ROOT).as_posix()
        for name in ("diffusion_core", "pipeline", "jobs")
        for path in (ROOT / name).rglob("*.py")
    }
    assert modules <= names
    assert "pipeline/report/templates/report.html.jinja" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_hash_is_of_contents_and_names_alone(tiny_config: Path, tmp_path: Path) -> None:
    first = package(tiny_config).sha256()
    elsewhere = tmp_path / "elsewhere" / "tiny.toml"
    elsewhere.parent.mkdir()
    shutil.copyfile(tiny_config, elsewhere)
    assert package(elsewhere).sha256() == first
    elsewhere.write_text(tiny_config.read_text() + "\n")
    assert package(elsewhere).sha256() != first
    renamed = tiny_config.rename(tmp_path / "other.toml")
    assert package(renamed).sha256() != first


def test_what_is_staged_is_what_was_packed(tiny_config: Path, tmp_path: Path) -> None:
    found = package(tiny_config)
    found.stage(tmp_path / "staged")
    staged = {
        path.relative_to(tmp_path / "staged").as_posix()
        for path in (tmp_path / "staged").rglob("*")
        if path.is_file()
    }
    assert staged == set(found.files)


def test_an_extractor_of_ones_own_is_packed_whole(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for name in ("own_net/__init__.py", "own_net/deep/net.py", "own_net/table.txt", "other.py"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("")
    (home / "own_net" / ".secret").write_text("")
    monkeypatch.syspath_prepend(home)
    names = package(tiny_config, "features.extractor=own_net.deep.net:make").files
    assert {name for name in names if name.startswith("own_net")} == {
        "own_net/__init__.py", "own_net/deep/net.py", "own_net/table.txt",
    }  # fmt: skip
    assert "other.py" in package(tiny_config, "features.extractor=other:make").files
    installed = load_config(tiny_config, ["features.extractor=torch.nn:Identity"])
    assert find_own_code(installed) is None
    with pytest.raises(ConfigError, match="needs a module nowhere_at_all"):
        package(tiny_config, "features.extractor=nowhere_at_all:make")


def test_local_weights_are_packed_and_remote_ones_are_not(
    tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "w.pt").write_bytes(b"w")
    inception = "features.extractor=inception", "features.width=64", "evaluate.num_samples=640"
    found = package(tiny_config, *inception, "features.weights=w.pt")
    assert (found.weights, found.files["weights/w.pt"]) == ("weights/w.pt", tmp_path / "w.pt")
    remote = package(tiny_config, *inception, "features.weights=s3://b/w.pt")
    assert remote.weights is None
    with pytest.raises(ConfigError, match=r"v\.pt is no file"):
        package(tiny_config, *inception, "features.weights=v.pt")


def test_includes_are_packed_and_excludes_left_out(tiny_config: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    for name in ("a.py", "deep/b.csv", "deep/c.bin", ".git/d", "__pycache__/e.pyc"):
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        (extra / name).write_text("")
    (extra / "dead").symlink_to(tmp_path / "nowhere")
    found = package(tiny_config, includes=[extra], excludes=["*.bin", "jobs/scores.py"])
    assert {name for name in found.files if name.startswith("extra")} == {
        "extra/a.py", "extra/deep/b.csv",
    }  # fmt: skip
    assert "jobs/scores.py" not in found.files
    with pytest.raises(ConfigError, match=r"There is no .*nothing to include"):
        package(tiny_config, includes=[tmp_path / "nothing"])
    other = tmp_path / "x" / "tiny.toml"
    other.parent.mkdir()
    other.write_text("")
    with pytest.raises(ConfigError, match=r"would be tiny\.toml in the job's directory"):
        package(tiny_config, includes=[other])


def test_links_to_directories_are_followed(tiny_config: Path, tmp_path: Path) -> None:
    extra, shared = tmp_path / "extra", tmp_path / "shared"
    for path in (extra / "a.py", shared / "deep" / "b.py"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    (extra / "lib").symlink_to(shared)
    (extra / "again").symlink_to("lib/deep")
    found = package(tiny_config, includes=[extra])
    assert {name for name in found.files if name.startswith("extra")} == {
        "extra/a.py", "extra/lib/deep/b.py", "extra/again/b.py",
    }  # fmt: skip
    found.stage(tmp_path / "staged")
    assert not (tmp_path / "staged" / "extra" / "lib").is_symlink()


@pytest.mark.parametrize("target", [".", "..", "../other", "../.."])
def test_links_that_lead_back_are_refused(tiny_config: Path, tmp_path: Path, target: str) -> None:
    extra, other = tmp_path / "extra", tmp_path / "extra" / "other"
    other.mkdir(parents=True)
    (extra / "in").mkdir()
    (other / "back").symlink_to(extra / "in")
    (extra / "in" / "link").symlink_to(target)
    with pytest.raises(ConfigError, match=r"is a link to .*, in which it lies itself\. Leave it"):
        package(tiny_config, includes=[extra])
    assert package(tiny_config, includes=[extra], excludes=["link"])


def test_too_much_is_refused_with_the_largest_files(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_BYTES", 4 << 20)
    for name, size in (("big.bin", 3 << 20), ("bigger.bin", 4 << 20)):
        (tmp_path / name).write_bytes(bytes(size))
    both = [tmp_path / "big.bin", tmp_path / "bigger.bin"]
    with pytest.raises(ConfigError) as refused:
        package(tiny_config, includes=both)
    assert "a cluster takes 4.0 MiB at most" in str(refused.value)
    assert "The largest: bigger.bin 4.0 MiB, big.bin 3.0 MiB, " in str(refused.value)
    assert "--exclude" in str(refused.value)
