"""What the target of a command stands for: a finished training, or the run to look at.

A target is a config (`my.toml`), whose own training and run are meant, or a model of the registry:
`NAME` is its champion, `NAME@3` its version 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import command_line, load_config, override_config, parse_config
from pipeline.cycles import last_cycle
from pipeline.driver import make_plan
from pipeline.errors import ConfigError
from pipeline.pinning import read_step
from pipeline.registry import Registry, open_registry
from pipeline.runs import list_runs, read_run
from pipeline.settings import Config
from pipeline.storage import Storage, open_storage
from pipeline.workflow import read_manifest

SUFFIX = ".toml"  # of configs


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        name: as the target was given; of a champion with its number.
        storage: the root.
        config: that it was trained with, and is sampled with.
        data: the key of its step `preprocess`.
        train: the manifest of its step `train`.
    """

    name: str
    storage: Storage
    config: Config
    data: str
    train: Mapping[str, Any]


def find_trained(target: str, overrides: Sequence[str] = (), *, root: str = "runs") -> Trained:
    """The finished training that a target stands for.

    Args:
        target: a config, `NAME` or `NAME@VERSION`.
        overrides: `a.b=c` of the config; of a version, those of `evaluate` alone.
        root: the storage root of a model's name.

    Raises:
        ConfigError: the config is wrong or its training not finished; or there is no such version.
        StorageError: the root cannot be read, or what the registry names is gone.
    """
    if target.endswith(SUFFIX):
        return _of_config(target, overrides)
    return _of_version(target, overrides, open_storage(root))


def _of_config(target: str, overrides: Sequence[str]) -> Trained:
    config = load_config(target, overrides)
    planned = make_plan(config, ("train",))
    steps = {p.step.name: p for p in planned.steps}
    manifest = read_manifest(planned.storage, "train", steps["train"].key)
    if manifest is None:
        champion = Registry(planned.storage, config.name).champion()
        other = (
            f", or name the model: {config.name} is its champion, version {champion['number']} "
            f"below {planned.storage.uri}"
            if champion is not None
            else ""
        )
        raise ConfigError(
            f"The training of {target} is not finished: {steps['train'].reason}. "
            f"Run `raydiffusion {command_line('train', target, overrides)}` first{other}."
        )
    return Trained(target, planned.storage, planned.config, steps["preprocess"].key, manifest)


def _of_version(target: str, overrides: Sequence[str], storage: Storage) -> Trained:
    name, at, number = target.partition("@")
    if at and not number.isdecimal():
        raise ConfigError(f"{target} names no version. Write NAME@3, or NAME for the champion.")
    if wrong := [text for text in overrides if not text.startswith("evaluate.")]:
        raise ConfigError(
            f"--set {wrong[0].partition('=')[0]} cannot be set for a version, which is trained "
            "already; settings of evaluate can. Leave it out, or give a config."
        )
    registry = open_registry(storage, name)
    version = registry.version(int(number)) if at else registry.champion()
    if version is None:
        raise ConfigError(
            f"The model {name} has no champion. Name a version, as {name}@"
            f"{registry.versions()[-1]['number']}, or promote one."
        )
    said = f"{name}@{version['number']}"
    config = parse_config(version["config"], said)
    place = config.storage.model_copy(update={"root": storage.uri})
    config = override_config(config.model_copy(update={"storage": place}), overrides)
    train = read_step(storage, "train", version["lineage"]["train"])
    return Trained(said, storage, config, version["lineage"]["preprocess"], train)


def find_run(config: Config) -> tuple[Storage, str, dict[str, Any] | None]:
    """The run of a config to look at: its own or a retraining cycle's, whichever began last.

    Args:
        config: the whole config.

    Returns:
        The storage root; the run's name, of which there may be no record; and the last cycle of
        the model, with its `outcome`, or None.

    Raises:
        DataError: a source matches nothing or cannot be read.
        StorageError: the root cannot be read.
    """
    planned = make_plan(config, read_remote=False)
    storage, registry = planned.storage, Registry(planned.storage, config.name)
    wanted = {planned.run, *(outcome["run"] for outcome in registry.records("outcomes"))}
    known, cycle = list_runs(storage), last_cycle(registry)
    if cycle is not None and cycle["outcome"] is None:
        wanted.add(_latest_since(storage, known, config.name, cycle["time"]))
    found = [run for run in known if run in wanted]
    if cycle is not None:
        cycle.pop("files", None)  # of loose images there may be very many
    return storage, found[-1] if found else planned.run, cycle


def _latest_since(storage: Storage, known: Sequence[str], name: str, time: float) -> str | None:
    """The latest run of a model, where it began after that time: that of a cycle that goes on."""
    for run in reversed(known):
        document = read_run(storage, run)
        if document["name"] == name:
            return run if document["executions"][-1]["started"] >= time else None
    return None
