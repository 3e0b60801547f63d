"""How the shards are shared out among the tasks of preprocessing."""

import pytest

from pipeline.identities import InputFile
from pipeline.preprocess import BYTES_PER_TASK, group_shards
from pipeline.sources import InputShard


def shard(number: int, num_bytes: int) -> InputShard:
    name = f"{number:03d}.tar"
    return InputShard(name, "tar", (InputFile(name, f"/{name}", num_bytes, None, "ab"),))


def sizes(groups: list[list[InputShard]]) -> list[int]:
    return [sum(shard.num_bytes for shard in group) for group in groups]


def test_a_cpu_has_one_task_as_long_as_it_is_short() -> None:
    shards = [shard(number, BYTES_PER_TASK // 10) for number in range(20)]
    groups = group_shards(shards, 2)
    assert sizes(groups) == [BYTES_PER_TASK // 10 * 10] * 2
    assert sorted(one.name for group in groups for one in group) == [one.name for one in shards]


@pytest.mark.parametrize("num_shards", [21, 25, 39, 40, 41, 100])
def test_no_cpu_has_a_task_more_than_another(num_shards: int) -> None:
    """Two and a half tasks for each of two CPUs would leave one idle for the last."""
    groups = group_shards([shard(n, BYTES_PER_TASK // 10) for n in range(num_shards)], 2)
    assert len(groups) % 2 == 0
    assert max(sizes(groups)) <= BYTES_PER_TASK
    assert max(sizes(groups)) - min(sizes(groups)) <= BYTES_PER_TASK // 10


def test_no_task_is_without_a_shard() -> None:
    assert sizes(group_shards([shard(0, 5), shard(1, 7)], 16)) == [7, 5]
    assert group_shards([shard(0, 0)], 4) == [[shard(0, 0)]]


def test_a_shard_is_never_cut() -> None:
    large = [shard(number, 3 * BYTES_PER_TASK) for number in range(3)]
    assert sizes(group_shards(large, 2)) == [3 * BYTES_PER_TASK] * 3
