"""The steps of the workflow: what each depends on, in the order they run.

A step's version is raised by hand, here, when its code makes something else of the same
inputs; golden tests in `tests/test_steps.py` catch the change that forgets it.
"""

from collections.abc import Sequence

from pipeline.config import Config
from pipeline.sources import InputShard
from pipeline.workflow import Resources, Step

STEP_NAMES = ("preprocess", "features", "reference", "train", "evaluate", "promote", "report")


def make_steps(config: Config, shards: Sequence[InputShard], cpus: int) -> list[Step]:
    """The workflow of a config over its shards.

    Args:
        config: the whole config.
        shards: the input shards with their hashes.
        cpus: of the cluster: what steps that can use more than one may use.
    """
    data = config.data.model_dump(mode="json", exclude={"sources"})
    train = config.train
    workers = train.num_workers
    few = Resources(cpus=min(2, cpus))
    sections = {
        name: {f"{name}.{key}": value for key, value in getattr(config, name)}
        for name in ("model", "diffusion", "train", "features", "evaluate")
    }
    # What changes how fast, but not what is learned.
    for key in ("cpus_per_worker", "use_gpu", "checkpoint_every", "max_failures", "num_workers"):
        del sections["train"][f"train.{key}"]
    return [
        Step(
            name="preprocess",
            version=1,
            function="pipeline.preprocess:preprocess",
            settings={f"data.{key}": value for key, value in data.items()}
            | {"shards": {shard.name: shard.sha256 for shard in shards}},
            resources=Resources(cpus=1),
        ),
        Step(
            name="features",
            version=1,
            function="pipeline.features:train_extractor",
            settings=sections["features"],
            inputs=("preprocess",),
            resources=few,
        ),
        Step(
            name="reference",
            version=1,
            function="pipeline.features:measure_reference",
            settings={},
            inputs=("preprocess", "features"),
            resources=few,
        ),
        Step(
            name="train",
            version=1,
            function="pipeline.train:train",
            settings=sections["model"] | sections["diffusion"] | sections["train"],
            inputs=("preprocess",),
            resources=Resources(
                cpus=workers * train.cpus_per_worker, gpus=workers if train.use_gpu else 0
            ),
            extensible="train.num_steps",
        ),
        Step(
            name="evaluate",
            version=1,
            function="pipeline.evaluate:evaluate",
            settings=sections["evaluate"],
            inputs=("preprocess", "features", "reference", "train"),
            resources=Resources(cpus=cpus),
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
