"""`doctor`: every check in one table, and the exit code of the first failure."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import typer

from jobs import diagnosis
from pipeline.config import load_config
from pipeline.errors import ClusterError, StorageError
from pipeline.preflight import Check

RunCli = Callable[..., subprocess.CompletedProcess[str]]

NO_ROOT = StorageError("No root [/]. Make one.")
FOUND = [
    Check("model", "ok", "45,849 weights"),
    Check("storage", "failed", str(NO_ROOT), NO_ROOT),
    Check("disk", "note", "nearly full"),
    Check("cluster", "failed", "No Ray. Start it.", ClusterError("No Ray. Start it.")),
]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Check]], None]:
    """Makes these the checks that there are."""
    return lambda checks: monkeypatch.setattr(diagnosis, "examine", lambda config: iter(checks))


def test_every_check_is_a_row_and_the_first_failure_is_raised(
    tiny_config: Path, find: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    find(FOUND)
    with pytest.raises(StorageError) as caught:
        diagnosis.diagnose(load_config(tiny_config), as_json=False)
    assert caught.value is NO_ROOT
    rows = [line.rstrip().split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["check", "is", "because"],
        *([check.name, check.status, check.detail] for check in FOUND),
    ]


def test_programs_get_one_object(
    tiny_config: Path, find: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    find(FOUND)
    with pytest.raises(typer.Exit) as caught:
        diagnosis.diagnose(load_config(tiny_config), as_json=True)
    assert caught.value.exit_code == StorageError.exit_code
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["exit_code"]) == (False, 4)
    assert document["checks"][2] == {"name": "disk", "status": "note", "detail": "nearly full"}
    find(FOUND[:1])
    diagnosis.diagnose(load_config(tiny_config), as_json=True)
    assert json.loads(capsys.readouterr().out)["ok"]


def test_what_a_cluster_that_is_there_lacks(
    tiny_config: Path, ray_cluster: str, run_cli: RunCli
) -> None:
    options = ("--json", "--set", "train.cpus_per_worker=3")
    done = run_cli(
        "doctor", str(tiny_config), *options, "--set", f"cluster.address={ray_cluster}",
        cwd=tiny_config.parent,
    )  # fmt: skip
    document = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == 7, done.stdout + done.stderr
    checks = {check["name"]: check for check in document["checks"]}
    assert list(checks) == [
        "input", "model", "storage", "disk", "time-outs", "cluster", "workers", "tasks", "nodes",
        "shared storage", "shared input", "versions", "disks", "shared memory", "collectives",
    ]  # fmt: skip
    assert [name for name, check in checks.items() if check["status"] != "ok"] == ["workers"]
    detail = "(1 node: 2 CPUs) holds 0. Lower train.cpus_per_worker"
    assert detail in checks["workers"]["detail"]


def test_a_cluster_that_is_not_there(tiny_config: Path, run_cli: RunCli) -> None:
    options = ("--set", "cluster.address=127.0.0.1:1")
    done = run_cli("doctor", str(tiny_config), *options, cwd=tiny_config.parent)
    assert done.returncode == 7, done.stdout + done.stderr
    assert done.stderr.startswith("error: Ray at 127.0.0.1:1 cannot be used")
    assert "refuses to overwrite" in done.stdout


@pytest.fixture
def start_node(ray_cluster: str) -> Iterator[Callable[[str], str]]:
    """Starts a cluster whose second node is in a mount namespace; gives the address."""
    from ray.cluster_utils import Cluster

    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user make mount namespaces")
    temp = tempfile.mkdtemp(prefix="raydiffusion-")
    small = {"object_store_memory": 80 << 20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": temp, **small},
    )
    nodes: list[subprocess.Popen[bytes]] = []

    def start(mount: str) -> str:
        ray = Path(sys.executable).parent / "ray"
        command = f"{mount} && exec {ray} start --block --num-cpus=1 --disable-usage-stats "
        command += f"--object-store-memory={80 << 20} --address={cluster.address}"
        nodes.append(
            subprocess.Popen(["unshare", "-rm", "sh", "-c", command], stdout=subprocess.DEVNULL)
        )
        return str(cluster.address)

    yield start
    for node in nodes:
        node.terminate()
        node.wait(timeout=60)
    cluster.shutdown()
    shutil.rmtree(temp, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mount", "messages"),
    [
        ("mount -t tmpfs none {root}", ("does not find below", "Set storage.root to a directory")),
        (
            "mount --bind {root} {root} && mount -o remount,ro,bind {root}",
            ("On node ", "Cannot write ", "Read-only file system"),
        ),
    ],
)
def test_a_root_that_only_one_node_has_is_refused(
    tiny_config: Path, run_cli: RunCli, start_node: Callable[[str], str],
    mount: str, messages: tuple[str, ...],
) -> None:  # fmt: skip
    root = tiny_config.parent / "runs"
    root.mkdir()
    address = start_node(mount.format(root=root))
    options = (str(tiny_config), "--set", f"cluster.address={address}")
    deadline = time.monotonic() + 60
    while True:
        done = run_cli("doctor", *options, "--json", cwd=tiny_config.parent)
        checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
        if "2 nodes" in checks["cluster"]["detail"] or time.monotonic() > deadline:
            break
    for refused in (done, run_cli("run", *options, cwd=tiny_config.parent)):
        assert refused.returncode == 4, refused.stdout + refused.stderr
        for message in messages:
            assert message in refused.stdout + refused.stderr
    assert checks["nodes"]["status"] == checks["versions"]["status"] == "ok"
    assert os.listdir(root / "probes") == []
    assert not (root / "steps").exists()
