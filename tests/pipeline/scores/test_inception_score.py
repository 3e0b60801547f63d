import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.inception import InceptionScore

from pipeline.scores.inception_score import inception_score


def draw(seed: int, count: int = 60, num_classes: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (count, num_classes)).astype(np.float32)


def test_agrees_with_torchmetrics() -> None:
    logits = draw(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its buffer, and of the spread over one split
        metric = InceptionScore(torch.nn.Identity(), splits=1)
        metric.update(torch.from_numpy(logits).double())
        theirs = float(metric.compute()[0])
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-6)


def test_is_1_where_all_samples_are_alike_and_the_number_of_classes_at_most() -> None:
    assert inception_score(np.tile(draw(1)[:1], (9, 1))) == pytest.approx(1)
    sure = 1e4 * np.eye(5, dtype=np.float32)  # whose exponentials would overflow
    assert inception_score(sure) == pytest.approx(5)


@given(seed=st.integers(0, 1000), count=st.integers(1, 20), scale=st.floats(0, 100))
def test_lies_between_1_and_the_number_of_classes(seed: int, count: int, scale: float) -> None:
    assert 1 - 1e-9 <= inception_score(scale * draw(seed, count)) <= 5 + 1e-9
