"""What the answers of nodes mean: each check refuses, notes, or says in words that it is well.

The answers are `probes.Facts` by node; nothing here asks, starts or writes anything but
`check_gpus`, which looks at GPUs.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pipeline.capacity import Note, count_of, fits_on
from pipeline.cluster import Node
from pipeline.errors import ClusterError, DataError, StorageError
from pipeline.probes import BUSY, UNSHARED, Facts, Question, ask, look, look_at_gpus
from pipeline.settings import Config
from pipeline.storage import LocalStorage, Storage, in_bytes

MIN_TEMP_BYTES = 1 << 28  # Ray's logs and sockets
SPILL_FRACTION = 0.95  # of a disk in use: above it Ray writes no objects to it
NCCL_SHM_BYTES = 1 << 30  # what NCCL's manual gives a container
STORE_GROWS = 0.94  # of /dev/shm: Ray takes up to 0.95 of it, so that a larger one would not help
EQUAL = ("python", "ray", "torch")  # others may differ, and are noted


def check_answers(answers: Mapping[Node, Any]) -> str:
    """Whether every node ran its task.

    Raises:
        ClusterError: one did not, or not in time.
    """
    silent = {node: a for node, a in answers.items() if not isinstance(a, Facts)}
    for node, answer in silent.items():
        if isinstance(answer, TimeoutError):
            raise ClusterError(
                f"Node {node.address} gave {answer} to a task that reads and writes the storage "
                f"root{_more(silent)}. See that its mounts and its network answer, or take it out "
                "of the cluster."
            )
        reason = str(answer).strip().splitlines()
        raise ClusterError(
            f"Node {node.address} cannot run a task of this project{_more(silent)}: "
            f"{type(answer).__name__}: {reason[0] if reason else ''}. Install the same there as "
            "here, as constraints.txt pins it, and start Ray from it."
        )
    return f"{count_of(len(answers), 'node')} ran a task"


def check_storage(storage: Storage, facts: Mapping[Node, Facts], unseen: Collection[Node]) -> str:
    """Whether every node reads what is written here, and is read here.

    Args:
        storage: the root.
        facts: answers by node.
        unseen: nodes whose file is not found here.

    Raises:
        StorageError: one does not.
    """
    unshared = [node for node, f in facts.items() if f.storage_fault == UNSHARED]
    is_local = isinstance(storage, LocalStorage)
    remedy = (
        "Set storage.root to a directory that every node mounts, or to an object store such as "
        "s3://bucket/runs."
        if is_local
        else "See that it is the same store for all of them."
    )
    for node in unshared:
        raise StorageError(
            f"Node {node.address} does not find below the storage root {storage.uri} what this "
            f"process wrote there{_more(unshared)}. {remedy}"
        )
    for node, f in facts.items():
        if f.storage_fault is not None:
            raise StorageError(f"On node {node.address}: {f.storage_fault}")
        if node in unseen:
            raise StorageError(
                f"What node {node.address} wrote below the storage root {storage.uri} is not "
                f"found here. {remedy}"
            )
    return f"{count_of(len(facts), 'node')} read and wrote {storage.uri}"


def check_input(facts: Mapping[Node, Facts]) -> str:
    """Whether every node can open the sources.

    Raises:
        DataError: one cannot.
    """
    faulty = [node for node, f in facts.items() if f.input_fault is not None]
    for node in faulty:
        raise DataError(
            f"On node {node.address}{_more(faulty)}: {facts[node].input_fault} Every node must "
            "find data.sources at the same place."
        )
    return f"{count_of(len(facts), 'node')} opened the first file of each source"


def check_versions(facts: Mapping[Node, Facts]) -> str:
    """Whether Python, Ray, torch and this project are the same everywhere.

    Raises:
        ClusterError: they are not, or a library is missing.
    """
    here = look(Question())
    differs: dict[str, str] = {}
    for node, f in facts.items():
        for name, mine in here.versions.items():
            there = f.versions.get(name)
            if there is None:
                raise ClusterError(
                    f"Node {node.address} has no {name}, and this process {mine}. Install the same "
                    "there, as constraints.txt pins it, and start Ray again."
                )
            if there.split("+")[0] == mine.split("+")[0]:
                continue  # builds for CPU and for CUDA are the same torch
            if name in EQUAL:
                raise ClusterError(
                    f"Node {node.address} has {name} {there}, and this process {mine}. Install the "
                    "same there, as constraints.txt pins it, and start Ray again."
                )
            differs.setdefault(name, f"{name} {mine} here and {there} on node {node.address}")
        if f.code != here.code:
            raise ClusterError(
                f"Node {node.address} imports other code of raydiffusion ({f.code}) than this "
                f"process ({here.code}). Install the same version there, or leave it out: it is "
                "sent along."
            )
    if differs:
        return Note(f"{'; '.join(differs.values())}: images may be decoded differently")
    same = ", ".join(f"{name} {here.versions[name]}" for name in EQUAL)
    return f"{same} and raydiffusion's code {here.code} everywhere"


def check_temps(facts: Mapping[Node, Facts]) -> str:
    """Whether the disks have room where Ray keeps its session.

    Raises:
        ClusterError: one has not.
    """
    details = [
        judge_temp(f"node {node.address}", node.temp, f.temp_free_bytes, f.temp_total_bytes)
        for node, f in facts.items()
    ]
    noted = [detail for detail in details if isinstance(detail, Note)]
    return next(iter([*noted, *details]), "no node to look at")


def judge_temp(where: str, path: str, free: int, size: int) -> str:
    """Whether a disk has room for Ray's session and for what does not fit Ray's memory.

    Raises:
        ClusterError: not for the session.
    """
    detail = f"{in_bytes(free)} free at {path} of {where}"
    if free < MIN_TEMP_BYTES:
        raise ClusterError(
            f"There are {detail}, and Ray needs {in_bytes(MIN_TEMP_BYTES)} there for its session. "
            "Free space, or set TMPDIR before Ray starts."
        )
    if free < (1 - SPILL_FRACTION) * size:
        return Note(
            f"{detail}, less than {1 - SPILL_FRACTION:.0%}: Ray refuses to put there what does not "
            "fit its shared memory"
        )
    return detail


def check_shared_memory(config: Config, facts: Mapping[Node, Facts], trains: bool) -> str:
    """Whether /dev/shm holds Ray's objects, and what NCCL passes between GPUs of a machine."""
    details = []
    for nodes in _by_host(facts):
        size = facts[nodes[0]].shm_bytes
        if size is None:
            continue  # no Linux: Ray keeps its objects elsewhere
        where = f"/dev/shm of node {nodes[0].address} has {in_bytes(size)}"
        store = sum(node.object_store_bytes for node in nodes)
        if size < store:
            return Note(
                f"{where}, and Ray's object store {in_bytes(store)}: Ray keeps it on disk, which "
                f"is slow. Give a container --shm-size={_gigabytes(store)}g"
            )
        uses_nccl = trains and config.train.use_gpu
        workers = sum(fits_on(config, node) for node in nodes)
        if (
            uses_nccl
            and min(workers, config.train.max_workers) > 1
            and size < NCCL_SHM_BYTES + store
        ):
            remedy = f"Give a container --shm-size={_gigabytes(store + NCCL_SHM_BYTES)}g"
            if store > STORE_GROWS * size:
                less = max(NCCL_SHM_BYTES, size - NCCL_SHM_BYTES) // len(nodes)
                remedy = f"Start Ray there with --object-store-memory={less}"
            return Note(
                f"{where}, and Ray's object store {in_bytes(store)}: NCCL should have "
                f"{in_bytes(NCCL_SHM_BYTES)} beside. {remedy}"
            )
        details.append(f"{where}, Ray's object store takes up to {in_bytes(store)}")
    more = f"; {len(details) - 1} more alike" if len(details) > 1 else ""
    return details[0] + more if details else "there is no /dev/shm to fill"


