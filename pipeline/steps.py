"""The steps of the workflow: what each depends on, in the order they run.

A step's version is raised by hand, here, when its code makes something else of the same
inputs; golden tests in `tests/test_steps.py` catch the change that forgets it.
"""

from collections.abc import Sequence

from pipeline.settings import NOT_OF_THE_DATA_SET, Config
from pipeline.sources import InputShard
from pipeline.workflow import Resources, Step

WHOLE_CLUSTER = Resources(cpus=1 << 20)  # many small tasks: as many at a time as there are CPUs
# Settings of training that change how fast, but not what is learned beyond rounding.
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
STEP_NAMES = ("preprocess", "features", "reference", "train", "evaluate", "promote", "report")


def make_steps(config: Config, shards: Sequence[InputShard]) -> list[Step]:
    """The workflow of a config over its shards.

    Args:
        config: the whole config.
        shards: the input shards with their hashes.
    """
    data = config.data.model_dump(mode="json", exclude=NOT_OF_THE_DATA_SET)
    train = config.train
    # The most that an elastic training may take: nothing runs beside it that it would wait for.
    # Whether the fewest fit is for the preflight to say.
    workers = train.max_workers
    sections = {
        name: {f"{name}.{key}": value for key, value in getattr(config, name)}
        for name in ("model", "diffusion", "train", "features", "evaluate")
    }
    # The order of items; without a window the keys are those from before there was one.
    window = config.data.shuffle_window
    order = {} if window is None else {"data.shuffle_window": window}
    for key in NOT_LEARNED:
        del sections["train"][f"train.{key}"]
    for key in ("num_workers", "accumulation_steps"):
        if config.model.dropout == 0:  # else each rank and part drops other units
            del sections["train"][f"train.{key}"]
    if train.learning_rate_decay == "cosine":  # one that ends elsewhere is another from the start
        sections["train"]["train.decay_steps"] = train.num_steps
    return [
        Step(
            name="preprocess",
            version=3,
            function="pipeline.preprocess:preprocess",
            settings={f"data.{key}": value for key, value in data.items()}
            | {"shards": {shard.name: shard.sha256 or "unread" for shard in shards}},
            resources=WHOLE_CLUSTER,
        ),
        Step(
            name="features",
            version=1,
            function="pipeline.features:train_extractor",
            settings=sections["features"] | order,
            inputs=("preprocess",),
            resources=Resources(cpus=1),
        ),
        Step(
            name="reference",
            version=1,
            function="pipeline.features:measure_reference",
            settings={},
            inputs=("preprocess", "features"),
            resources=Resources(cpus=1),
        ),
        Step(
            name="train",
            version=3,
            function="pipeline.train:train",
            settings=sections["model"] | sections["diffusion"] | sections["train"] | order,
            inputs=("preprocess",),
            after=() if train.fid_every is None else ("features", "reference"),
            resources=Resources(
                cpus=workers * train.cpus_per_worker + (train.fid_every is not None),
                gpus=workers if train.use_gpu else 0,
            ),
            extensible="train.num_steps",
        ),
        Step(
            name="evaluate",
            version=3,
            function="pipeline.evaluate:evaluate",
            settings=sections["evaluate"],
            inputs=("preprocess", "features", "reference", "train"),
            resources=WHOLE_CLUSTER,
        ),
        Step(
            name="promote",
            version=1,
            function="pipeline.registry:promote",
            settings={"name": config.name},
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
