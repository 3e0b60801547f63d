"""Fixtures, named by what they start or make."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import numpy as np
import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from PIL import Image
from typer.testing import CliRunner
from werkzeug.serving import make_server
from xdist.scheduler import LoadFileScheduling

from jobs.cli import app
from pipeline.shards import write_arrow
from pipeline.storage import Storage, hash_content, size_of_content

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits"

hypothesis.settings.register_profile("untimed", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("untimed")

# Modules whose tests start Ray themselves.
OWN_RAY = {
    "test_jobs_story.py",
    "test_local_ray.py",
    "test_object_store_story.py",
    "test_pools.py",
    "test_preprocess_story.py",
}
TINY = """
name = "tiny"
[data]
sources = ["{sources}"]
resolution = 8
mode = "L"
validation_fraction = 0.1333
test_fraction = 0.2
[model]
dim = 8
dim_mults = [1, 2]
attention = ["none", "none"]
heads = 1
head_dim = 8
norm_groups = 4
[diffusion]
num_train_timesteps = 100
[train]
num_workers = 2
num_steps = 300
global_batch_size = 32
checkpoint_every = 50
warmup_steps = 10
[features]
width = 4
num_steps = 100
[evaluate]
num_samples = 128
num_steps = 10
"""


@functools.cache
def needs_ray(path: Path) -> bool:
    """Whether tests of a module start Ray, or use the one of the test run."""
    return path.name in OWN_RAY or "ray_cluster" in path.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with Ray come first: side by side, what takes longest must not begin last."""
    slow = {path: needs_ray(path) for path in {item.path for item in items}}
    items.sort(key=lambda item: not slow[item.path])