def check_collectives(config: Config, facts: Mapping[Node, Facts]) -> str:
    """Whether the workers can talk: torch has the backend, and gloo an address others reach.

    Raises:
        ClusterError: they cannot, and would wait for one another for minutes.
    """
    train = config.train
    backend = "nccl" if train.use_gpu else "gloo"
    takes_workers = {node: f for node, f in facts.items() if fits_on(config, node)}
    for node, f in takes_workers.items():
        if backend not in f.backends:
            build = "the CUDA build of torch (see the README)" if train.use_gpu else "torch"
            raise ClusterError(
                f"torch on node {node.address} has no {backend}, which workers use to agree. "
                f"Install {build} there."
            )
    hosts = list(_by_host(takes_workers))
    room = max((sum(fits_on(config, node) for node in nodes) for nodes in hosts), default=0)
    if backend == "gloo" and train.max_workers > 1 and len(hosts) > 1:
        for node, f in takes_workers.items():
            if f.interface or not (f.host_address or "127.").startswith("127."):
                continue
            fault = (
                f"The name of node {node.address}'s host means {f.host_address or 'no address'} "
                "there, and gloo would wait for others where they cannot reach it"
            )
            remedy = (
                "Correct /etc/hosts there, or set GLOO_SOCKET_IFNAME to the network interface "
                "before Ray starts there."
            )
            if room < train.min_workers:
                raise ClusterError(
                    f"{fault}; one host has room for {room} of {train.min_workers} workers. "
                    f"{remedy}"
                )
            return Note(f"{fault}, should workers be on several hosts. {remedy}")
    return f"{backend} is there on {count_of(len(takes_workers), 'node')}"


