"""Whether what a config makes can be judged beside a champion: asked before anything is trained.

A score under the pinned evaluation (`pinning.py`) compares with the champion's where both are of
one protocol, where the images are chosen and made as the reference's were, and where neither
network was trained on images that the reference tests with. Splits are by a hash of content, so
that the fractions alone tell which images of one data set may be in which split of another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.driver import Basis, bring_about
from pipeline.errors import ConfigError
from pipeline.lineage import ancestors
from pipeline.pinning import find_score, pinned_manifests, pinned_protocol, read_step
from pipeline.registry import Registry
from pipeline.settings import Config
from pipeline.sources import InputShard
from pipeline.steps import Start, make_steps
from pipeline.storage import Storage
from pipeline.units import read_units
from pipeline.workflow import Observer

OF_THE_NETWORK = ("objective", "self_condition", "learned_variance")  # of the section diffusion
# Settings of a data set that neither choose its images nor change them, but for limits beyond which
# images are refused.
NOT_OF_THE_IMAGES = {
    "data.validation_fraction",
    "data.test_fraction",
    "data.label_field",
    "data.shard_bytes",
    "data.max_bad_fraction",
    "data.max_pixels",
}


def check_comparable(
    registry: Registry,
    config: Config,
    champion: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
) -> None:
    """Refuses a cycle at whose end nothing could be compared, or a score would be flattered.

    A champion that merely has no score yet is no reason: the cycle scores it (`rescore.py`).

    Args:
        registry: of the model.
        config: of the cycle.
        champion: the version that is in use, if any is.
        evaluation: the pinned one.

    Raises:
        ConfigError: with the settings that differ, and what to do.
        StorageError: a manifest that the registry names is gone.
    """
    pinned = pinned_manifests(registry.storage, evaluation)
    key = pinned["reference"]["identity"]["inputs"]["preprocess"]
    theirs = read_step(registry.storage, "preprocess", key)["identity"]["settings"]
    _check_settings(registry, config, champion, evaluation, pinned, theirs)
    test_fraction, trained_above = theirs["data.test_fraction"], _held_out(config)
    if trained_above < test_fraction:
        raise ConfigError(
            f"data.test_fraction + data.validation_fraction = {trained_above:g} has images trained "
            f"on that evaluation {evaluation['number']}, which {registry.name} pins, tests with: "
            f"its data.test_fraction is {test_fraction:g}. Raise them together to that at least, "
            "or run `raydiffusion accept-reference CONFIG`."
        )
    if champion is not None:
        check_champion(
            registry,
            champion,
            test_fraction,
            of=f"evaluation {evaluation['number']}",
            remedy="Promote another version or roll back, or lower data.test_fraction to that and "
            "run `raydiffusion accept-reference CONFIG`.",
        )


def check_champion(
    registry: Registry, champion: Mapping[str, Any], test_fraction: float, *, of: str, remedy: str
) -> None:
    """Refuses a champion that was trained on test images, or goes on with a network that was.

    Args:
        registry: of the model.
        champion: the version.
        test_fraction: of the data set whose test images judge it.
        of: names that data set, for people.
        remedy: one sentence.

    Raises:
        ConfigError: its score would be flattered.
    """
    for version in (champion, *ancestors(champion, registry.versions())):
        data = version["config"]["data"]
        if (held_out := data["test_fraction"] + data["validation_fraction"]) < test_fraction:
            raise ConfigError(
                f"Version {champion['number']}, the champion of {registry.name}, was trained on "
                f"test images of {of}, and its score would flatter it: data.test_fraction is "
                f"{test_fraction:g} there, and version {version['number']} held out {held_out:g} "
                f"in all. {remedy}"
            )


def expected_protocol(
    config: Config, storage: Storage, pinned: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The protocol of the scores that a config gives under pinned results.

    Args:
        config: of the cycle.
        storage: the root.
        pinned: the manifests of `features` and `reference`.

    Raises:
        StorageError: the data set of the reference is gone or damaged.
    """
    from pipeline.evaluate import REFERENCE_SPLIT  # torch: not where nothing is new
    from pipeline.label_mix import mix_protocol, read_mix
    from pipeline.protocol import make_protocol, sampling_protocol

    mix, is_told = {}, config.model.class_conditional
    if is_told:
        mix = mix_protocol(read_mix(storage, pinned["reference"]))
    return make_protocol(
        config,
        pinned["features"],
        pinned["reference"],
        split=REFERENCE_SPLIT,
        num_samples=config.evaluate.num_samples,
        sampling=sampling_protocol(config, is_told=is_told) | mix,
    )


