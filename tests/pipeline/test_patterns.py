"""Which files a source names: paths, directories, globs and URIs, through links or not."""

import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.config import load_config
from pipeline.errors import DataError
from pipeline.identities import open_once, open_seekable
from pipeline.settings import DataConfig
from pipeline.sources import Inputs, list_inputs
from pipeline.storage import LocalStorage, open_storage


@pytest.fixture
def inputs_of(tmp_path: Path) -> Callable[..., Inputs]:
    """Lists what sources below `tmp_path` hold; the storage root may be below them."""

    def run(*sources: str, root: str = "root") -> Inputs:
        paths = tuple(s if "://" in s else str(tmp_path / s) for s in sources)
        data = DataConfig(sources=paths, resolution=8)
        return list_inputs(data, open_storage(root if "://" in root else str(tmp_path / root)))

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small file below `tmp_path`; its content is its name unless one is given."""

    def run(name: str | bytes, content: bytes | None = None) -> Path:
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name) if content is None else content)
        return path

    return run


def names(inputs: Inputs) -> list[str]:
    return sorted(file.name for shard in inputs.shards for file in shard.files)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An HTTP server of the directory `tmp_path`; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("source", ["in", "in/", "in/**", "in/**/*.png", "in/*/*.png", "in/*"])
def test_links_to_directories_are_followed(
    tmp_path: Path, write: Callable[..., Path], inputs_of: Callable[..., Inputs], source: str
) -> None:
    write("in/dogs/1.png")
    write("else/cats/2.png")
    (tmp_path / "in" / "cats").symlink_to("../else/cats")
    (tmp_path / "in" / "kittens").symlink_to("../else/cats")
    (shard,) = inputs_of(source).shards
    assert [(file.name, file.class_name) for file in shard.files] == [
        ("cats/2.png", "cats"), ("dogs/1.png", "dogs"), ("kittens/2.png", "kittens"),
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["in", "in/**", "in/**/*.png"])
def test_links_that_lead_round_in_circles_are_cut(
    tmp_path: Path, write: Callable[..., Path], inputs_of: Callable[..., Inputs], source: str
) -> None:
    write("in/a/1.png")
    write("in/b/2.png")
    for link, target in (("loop", "."), ("again", "."), ("a/up", ".."), ("a/b", "../b")):
        (tmp_path / "in" / link).symlink_to(target)
    (tmp_path / "in" / "b" / "a").symlink_to("../a")
    assert names(inputs_of(source)) == [
        "a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png",
    ]  # fmt: skip


@pytest.mark.parametrize("source", ["in", "in/*", "in/**", "in/*.png"])
def test_what_is_no_file_but_called_like_one_is_kept_to_be_refused(
    tmp_path: Path, write: Callable[..., Path], inputs_of: Callable[..., Inputs], source: str
) -> None:
    write("in/1.png")
    (tmp_path / "in" / "2.png").symlink_to("gone")
    os.mkfifo(tmp_path / "in" / "3.png")
    (tmp_path / "in" / "notes").symlink_to("gone")
    inputs = inputs_of(source)
    assert [(f.name, f.fault) for f in inputs.shards[0].files] == [
        ("1.png", ""), ("2.png", "a link to nothing"), ("3.png", "no regular file"),
    ]  # fmt: skip
    assert inputs.ignored == ([] if source == "in/*.png" else ["notes"])


def test_a_shard_that_is_a_link_to_nothing_is_an_error(
    tmp_path: Path, write: Callable[..., Path], inputs_of: Callable[..., Inputs]
) -> None:
    write("in/1.tar")
    (tmp_path / "in" / "2.tar").symlink_to("gone")
    with pytest.raises(DataError, match=r"in/2\.tar is a link to nothing\. Mend it"):
        inputs_of("in")
    (tmp_path / "in" / "2.tar").unlink()
    write("in/images-idx3-ubyte")
    (tmp_path / "in" / "labels-idx1-ubyte").symlink_to("gone")
    with pytest.raises(DataError, match=r"in/labels-idx1-ubyte is a link to nothing"):
        inputs_of("in")


def test_a_name_that_is_no_utf_8_is_shown_escaped(
    write: Callable[..., Path], inputs_of: Callable[..., Inputs]
) -> None:
    path = write(b"in/caf\xe9/1.png")
    write("in/2.png")
    write(b"in/\xe9.tar")
    write(b"in/\xe9.txt")
    inputs = inputs_of("in")
    tar, bucket = sorted(inputs.shards, key=lambda shard: shard.format, reverse=True)
    assert tar.name == "\\udce9.tar"
    assert [file.name for file in bucket.files] == ["2.png", "caf\\udce9/1.png"]
    assert Path(bucket.files[1].uri) == path
    assert inputs.ignored == ["\\udce9.txt"]
    assert inputs_of("in") == inputs  # remembered


def test_names_that_are_shown_alike_are_told_apart(
    write: Callable[..., Path], inputs_of: Callable[..., Inputs]
) -> None:
    write(b"in/\xe9.png")
    write("in/\\udce9.png")
    found = names(inputs_of("in"))
    assert len(set(found)) == 2
    assert all(name.endswith(".png") for name in found)


def test_a_file_with_the_signs_of_a_glob_in_its_name(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    for name in ("x[1].png", "x1.png", "{a,b}.tar", "y*.png", "yes.png"):
        write(f"[home]/{name}")
    config = tmp_path / "[home]" / "c.toml"

    def found(source: str) -> list[str]:
        config.write_text(f'name = "x"\n[data]\nsources = ["{source}"]\nresolution = 8\n')
        data = load_config(config).data
        return names(list_inputs(data, LocalStorage(str(tmp_path / "root"))))

    assert found("x[1].png") == ["x[1].png"]
    assert found("x[[]1].png") == ["x[1].png"]
    assert found("x[12].png") == ["x1.png"]
    assert found("{a,b}.tar") == ["{a,b}.tar"]
    assert found("y*.png") == ["y*.png"]


def test_braces_are_not_expanded_and_the_error_says_so(inputs_of: Callable[..., Inputs]) -> None:
    with pytest.raises(DataError, match=r"Braces such as \{0\.\.9\} are not expanded") as caught:
        inputs_of("{a,b}.tar")
    assert "shards/*.tar" in str(caught.value)
    with pytest.raises(DataError, match="There are no images at") as caught:
        inputs_of("a.tar")
    assert "Braces" not in str(caught.value)


@pytest.mark.parametrize("source", [".", "**", "**/*.png", "*", "*/**/*.png"])
def test_the_storage_root_is_no_input(
    write: Callable[..., Path], inputs_of: Callable[..., Inputs], source: str
) -> None:
    write("in/1.png")
    write("root/steps/preprocess/k/contact_sheet.png")
    write("root/sheet.png")
    inputs = inputs_of(source)
    assert [name.rpartition("/")[2] for name in names(inputs)] == ["1.png"]
    assert inputs.ignored == []


def test_what_lies_beside_the_steps_in_the_storage_root_may_be_input(
    write: Callable[..., Path], inputs_of: Callable[..., Inputs]
) -> None:
    write("root/in/1.png")
    write("root/steps/preprocess/k/contact_sheet.png")
    for source in ("root", "root/in", "root/*/*.png", "root/**"):
        assert len(names(inputs_of(source))) == 1
    assert names(inputs_of("root/steps/preprocess/k")) == ["contact_sheet.png"]  # asked for


def test_a_directory_cannot_be_read(
    tmp_path: Path,
    write: Callable[..., Path],
    inputs_of: Callable[..., Inputs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("in/1.png")
    closed = str(write("in/cats/2.png").parent)
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if path == closed:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"Cannot read .*in/cats: Permission denied"):
        inputs_of("in")


def test_one_file_by_its_path_and_by_its_uri_is_one(
    tmp_path: Path, write: Callable[..., Path], inputs_of: Callable[..., Inputs]
) -> None:
    write("in/deep/a.tar")
    uri = f"file://{tmp_path}/in"
    assert len(inputs_of("in", uri, f"{uri}/**/*.tar", "in/../in").shards) == 1


def test_files_on_the_web(
    tmp_path: Path, web: str, write: Callable[..., Path], inputs_of: Callable[..., Inputs]
) -> None:
    content = os.urandom(6 << 20)  # more than one block, from a server that gives no ranges
    write("in/a.tar", content)
    write("in/cats/1 é.png")
    write("in/notes.txt")
    (shard,) = inputs_of(f"{web}/in/a.tar").shards
    assert (shard.name, shard.num_bytes) == ("a.tar", len(content))
    for open_it in (open_once, open_seekable):
        with open_it(shard.files[0]) as file:
            assert file.read(7 << 20) == content
    assert names(inputs_of(f"{web}/in/a.tar?version=1")) == ["a.tar"]
    inputs = inputs_of(f"{web}/in/")
    assert names(inputs) == ["a.tar", "cats/1 é.png"]
    assert inputs.ignored == ["notes.txt"]
    assert names(inputs_of(f"{web}/in/*.tar")) == ["a.tar"]
    (tmp_path / "in" / "b.png").symlink_to("gone")
    (bucket,) = [shard for shard in inputs_of(f"{web}/in/").shards if shard.format == "files"]
    assert [file.fault for file in bucket.files] == ["a link to nothing", ""]
    for pattern in ("in/b.tar", "in/*.zip"):
        with pytest.raises(DataError, match="There are no images at"):
            inputs_of(f"{web}/{pattern}")
    assert inputs_of(f"{web}/in/a.tar").shards[0].sha256 == shard.sha256


def test_a_web_server_that_does_not_answer(inputs_of: Callable[..., Inputs]) -> None:
    with pytest.raises(DataError, match=r"Cannot read http://127\.0\.0\.1:9/a\.tar"):
        inputs_of("http://127.0.0.1:9/a.tar")


@pytest.mark.parametrize("chain", ["zip://*.png::file:///x/a.zip", "simplecache::s3://b/a.tar"])
def test_chained_uris_are_refused_when_planned(
    inputs_of: Callable[..., Inputs], chain: str
) -> None:
    with pytest.raises(DataError, match=r"chain.*Name the archive itself"):
        inputs_of(chain)


def test_the_uri_of_a_file_leads_back_to_it(
    inputs_of: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(fsspec.get_filesystem_class("memory")):
        """A store of several hosts, which its paths do not name."""

        protocol = "elsewhere"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + (path.split("/", 3)[3] if "://" in path else path).strip("/")

        @staticmethod
        def _get_kwargs_from_urls(path: str) -> dict[str, str]:
            return {"host": path.split("/")[2]} if "://" in path else {}

    fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)
    monkeypatch.setattr(Elsewhere, "store", {})
    Elsewhere(host="h").pipe("/in/a.tar", b"a")
    (shard,) = inputs_of("elsewhere://h/in/*.tar").shards
    assert shard.files[0].uri == "elsewhere://h/in/a.tar"
    assert shard.sha256


def test_a_dot_that_names_no_directory_hides_nothing(inputs_of: Callable[..., Inputs]) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("./1.png", "cats/./2.png", ".cats/3.png", "cats/.4.png"):
        memory.pipe(f"/dots/in/{name}", b"x")
    try:
        (bucket,) = inputs_of("memory:///dots/in").shards
    finally:
        memory.rm("/dots", recursive=True)
    assert {file.name: file.class_name for file in bucket.files} == {
        "./1.png": "",
        "cats/./2.png": "cats",
    }


def test_the_storage_root_in_the_store_of_the_sources_is_no_input(
    inputs_of: Callable[..., Inputs],
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/patterns/in/1.png", b"1")
    memory.pipe("/patterns/runs/steps/preprocess/k/contact_sheet.png", b"2")
    try:
        for source in ("memory:///patterns", "memory:///patterns/**"):
            assert names(inputs_of(source, root="memory:///patterns/runs")) == ["in/1.png"]
    finally:
        memory.rm("/patterns", recursive=True)