class ByModule(LoadFileScheduling):
    """Side by side run modules, whose fixtures are shared; those with Ray are one of them.

    So tests with Ray never run beside one another.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0]
        return "ray" if needs_ray(ROOT / name) else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByModule:
    """What deals tests out with `-n`."""
    return ByModule(config, log)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Processes of tests heed SIGINT, which a shell has what runs in its background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A config file of a run that takes seconds, on the committed digits."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(sources=DIGITS / "digits-*.tar"))
    return path


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Switches off the tests' own type checks, to see what a user would be told."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def make_tar() -> Callable[..., Path]:
    """Writes a tar of (member name, content) pairs."""

    def make(path: Path, members: list[tuple[str, bytes]]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path

    return make


@pytest.fixture
def make_png() -> Callable[..., bytes]:
    """Encodes a PNG of random pixels, or of the given ones."""

    def make(seed: int = 0, size: tuple[int, ...] = (8, 8)) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def write_data_set() -> Callable[..., dict[str, Any]]:
    """Writes splits into a storage root, as `preprocess` would; the manifest.

    The last `num_validation` items are the validation split, the others the training split, in
    so many shards.
    """

    def write(
        storage: Storage,
        items: np.ndarray,
        labels: Sequence[int] | None = None,
        num_validation: int = 0,
        num_shards: int = 1,
        key: str = "k",
    ) -> dict[str, Any]:
        files = []
        cut = len(items) - num_validation
        shards = [("train", part) for part in np.array_split(np.arange(cut), num_shards)]
        shards.append(("validation", np.arange(cut, len(items))))
        for number, (split, ids) in enumerate(shards):
            names = [f"{number}/{k}" for k in range(len(ids))]
            of_items = [None] * len(ids) if labels is None else [labels[k] for k in ids]
            content = write_arrow(items[ids], of_items, names)
            name = f"{split}-{number:05d}.arrow"
            storage.create(f"d/{key}/{name}", content)
            facts = {"bytes": size_of_content(content), "sha256": hash_content(content)}
            files.append({"split": split, "file": name, "count": len(ids), **facts})
        document = {
            "classes": None,
            "labels": {
                split: {str(label): 1 for label in labels or ()}
                for split in ("train", "validation", "test")
            },
            "shape": list(items.shape[1:]),
            "dtype": str(items.dtype),
            "shards": [{"input": "x", "directory": f"d/{key}", "files": files}],
        }
        text = json.dumps(document).encode()
        storage.create(f"steps/preprocess/{key}/dataset.json", text)
        artifact = {"file": "dataset.json", "sha256": hashlib.sha256(text).hexdigest()}
        return {"step": "preprocess", "key": key, "artifacts": {"dataset.json": artifact}}

    return write


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `raydiffusion` in a process of its own and returns what it printed."""

    def run(
        *args: str, cwd: Path, timeout: float = 300, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [cli_program(), *args],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "160", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def call_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run_cli`, in this process: for what starts nothing, where a process costs seconds."""
    runner = CliRunner()

    def call(
        *args: str, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        with contextlib.chdir(cwd):
            done = runner.invoke(
                app, list(args), env={"COLUMNS": "160", **(env or {})}, catch_exceptions=False
            )
        return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def kill_cli_at() -> Callable[..., list[str]]:
    """Runs `raydiffusion` and SIGKILLs it once `is_time(lines)` holds of all it has printed."""

    def run(
        *args: str, cwd: Path, is_time: Callable[[list[str]], bool], timeout: float = 300
    ) -> list[str]:
        process = subprocess.Popen(
            [cli_program(), *args],
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        deadline = time.monotonic() + timeout
        while not (came := is_time(lines)) and process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        reader.join()
        process.stdout.close()
        assert process.wait(timeout=10) == -signal.SIGKILL, "".join(lines)
        assert came, f"not within {timeout:.0f} s: " + "".join(lines)
        return lines

    return run


class ObjectStore:
    """A real S3 protocol server that remembers its requests and can be told to fail some."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.fails: Callable[[str, str], bool]
        self.conflicts: Callable[[str, str], bool]  # as S3 does while another writes the same
        self.loses: Callable[[str, str], bool]  # does what is asked, and does not say so
        self.heal()
        self._backend = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._application, threaded=True)
        self.filesystem: Any = None

    def _application(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.fails(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("507 Insufficient Storage", [("Content-Length", "0")])
            return []
        if self.conflicts(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>ConditionalRequestConflict</Code><Message>x</Message></Error>"
            start_response("409 Conflict", [("Content-Length", str(len(body)))])
            return [body]
        if self.loses(method, path):
            list(self._backend(environ, lambda *_: None))
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        return self._backend(environ, start_response)

    def heal(self) -> None:
        """Fails no more."""
        self.fails = self.conflicts = self.loses = lambda method, path: False

    def read(self) -> list[str]:
        """The paths of the objects whose content was read."""
        return [path for method, path in self.requests if method == "GET" and path.count("/") > 1]


@pytest.fixture(scope="session")
def _object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The one S3 server of a test run; every process finds it by its environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    thread = threading.Thread(target=store.server.serve_forever)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.server.server_port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAYDIFFUSION_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    os.environ.update(environment)
    store.filesystem = s3fs.S3FileSystem()
    yield store
    store.server.shutdown()
    thread.join()
    store.server.server_close()
    for name in environment:
        del os.environ[name]


@pytest.fixture
def object_store(_object_store: ObjectStore) -> Iterator[tuple[ObjectStore, str]]:
    """The S3 server and the name of a fresh bucket on it."""
    bucket = f"bucket-{secrets.token_hex(4)}"
    _object_store.filesystem.mkdir(bucket)
    _object_store.requests.clear()
    yield _object_store, bucket
    _object_store.heal()


@pytest.fixture(scope="session")
def ray_cluster(_object_store: ObjectStore) -> Iterator[str]:
    """The one Ray cluster of a test run, two CPUs, in a process of its own; its address."""
    # A token of its own: nothing in the home directory is read or written, and the processes that
    # tests start have it from the environment.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
    temp = tempfile.mkdtemp(prefix="raydiffusion-")  # not pytest's: sockets need a short path
    code = (
        "import ray, sys; "
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, "
        "_temp_dir=sys.argv[1]); "
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, temp], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    address = process.stdout.readline().strip()
    assert address, "Ray did not start"
    yield address
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=30)
    shutil.rmtree(temp, ignore_errors=True)
    del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Puts a disk of so many bytes at a directory, or changes the size of the one there."""
    mounted: list[Path] = []

    def mount(path: Path, num_bytes: int) -> None:
        option = f"size={num_bytes}" + (",remount" if path in mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(path)], capture_output=True
        )
        if path in mounted:
            assert done.returncode == 0, done.stderr
            return
        if done.returncode != 0:
            pytest.skip("a small disk can be made by root on Linux only")
        mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def cli_program() -> str:
    """The installed console script beside this interpreter."""
    return str(Path(sys.executable).parent / "raydiffusion")