def check_gpus(
    config: Config, nodes: Sequence[Node], is_alone: bool, opens: bool, wanted: Sequence[str]
) -> str:
    """Whether torch sees the GPUs that Ray counts, and how their memory compares.

    Args:
        config: the whole config.
        nodes: that are alive.
        is_alone: whether Ray runs on this machine for this process.
        opens: whether to open the GPUs of this machine, to learn their memory.
        wanted: the settings that ask for them: train.use_gpu, evaluate.use_gpu.

    Raises:
        ClusterError: torch sees none on a node.
    """
    from pipeline.models import bytes_in_training

    if is_alone and not opens:
        import torch

        answers: dict[Node, Any] = {nodes[0]: [("GPU", None)] * torch.cuda.device_count()}
    elif is_alone:
        answers = {nodes[0]: look_at_gpus()}
    else:
        asked = [node for node in nodes if node.gpus]
        answers = ask(asked, look_at_gpus, lambda node: (), num_gpus=1)
    needed = bytes_in_training(config) if "train.use_gpu" in wanted else 0
    details, notes = [], []
    for node, answer in answers.items():
        if answer == BUSY:
            notes.append(f"the GPUs of node {node.address} are in use just now, and not looked at")
            continue
        if isinstance(answer, Exception) or not answer:
            why = f": {type(answer).__name__}" if isinstance(answer, Exception) else ""
            raise ClusterError(
                f"torch sees no GPU on node {node.address}, where Ray counts {node.gpus}{why}. "
                "Install the CUDA build of torch there (see the README) and a driver that fits "
                f"it, or set {' and '.join(f'{name} = false' for name in wanted)}."
            )
        name, memory = answer[0]
        if memory is not None and memory < needed:
            notes.append(
                f"{name} on node {node.address} has {in_bytes(memory)}, less than the "
                f"{in_bytes(needed)} of weights, gradients, AdamW and EMA"
            )
        size = f" of {in_bytes(memory)}" if memory is not None else ""
        details.append(f"{name}{size} on node {node.address}")
    if notes:
        return Note("; ".join(notes))
    if not details:  # which is told where GPUs are counted
        return "no node has a GPU to look at"
    more = f" and {len(details) - 1} more nodes alike" if len(details) > 1 else ""
    return f"torch sees {details[0]}{more}"


def _by_host(facts: Mapping[Node, Facts]) -> Iterator[list[Node]]:
    """The nodes of each machine: several may share one, and its /dev/shm."""
    hosts: dict[str, list[Node]] = defaultdict(list)
    for node, f in facts.items():
        hosts[f.host].append(node)
    return iter(hosts.values())


def _more(nodes: Collection[Node]) -> str:
    return f", nor do {len(nodes) - 1} more nodes" if len(nodes) > 1 else ""


def _gigabytes(num_bytes: int) -> int:
    """Whole gigabytes that hold it, as container tools count."""
    return -(-num_bytes // (1 << 30))
