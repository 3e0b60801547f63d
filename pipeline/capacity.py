"""Whether the work fits the cluster: workers and tasks against CPUs and GPUs, with the arithmetic.

What can never fit is refused, for Ray would wait for it without a word. What is merely in use at
the moment is noted: it will be free again.
"""

from collections import Counter
from collections.abc import Sequence

from pipeline.cluster import CPU_POOL, Node, gpu_places, nodes_for_tasks, total
from pipeline.errors import ClusterError, ConfigError
from pipeline.settings import Config
from pipeline.steps import WHOLE_CLUSTER, make_steps
from pipeline.workflow import Resources, Step


class Note(str):
    """A detail that a person should know before a run."""


def fits_on(config: Config, node: Node) -> int:
    """How many workers a node holds; one worker is never spread over two."""
    by_cpu = node.cpus // config.train.cpus_per_worker
    return min(by_cpu, node.gpus) if config.train.use_gpu else by_cpu


def check_workers(config: Config, nodes: Sequence[Node], free: Resources | None = None) -> str:
    """Whether the workers fit; an elastic training needs room for its fewest.

    Args:
        config: the whole config.
        nodes: that are alive; a node that an autoscaler might add does not count.
        free: what no one uses, on a cluster that others use too.

    Raises:
        ClusterError: fewer workers fit than are configured.
    """
    train = config.train
    fewest, most = train.min_workers, train.max_workers
    need = count_of(train.cpus_per_worker, "CPU") + (" and 1 GPU" if train.use_gpu else "")
    fits = sum(fits_on(config, node) for node in nodes)
    holds = f"({list_nodes(nodes)}) holds {fits}"
    if fits < fewest:
        if fewest == most:
            wanted = f"train.num_workers = {fewest} workers of {need} each need"
            lower = f"Set train.num_workers = {fits}"
        else:
            wanted = f"train.num_workers = [{fewest}, {most}]: {fewest} workers of {need} each need"
            lower = f"Set train.num_workers = [{fits}, {most}]"
        if not fits:
            has_gpus = any(node.gpus for node in nodes)
            no_gpu = train.use_gpu and not has_gpus
            lower = "Set train.use_gpu = false" if no_gpu else "Lower train.cpus_per_worker"
        raise ClusterError(
            f"{wanted} a cluster that holds {fewest} of them, and this one {holds}. {lower} or use "
            "a larger cluster."
        )
    detail = f"{count_of(fewest, 'worker')} of {need} each; the cluster {holds}"
    if fewest < most:
        now = f"begins with {min(fits, most)}"
        grows = f" and grows up to {most} when nodes join" if fits < most else ""
        detail = (
            f"{fewest} to {most} workers of {need} each; the cluster {holds}: training {now}{grows}"
        )
    return _note_if_busy(detail, config, free)


def check_tasks(
    config: Config, nodes: Sequence[Node], free: Resources | None = None, trains: bool = True
) -> str:
    """Whether tasks find a CPU, and which steps run beside training.

    Args:
        config: the whole config.
        nodes: that are alive.
        free: what no one uses, on a cluster that others use too.
        trains: whether workers will be needed.

    Raises:
        ClusterError: no node offers a CPU, so that no task could ever start.
    """
    capacity = total(nodes_for_tasks(nodes))
    of_pool = f"of the pool {CPU_POOL} " if any(n.pool == CPU_POOL for n in nodes) else ""
    if not capacity.cpus:
        raise ClusterError(
            f"The tasks of preprocessing, features and evaluation need 1 CPU each, and no node "
            f"{of_pool}offers one ({list_nodes(nodes)}). Start nodes with CPUs: `ray start "
            "--num-cpus`."
        )
    if free is not None and free.cpus < 1:
        return Note(f"all {capacity.cpus} CPUs are in use just now: tasks wait until some are free")
    every = "the CPU" if capacity.cpus == 1 else f"all {capacity.cpus} CPUs"
    every = f"{every} {of_pool}".rstrip()
    detail = f"preprocessing, the reference and evaluation use {every}"
    if not trains:
        return detail
    training, others = _beside_training(config)
    left = max(0, total(nodes).cpus - training.cpus)
    for step in others:
        place = "beside" if step.resources.cpus <= left else "before or after"
        detail += f"; {step.name} runs {place} training, which leaves {count_of(left, 'CPU')}"
    return detail


