"""What is drawn for the eye: the ends of each strip are what they are said to be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import pictures
from pipeline.config import load_config
from pipeline.copy_search import Copies
from pipeline.dataset import open_split
from pipeline.gallery import Gallery
from pipeline.pictures import draw_pictures
from pipeline.sampling import draw_labels, quantise, sample_items
from pipeline.scores.copies import CopyCheck
from pipeline.scores.degenerate import DegenerateCounts
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage
from pipeline.subjects import Source, load_network
from pipeline.workflow import StepContext, plan

RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 256, (10, 1, 8, 8), np.uint8)
LABELS = [0, 1, 2, 2, 1, 0, 0, 1, 2, 0]
SAMPLES = RNG.integers(0, 256, (64, 1, 8, 8), np.uint8)
GALLERY = Gallery(DegenerateCounts(64, 0, 0), SAMPLES, SAMPLES, tuple(range(64)), {2: SAMPLES[:8]})


@pytest.fixture
def context(
    tmp_path: Path,
    tiny_config: Path,
    write_data_set: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> StepContext:
    """Of the step `evaluate`, over a data set whose test split is REAL."""
    real_open = open_split

    def opened(storage: Any, data: Any, split: str, **options: Any) -> Any:
        assert split == "test"
        return real_open(storage, data, "validation", **options)

    monkeypatch.setattr(pictures, "open_split", opened)
    monkeypatch.setattr(pictures, "send_task", lambda function, resources, *args: function(*args))
    config = load_config(tiny_config, ["evaluate.num_steps=5"])
    storage = LocalStorage(str(tmp_path / "root"))
    items = np.concatenate([REAL, REAL])
    data = write_data_set(storage, items, LABELS * 2, num_validation=len(REAL))
    planned = {p.step.name: p for p in plan(make_steps(config, []), storage)}
    inputs = {"preprocess": data}
    return StepContext(config, storage, planned["evaluate"], inputs, lambda event: None)


@pytest.mark.parametrize("counts", [None, {"0": 1, "1": 1, "2": 1}])
def test_strips_begin_and_end_where_they_say(
    context: StepContext, counts: dict[str, int] | None
) -> None:
    source = Source("untrained", counts=counts, num_timesteps=1000)
    found = draw_pictures(context, source, GALLERY, None)
    strips = {f"interpolation-{k}" for k in range(3)}
    assert set(found) == {"samples", "real", "class-2", "noising", "denoising"} | strips
    assert np.array_equal(found["real"], REAL)
    for k in range(3):
        strip = found[f"interpolation-{k}"]
        assert strip.shape == (10, 1, 8, 8)
        assert np.array_equal(strip[[0, -1]], REAL[[2 * k, 2 * k + 1]])
    noising = found["noising"].astype(int)
    away = np.abs(noising - REAL[0]).mean((1, 2, 3))
    assert away[0] < 5
    assert away[-1] > 5 * away[0]
    network = load_network(context.storage, context.config, source)
    labels = None
    if network.counts is not None:
        labels = draw_labels(network.counts, context.config.evaluate.seed, range(1))
    first = sample_items(
        context.config, network.model, range(1), diffusion=network.diffusion, class_labels=labels
    )
    assert np.array_equal(found["denoising"][-1], quantise(first)[0])
    assert len(found["denoising"]) == context.config.evaluate.num_steps


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        (None, None),
        ({"0": 1, "1": 1, "2": 1}, [0] * 4 + [1] * 4),
        ({"1": 1, "2": 1}, None),  # a test image is of a class that training never saw
    ],
)
def test_a_network_is_told_the_class_of_the_nearer_end(
    context: StepContext,
    monkeypatch: pytest.MonkeyPatch,
    counts: dict[str, int] | None,
    told: list[int] | None,
) -> None:
    real_interpolate, labels, noised_to = pictures.interpolate, [], []

    def interpolate(*arguments: Any, class_labels: Any, t: int, **options: Any) -> Any:
        labels.append(None if class_labels is None else class_labels.tolist())
        noised_to.append(t)
        return real_interpolate(*arguments, class_labels=class_labels, t=t, **options)

    monkeypatch.setattr(pictures, "interpolate", interpolate)
    draw_pictures(context, Source("untrained", counts=counts, num_timesteps=1000), GALLERY, None)
    assert labels[0] == told
    assert noised_to == [50] * 3  # half of T


def test_images_that_were_given_have_no_strips(context: StepContext) -> None:
    check = CopyCheck(0.5, 0.5, 0.1, 0, 0.0, 0.0, 1.0, False, (1.0,) * 64, (0,) * 64)
    copies = Copies(check, tuple(range(64)), (3,), SAMPLES[3:4], REAL[None, :5])
    found = draw_pictures(context, Source("images"), GALLERY, copies)
    assert set(found) == {"samples", "real", "class-2", "copied", "neighbours"}
    assert np.array_equal(found["copied"], SAMPLES[3:4])
    assert np.array_equal(found["neighbours"], REAL[None, :5])
