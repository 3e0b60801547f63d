"""Work on the cluster as Ray tasks: one, or many that are as equal as can be."""

import contextlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.cluster import place_tasks
from pipeline.errors import ClusterError
from pipeline.workflow import Resources

T = TypeVar("T")


def send_task(function: Any, resources: Resources, *args: Any) -> Any:
    """Runs a function of this project as one Ray task and returns its result.

    Raises:
        Exception: what the function raised.
        ClusterError: the task was lost more often than Ray retries it.
    """
    import ray

    place = {} if resources.gpus else place_tasks()[0]
    task: Any = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, **place)(function)
    reference = task.remote(*args)
    with own_errors():
        return ray.get(reference)


@contextlib.contextmanager
def own_errors(running: Sequence[Any] = ()) -> Iterator[None]:
    """Raises what a task raised as itself, and takes back those that need not go on then.

    Args:
        running: references to the tasks that are not done; may change meanwhile.

    Raises:
        Exception: what a task raised.
        ClusterError: a task was lost more often than Ray retries it.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise ClusterError(
            f"The cluster lost a task: {str(error).strip().splitlines()[0]} Finished work is kept; "
            "see that nodes have enough memory and run the same command again."
        ) from error
    finally:
        if running:
            with contextlib.suppress(Exception):  # the cluster may be gone
                # Ray's core worker may abort when a task that is done is taken back.
                _, left_over = ray.wait(list(running), num_returns=len(running), timeout=0)
                for task in left_over:
                    ray.cancel(task)


def share_out(
    items: Sequence[T], count: int, *, size_of: Callable[[T], int], name_of: Callable[[T], str]
) -> list[list[T]]:
    """The items in at most so many groups, as equal in size as can be; the same every time.

    Args:
        items: to be worked on.
        count: of groups wanted.
        size_of: what an item counts for.
        name_of: orders items of the same size.
    """
    groups: list[list[T]] = [[] for _ in range(min(len(items), count))]
    smallest = [(0, number) for number in range(len(groups))]
    for item in sorted(items, key=lambda item: (-size_of(item), name_of(item))):
        size, number = heapq.heappop(smallest)
        groups[number].append(item)
        heapq.heappush(smallest, (size + size_of(item), number))
    return groups
