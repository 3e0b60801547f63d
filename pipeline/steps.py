"""The steps of the workflow: what each depends on, in the order they run.

A step's version is raised by hand, here, when its code makes something else of the same
inputs; golden tests in `tests/test_steps.py` catch the change that forgets it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.settings import NOT_OF_THE_DATA_SET, Config, DataConfig
from pipeline.sources import Inputs, InputShard
from pipeline.subject_kinds import GivenImages, GivenModel, Rescored, Subject, data_of_images
from pipeline.units import units_of_step
from pipeline.workflow import Resources, Step

WHOLE_CLUSTER = Resources(cpus=1 << 20)  # many small tasks: as many at a time as there are CPUs
# Settings of training that change how fast, but not what is learned beyond rounding. A GPU has
# another precision where that is "auto": the checkpoints record it, and a change is said.
NOT_LEARNED = (
    "cpus_per_worker",
    "use_gpu",
    "compile",
    "checkpoint_every",
    "keep_every",
    "log_every",
    "validate_every",
    "sample_every",
    "fid_every",
    "fid_samples",
    "max_failures",
    "max_rewinds",
    "storage_patience_s",
)
# By which dropout drops other units: ranks, parts, GPUs and what is compiled draw their own.
OF_DROPOUT = ("num_workers", "accumulation_steps", "use_gpu", "compile")
# Settings of a search that change how fast, but not what is found.
NOT_SEARCHED = ("enabled", "max_concurrent", "train_steps", "num_steps")
# Settings of evaluation that the score of a trial depends on, by metric; noise is drawn anew
# behind that of the samples of `evaluate`, so that their number is one.
OF_TRIALS = {
    "fid": (
        "num_samples",
        "num_steps",
        "spacing",
        "eta",
        "clip_x_start",
        "guidance_scale",
        "seed",
        "interval_reference",
    ),
    "bits_per_dim": ("seed", "clip_x_start"),
}
STEP_NAMES = ("preprocess", "features", "reference", "train", "evaluate", "promote", "report")
START_TRAINING, START_WEIGHTS = "start.training", "start.weights"  # settings of a warm start


@dataclass(frozen=True)
class Start:
    """The training whose EMA weights another one begins with.

    Args:
        training: the key of its step `train`.
        weights: the SHA-256 of the weights.
    """

    training: str
    weights: str


def make_steps(
    config: Config,
    shards: Sequence[InputShard],
    extractor: Mapping[str, str] | None = None,
    subject: Subject | None = None,
    *,
    start: Start | None = None,
    evaluation: int = 0,
    listed: Inputs | None = None,
) -> list[Step]:
    """The workflow of a config over its shards.

    Args:
        config: the whole config.
        shards: the input shards with their hashes.
        extractor: the hashes of its files, from `identify_extractor`.
        subject: what is evaluated in place of the config's training; then the workflow ends there.
        start: what training begins from; random weights if not given.
        evaluation: the number of the one that the model pins, where it has any.
        listed: the input that `preprocess` keeps to; it lists it itself if not given.
    """
    train = config.train
    # The most that an elastic training may take: nothing runs beside it that it would wait for.
    # Whether the fewest fit is for the preflight to say.
    workers = train.max_workers
    scoring = _section(config, "evaluate")
    del scoring["evaluate.use_gpu"]
    of_data_set = _preprocess_settings(config.data, shards)
    steps = [
        Step(
            name="preprocess",
            version=5,
            function="pipeline.preprocess:preprocess",
            settings=of_data_set,
            resources=WHOLE_CLUSTER,
            given=listed,
            parts=units_of_step(of_data_set),
        ),
        _features_step(config, extractor or {}),
        Step(
            name="reference",
            version=3,
            function="pipeline.reference:measure_reference",
            settings={},
            inputs=("preprocess", "features"),
            resources=WHOLE_CLUSTER,
        ),
        Step(
            name="train",
            version=3,
            function="pipeline.train:train",
            settings=train_settings(config) | _start_settings(start),
            inputs=("preprocess",),
            after=() if train.fid_every is None else ("features", "reference"),
            resources=Resources(
                cpus=workers * train.cpus_per_worker + (train.fid_every is not None),
                gpus=workers if train.use_gpu else 0,
            ),
            extensible="train.num_steps",
        ),
    ]
    evaluated = ("preprocess", "features", "reference")
    evaluate = Step(
        name="evaluate",
        version=_evaluate_version(config.model.class_conditional),
        function="pipeline.evaluate:evaluate",
        settings=scoring,
        inputs=(*evaluated, "train"),
        resources=WHOLE_CLUSTER,
    )
    # What near-copies are looked for among; of the config's training it is part of its key.
    mirrored = {"train.horizontal_flip": train.horizontal_flip}
    match subject:
        case Rescored(program=program):
            settings = {**evaluate.settings, "program": dict(program)}
            return [*steps, replace(evaluate, settings=settings)]
        case GivenModel(key=key, class_conditional=is_told):
            settings = {**evaluate.settings, **mirrored, "model_key": key}
            version = _evaluate_version(is_told)
            evaluate = replace(evaluate, version=version, settings=settings, inputs=evaluated)
            return [*steps, evaluate, _evaluation_page(evaluate, f"{config.name}: model {key[:8]}")]
        case GivenImages(sources=sources, shards=given, converts=converts):
            of_images = _preprocess_settings(data_of_images(config, sources), given)
            images = Step(
                name="images",
                version=3,
                function="pipeline.given_images:preprocess_images",
                settings=of_images | {"sources": list(sources)},
                resources=WHOLE_CLUSTER,
                parts=units_of_step(of_images),
            )
            converted = {"converts": True} if converts else {}
            settings = {**evaluate.settings, **mirrored, **converted}
            version, inputs = _evaluate_version(False), (*evaluated, "images")
            evaluate = replace(evaluate, version=version, settings=settings, inputs=inputs)
            # Their number is that of the samples, and too few are said at once.
            preprocess, features, *others = steps
            features = replace(features, after=(*features.after, "images"))
            page = _evaluation_page(evaluate, f"{config.name}: {', '.join(sources)}")
            return [preprocess, images, features, *others, evaluate, page]
    return [
        *steps[:-1],
        _tune_step(config),
        steps[-1],
        evaluate,
        Step(
            name="promote",
            version=3,
            function="pipeline.gate:promote",
            settings=_promote_settings(config, evaluation),
            inputs=("preprocess", "features", "reference", "train", "evaluate"),
        ),
        Step(
            name="report",
            version=1,
            function="pipeline.report.page:report",
            settings={},
            inputs=("preprocess", "features", "reference", "train", "evaluate", "promote"),
        ),
    ]


def _evaluate_version(is_told: bool) -> int:
    """7: a network that is told the class has its labels drawn; others are as before."""
    return 7 if is_told else 5


def train_settings(config: Config) -> dict[str, Any]:
    """What determines a training, but its data set."""
    train = _section(config, "train")
    learned = OF_DROPOUT if config.model.dropout > 0 else ()
    for key in {*NOT_LEARNED, *OF_DROPOUT}.difference(learned):
        del train[f"train.{key}"]
    if config.train.learning_rate_decay == "cosine":  # one that ends elsewhere is another
        train["train.decay_steps"] = config.train.num_steps
    diffusion = _section(config, "diffusion")
    if not config.diffusion.zero_terminal_snr:  # keys from before there was such a setting hold
        del diffusion["diffusion.zero_terminal_snr"]
    return _section(config, "model") | diffusion | train | _order(config)


def _start_settings(start: Start | None) -> dict[str, str]:
    """Nothing where training begins anew: its keys are those from before there was a choice."""
    return {} if start is None else {START_TRAINING: start.training, START_WEIGHTS: start.weights}


def _promote_settings(config: Config, evaluation: int) -> dict[str, Any]:
    """The gate's. A version is judged again once the model pins another evaluation.

    The first is pinned by the first version, whose step must be found again.
    """
    pinned = {"evaluation": evaluation} if evaluation > 1 else {}
    rules = _section(config, "promote")
    if config.promote.unchecked_copies == "keep":  # keys from before there was a choice hold
        del rules["promote.unchecked_copies"]
    return {"name": config.name} | rules | pinned


def _order(config: Config) -> dict[str, Any]:
    """The order of items; without a window the keys are those from before there was one."""
    window = config.data.shuffle_window
    return {} if window is None else {"data.shuffle_window": window}


def _section(config: Config, name: str) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in getattr(config, name)}


def _tune_step(config: Config) -> Step:
    """The search; no input of the others: what follows is planned from the winner's config."""
    metric = config.tune.metric
    settings = {f"tune.{k}": v for k, v in config.tune.model_dump(mode="json").items()}
    for key in NOT_SEARCHED:
        del settings[f"tune.{key}"]
    settings |= train_settings(config) | {"train.num_steps": config.trial_steps}
    if config.train.learning_rate_decay == "cosine":
        settings["train.decay_steps"] = config.trial_steps
    scoring = _section(config, "evaluate")
    scoring["evaluate.num_steps"] = config.tune.num_steps or config.evaluate.num_steps
    settings |= {f"evaluate.{name}": scoring[f"evaluate.{name}"] for name in OF_TRIALS[metric]}
    return Step(
        name="tune",
        version=3,
        function="pipeline.tune.experiment:tune",
        settings=settings,
        inputs=("preprocess", "features", "reference"),
        resources=WHOLE_CLUSTER,
    )