def check_classes(
    storage: Storage,
    config: Config,
    new: Sequence[InputShard],
    basis: Basis,
    *,
    observer: Observer,
) -> None:
    """Preprocesses, and refuses classes that the network to begin with, or the judge, has not.

    Args:
        storage: the root.
        config: of the cycle.
        new: its new shards.
        basis: of the cycle.
        observer: told what happens.

    Raises:
        ConfigError: with the classes, and the new shards that bring them.
        RaydiffusionError: of preprocessing.
    """
    if not config.model.class_conditional:
        return
    from pipeline.label_mix import compare_classes  # torch: not where nothing is new

    data = bring_about(config, ("preprocess",), basis=basis, observer=observer)["preprocess"]
    units = zip(new, read_units(storage, new, config.data), strict=True)
    compare_classes(
        storage,
        data,
        reference=basis.pinned["reference"],
        start=basis.start and read_step(storage, "train", basis.start.training),
        bringing={
            shard.name: [label for facts in unit["splits"].values() for label in facts["labels"]]
            for shard, unit in units
        },
    )


def start_from(config: Config, champion: Mapping[str, Any]) -> Start | None:
    """The champion's training, where the cycle is to begin with it and can.

    Args:
        config: of the cycle.
        champion: the version that is in use.

    Raises:
        ConfigError: its network is another than the config's.
    """
    if config.retrain.start == "scratch":
        return None
    wanted, theirs = config.model_dump(mode="json"), champion["config"]
    differing = [
        f"{section}.{name}"
        for section, names in (("model", wanted["model"]), ("diffusion", OF_THE_NETWORK))
        for name in names
        if wanted[section][name] != theirs[section].get(name, wanted[section][name])
    ]
    if differing:
        raise ConfigError(
            f'retrain.start = "champion" goes on with the network of version '
            f"{champion['number']}, and the config has another {', '.join(differing)}. Set "
            'retrain.start = "scratch", or set it back.'
        )
    return Start(champion["lineage"]["train"], champion["weights"])


def _check_settings(
    registry: Registry,
    config: Config,
    champion: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    pinned: Mapping[str, Mapping[str, Any]],
    theirs: Mapping[str, Any],
) -> None:
    from pipeline.protocol import differing_settings

    (ours,) = (s.settings for s in make_steps(config, []) if s.name == "preprocess")
    differing = [
        name
        for name, value in ours.items()
        if name.startswith("data.")
        and name not in NOT_OF_THE_IMAGES
        and theirs.get(name, value) != value
    ]
    if not differing and champion is not None:
        expected = expected_protocol(config, registry.storage, pinned)
        if find_score(registry, champion, expected) is None:
            differing = differing_settings(expected, pinned_protocol(registry, evaluation))
    if differing:
        other = "run `raydiffusion accept-reference CONFIG`, which scores the champion again"
        raise ConfigError(
            f"Scores of this config would not compare with those under evaluation "
            f"{evaluation['number']}, which {registry.name} pins: they differ in "
            f"{', '.join(differing)}. Set these back, or "
            f"{'give the model another name' if champion is None else other}."
        )


def _held_out(config: Config) -> float:
    return config.data.test_fraction + config.data.validation_fraction
