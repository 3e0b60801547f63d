import re

import pytest

from pipeline.capacity import Note, check_drawing, check_fid, check_tasks, check_workers, list_nodes
from pipeline.cluster import Node, nodes_for_tasks
from pipeline.errors import ClusterError, ConfigError
from pipeline.settings import Config, DataConfig, TrainConfig
from pipeline.workflow import Resources

HEAD, SMALL, GPU = Node(0, 0), Node(2, 0), Node(16, 2)


def config(**train: object) -> Config:
    batch = {"global_batch_size": 960}
    return Config(
        name="t",
        data=DataConfig(sources=("x",), resolution=8),
        train=TrainConfig.model_validate({**batch, **train}),
    )


def test_workers_that_fit_are_counted_by_node() -> None:
    assert (
        check_workers(config(num_workers=4), [HEAD, SMALL, SMALL])
        == "4 workers of 1 CPU each; the cluster (3 nodes: 1 x 0 CPUs, 2 x 2 CPUs) holds 4"
    )


@pytest.mark.parametrize(
    ("train", "nodes", "message"),
    [
        (
            {"num_workers": 5},
            [SMALL, SMALL],
            r"num_workers = 5 workers of 1 CPU each need a cluster that holds 5 of them, and this "
            r"one \(2 nodes: 2 x 2 CPUs\) holds 4\. Set train\.num_workers = 4 or use a larger",
        ),
        # Four CPUs are there, but no worker is spread over two nodes.
        ({"cpus_per_worker": 3}, [SMALL, SMALL], r"holds 0\. Lower train\.cpus_per_worker"),
        ({"use_gpu": True}, [SMALL], r"1 CPU and 1 GPU each .* holds 0\. Set train\.use_gpu = f"),
        ({"use_gpu": True, "num_workers": 3}, [GPU], r"16 CPUs and 2 GPUs\) holds 2"),
        ({"use_gpu": True, "cpus_per_worker": 9, "num_workers": 2}, [GPU], r"holds 1"),
        ({"num_workers": (3, 4)}, [SMALL], r"= \[3, 4\]: 3 workers .* Set .* = \[2, 4\] or"),
    ],
)
def test_workers_that_can_never_fit_are_refused(
    train: dict[str, object], nodes: list[Node], message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        check_workers(config(**train), nodes)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (3, "training begins with 3"),
        (5, "training begins with 4 and grows up to 5 when nodes join"),
    ],
)
def test_an_elastic_training_needs_room_for_its_fewest(most: int, expected: str) -> None:
    detail = check_workers(config(num_workers=(2, most)), [SMALL, SMALL])
    assert detail.startswith(f"2 to {most} workers of 1 CPU each; ")
    assert detail.endswith(expected)


def test_what_is_only_in_use_is_noted() -> None:
    busy = check_workers(config(num_workers=2), [SMALL], Resources(cpus=1))
    assert isinstance(busy, Note)
    assert busy.endswith("; of the 2 CPUs needed only 1 CPU free just now: training waits")
    both = check_workers(config(num_workers=2, use_gpu=True), [GPU], Resources(cpus=16, gpus=1))
    assert "of the 2 CPUs and 2 GPUs needed only 16 CPUs and 1 GPU free" in both
    assert not isinstance(check_workers(config(), [SMALL], Resources(cpus=1)), Note)
    tasks = check_tasks(config(), [SMALL], Resources())
    assert isinstance(tasks, Note)
    assert tasks == "all 2 CPUs are in use just now: tasks wait until some are free"


def test_a_cluster_without_cpus_would_never_start_a_task() -> None:
    with pytest.raises(ClusterError, match=r"no node offers one \(1 node: 0 CPUs\)\. Start nodes"):
        check_tasks(config(), [HEAD])


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (1, "features runs beside training, which leaves 1 CPU"),
        (2, "features runs before or after training, which leaves 0 CPUs"),
        ((1, 4), "features runs before or after training, which leaves 0 CPUs"),
    ],
)
def test_what_runs_beside_training_is_said(workers: object, expected: str) -> None:
    detail = check_tasks(config(num_workers=workers), [SMALL])
    assert detail == f"preprocessing, the reference and evaluation use all 2 CPUs; {expected}"


def test_scores_beside_training_need_a_cpu_beside_the_workers() -> None:
    wants = {"fid_every": 10, "fid_samples": 200}
    takes = r"1 worker of 1 CPU each takes 1 of the 2 CPUs \(1 node: 2 CPUs\)"
    detail = check_fid(config(**wants), [SMALL])
    assert re.fullmatch(rf"a score beside training needs 1 CPU; {takes}: 1 left", detail)
    for workers in (2, (1, 8)):  # as many as there is room for leave none
        with pytest.raises(ClusterError, match=r"2 workers of 1 CPU each take 2 of the 2 .* Lower"):
            check_fid(config(num_workers=workers, **wants), [SMALL])
    assert "beside training" not in check_tasks(config(**wants), [SMALL])  # all else comes before
    with pytest.raises(ConfigError, match="torchrun trains without Ray"):
        check_fid(config(**wants), [SMALL], under_torchrun=True)


def test_scores_beside_training_run_on_the_pool_for_tasks_alone() -> None:
    nodes = [Node(2, 0, pool="cpu"), Node(4, 0)]
    wants = {"fid_every": 10, "fid_samples": 200}
    with pytest.raises(ClusterError, match=r"2 workers .* take 2 of the 2 CPUs of the pool cpu"):
        check_fid(config(num_workers=4, **wants), nodes)
    detail = check_fid(config(num_workers=1, **wants), nodes)
    assert detail.endswith("1 of the 2 CPUs of the pool cpu (1 node: 2 CPUs): 1 left")


def test_equal_nodes_are_listed_together() -> None:
    assert list_nodes([SMALL]) == "1 node: 2 CPUs"
    assert list_nodes([GPU, HEAD, GPU]) == "3 nodes: 2 x 16 CPUs and 2 GPUs, 1 x 0 CPUs"


def test_tasks_run_on_the_pool_for_them_where_there_is_one() -> None:
    pool = Node(4, 0, pool="cpu")
    assert nodes_for_tasks([HEAD, pool, GPU]) == [pool]
    assert nodes_for_tasks([HEAD, SMALL, GPU]) == [HEAD, SMALL, GPU]
    assert "use all 4 CPUs of the pool cpu" in check_tasks(config(), [HEAD, pool, GPU])
    with pytest.raises(ClusterError, match="no node of the pool cpu offers one"):
        check_tasks(config(), [Node(0, 0, pool="cpu"), GPU])


def test_samples_on_gpus_need_a_cpu_on_the_same_node() -> None:
    with pytest.raises(ClusterError, match=r"no node has both \(2 nodes: .*use_gpu = false"):
        check_drawing([Node(0, 8), SMALL])
    assert check_drawing([Node(2, 8), GPU, Node(0, 8), SMALL]) == "samples are drawn on 4 GPUs"