def _evaluation_page(evaluate: Step, title: str) -> Step:
    """The report of something else than the config's training."""
    return Step(
        name="report",
        version=1,
        function="pipeline.report.page:report_evaluation",
        settings={"title": title},
        inputs=(*evaluate.inputs, "evaluate"),
    )


def _preprocess_settings(data: DataConfig, shards: Sequence[InputShard]) -> dict[str, Any]:
    """What determines a data set: the transform, and the input by content."""
    transform = data.model_dump(mode="json", exclude=NOT_OF_THE_DATA_SET)
    return {f"data.{key}": value for key, value in transform.items()} | {
        "shards": {shard.name: shard.sha256 or "unread" for shard in shards}
    }


def _features_step(config: Config, extractor: Mapping[str, str]) -> Step:
    """Keyed by the data set where the extractor learns from it, else by the files that make it."""
    features = config.features
    settings: dict[str, Any] = {
        "features.extractor": features.extractor,
        "features.width": features.num_features,
    }
    if features.is_trained:
        names = ("num_steps", "batch_size", "learning_rate", "seed")
        settings |= {f"features.{name}": getattr(features, name) for name in names}
        settings |= _order(config)
    else:
        settings |= {"data.shape": list(config.data.shape), **extractor}
        if features.is_own:
            settings["features.seed"] = features.seed
    return Step(
        name="features",
        version=2,
        function="pipeline.features:make_extractor",
        settings=settings,
        inputs=("preprocess",) if features.is_trained else (),
        after=() if features.is_trained else ("preprocess",),  # too few images are said at once
        resources=Resources(cpus=1),
    )
