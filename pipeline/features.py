"""The step `features`: the extractor of the score, one of those in `extractors/`."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import DataError
from pipeline.extractor_identity import WEIGHTS, read_weights
from pipeline.extractors import ARTIFACT, classifier, inception, own, self_supervised
from pipeline.extractors.training import check_accuracy
from pipeline.settings import Config
from pipeline.tasks import send_task
from pipeline.workflow import StepContext

SAMPLES_PER_FEATURE = 10  # with fewer a covariance is mostly noise


def make_extractor(context: StepContext) -> dict[str, Any]:
    """Trains, loads or calls the extractor, and keeps its weights; what is told of it.

    Raises:
        DataError: there are too few images, no labels, or the weights cannot be read.
        EvaluationError: the extractor cannot be made, or has learned too little.
    """
    config, data = context.config, context.inputs["preprocess"]
    features = config.features
    num_samples = None
    if "images" in context.inputs:  # that are scored in place of samples
        num_samples = context.inputs["images"]["metrics"]["counts"]["train"]
    check_counts(config, data["metrics"]["counts"], num_samples=num_samples)
    if features.is_trained and not data["metrics"]["counts"]["validation"]:
        raise DataError(
            f"The extractor {features.extractor} is judged on the validation split, which has no "
            "images. Raise data.validation_fraction."
        )
    weights = None
    if features.weights is not None:
        weights = read_weights(features, context.planned.step.settings[WEIGHTS])
    sections = (features.model_dump_json(), config.data.model_dump_json())
    send = (context.planned.step.resources, context.storage.uri, dict(data), *sections)
    match features.extractor:
        case "classifier":
            classifier.check_labels(data)
            facts = send_task(classifier.train_classifier, *send)
            check_accuracy(facts, classifier.REMEDY)
        case "self_supervised":
            facts = send_task(self_supervised.train_self_supervised, *send)
            check_accuracy(facts, self_supervised.REMEDY)
        case "inception":
            facts = send_task(
                inception.make_inception,
                context.planned.step.resources,
                features.num_features,
                config.data.channels,
                weights,
                features.weights_sha256,
            )
        case name:
            facts = send_task(
                own.make_own,
                context.planned.step.resources,
                name,
                config.data.shape,
                features.width,
                weights,
                features.seed,
            )
    context.write_artifact(ARTIFACT, facts.pop("weights"))
    told = f"{features.extractor}, {facts['num_features']:,} features"
    if facts["validation_accuracy"] is not None:
        told += f", held-out accuracy {facts['validation_accuracy']:.1%}"
    context.note(told)
    return facts


def check_counts(
    config: Config,
    counts: Mapping[str, int],
    num_features: int | None = None,
    num_samples: int | None = None,
) -> None:
    """Refuses a score whose floor would have fewer images, or of few samples or test images.

    Args:
        config: the whole config.
        counts: of the images by split.
        num_features: of the extractor; what the config says of it where not given.
        num_samples: that are scored; what the config says where not given.

    Raises:
        DataError: too few training images, test images or samples.
    """
    num_features = num_features or config.features.num_features or 0
    remedy = "Give fewer images."
    if num_samples is None:
        num_samples = config.evaluate.num_samples
        remedy = "Lower evaluate.num_samples, or train on more images."
    if counts["train"] < num_samples:
        raise DataError(
            f"The floor of the score needs as many training images as there are samples, "
            f"{num_samples:,}, and there are {counts['train']:,}. {remedy}"
        )
    if min(counts["test"], num_samples) < 2:
        raise DataError(
            f"A score needs two samples and two test images at least, and there are {num_samples} "
            f"and {counts['test']}. Give more."
        )
    if config.evaluate.allow_few_samples:
        return
    needed = SAMPLES_PER_FEATURE * num_features
    if counts["test"] < needed:
        raise DataError(
            f"The reference of the score needs 10 x features.width = {needed} test images, and "
            f"there are {counts['test']}. Raise data.test_fraction, lower features.width, or set "
            "evaluate.allow_few_samples."
        )
    if num_samples < needed:
        raise DataError(
            f"A score in {num_features:,} features needs {needed:,} samples, and there are "
            f"{num_samples:,}. Make more, take fewer features, or set evaluate.allow_few_samples, "
            "and the score's name will say so."
        )