def check_fid(config: Config, nodes: Sequence[Node], under_torchrun: bool = False) -> str:
    """Whether the scores of `train.fid_every` find a CPU beside the workers.

    Args:
        config: the whole config.
        nodes: that are alive.
        under_torchrun: whether training runs without Ray Train.

    Raises:
        ConfigError: there is no Ray beside training that could score.
        ClusterError: the workers that training begins with take all CPUs.
    """
    train = config.train
    if under_torchrun:
        raise ConfigError(
            "train.fid_every has a Ray task score while Ray Train trains, and torchrun trains "
            "without Ray. Leave train.fid_every out, or run without torchrun."
        )
    # Ray may place workers there first, where the tasks run.
    places = nodes_for_tasks(nodes)
    workers = min(train.max_workers, sum(fits_on(config, node) for node in places))
    taken, cpus = workers * train.cpus_per_worker, total(places).cpus
    left = cpus - taken
    of_pool = f" of the pool {CPU_POOL}" if len(places) < len(nodes) else ""
    takes = (
        f"{count_of(workers, 'worker')} of {count_of(train.cpus_per_worker, 'CPU')} each "
        f"{'takes' if workers == 1 else 'take'} {taken} of the {count_of(cpus, 'CPU')}{of_pool} "
        f"({list_nodes(places)})"
    )
    if left < 1:
        raise ClusterError(
            f"train.fid_every scores in a task of 1 CPU beside the workers, and {takes}. Lower "
            "train.num_workers or train.cpus_per_worker, use a larger cluster, or leave out "
            "train.fid_every."
        )
    return f"a score beside training needs 1 CPU; {takes}: {left} left"


def check_drawing(nodes: Sequence[Node]) -> str:
    """Whether samples that are to be drawn on GPUs find one, and a CPU beside it.

    Args:
        nodes: that are alive.

    Raises:
        ClusterError: no node has both.
    """
    places = gpu_places(nodes)
    if not places:
        raise ClusterError(
            "evaluate.use_gpu draws samples in tasks of 1 GPU and 1 CPU each, and no node has both "
            f"({list_nodes(nodes)}). Set evaluate.use_gpu = false, or use a cluster that has such "
            "nodes."
        )
    return f"samples are drawn on {count_of(places, 'GPU')}"


def list_nodes(nodes: Sequence[Node]) -> str:
    """Nodes in words, equal ones together: "3 nodes: 2 x 16 CPUs and 1 GPU, 1 x 0 CPUs"."""
    kinds = Counter(
        count_of(n.cpus, "CPU") + (f" and {count_of(n.gpus, 'GPU')}" if n.gpus else "")
        for n in nodes
    )
    each = [f"{count} x {kind}" if len(nodes) > 1 else kind for kind, count in kinds.items()]
    return f"{count_of(len(nodes), 'node')}: {', '.join(each)}"


def _note_if_busy(detail: str, config: Config, free: Resources | None) -> str:
    train = config.train
    cpus = train.min_workers * train.cpus_per_worker
    gpus = train.min_workers if train.use_gpu else 0
    if free is None or (cpus <= free.cpus and gpus <= free.gpus):
        return detail
    need, have = (
        count_of(r.cpus, "CPU") + (f" and {count_of(r.gpus, 'GPU')}" if gpus else "")
        for r in (Resources(cpus, gpus), free)
    )
    return Note(f"{detail}; of the {need} needed only {have} free just now: training waits")


def _beside_training(config: Config) -> tuple[Resources, list[Step]]:
    """What training takes, and the steps of a part of the cluster that neither feed nor need it."""
    steps = {step.name: step for step in make_steps(config, [])}

    def needs(name: str) -> set[str]:
        inputs = {*steps[name].inputs, *steps[name].after}
        return inputs.union(*(needs(other) for other in inputs))

    others = [
        step
        for step in steps.values()
        if step.resources not in (Resources(), WHOLE_CLUSTER)
        and step.name not in needs("train") | {"train"}
        and "train" not in needs(step.name)
    ]  # fmt: skip
    return steps["train"].resources, others


def count_of(number: int, noun: str) -> str:
    """A number of things in words: "1 CPU", "2 CPUs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
