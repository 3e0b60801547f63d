import warnings

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.scores import kernel
from pipeline.scores.kernel import kernel_distance


def draw(seed: int, count: int, shift: float = 0, num_features: int = 4) -> np.ndarray:
    features = np.random.default_rng(seed).normal(size=(count, num_features)) + shift
    return features.astype(np.float32)


def value(real: np.ndarray, generated: np.ndarray) -> float:
    found = kernel_distance(real, generated)
    assert found is not None
    return found.value


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_agrees_with_torchmetrics_over_all_pairs(shift: float) -> None:
    real, generated = draw(0, 80), draw(1, 80, shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its buffer
        metric = KernelInceptionDistance(torch.nn.Identity(), subsets=1, subset_size=80)
    for features, is_real in ((real, True), (generated, False)):
        metric.update(torch.from_numpy(features).double(), real=is_real)
    assert value(real, generated) == pytest.approx(float(metric.compute()[0]), abs=1e-6)


def test_agrees_with_its_equation_for_sets_of_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 7)  # several blocks, the last one short
    real, generated = draw(0, 30), draw(1, 45, 0.5)

    def mean(x: np.ndarray, y: np.ndarray) -> float:
        k = np.array([[(a.astype(float) @ b.astype(float) / 4 + 1) ** 3 for b in y] for a in x])
        return k[~np.eye(len(x), dtype=bool)].mean() if x is y else k.mean()

    expected = mean(real, real) + mean(generated, generated) - 2 * mean(real, generated)
    assert value(real, generated) == pytest.approx(expected, rel=1e-9)


def test_is_unbiased_where_there_is_no_distance() -> None:
    values = [value(draw(2 * k, 40), draw(2 * k + 1, 40)) for k in range(200)]
    deviation = np.std(values)
    assert abs(np.mean(values)) < 3 * deviation / 200**0.5
    assert deviation > 0.01  # of a biased one the mean is far beyond that
    assert min(values) < 0


def test_the_error_is_how_much_the_value_varies() -> None:
    real = draw(0, 500)
    found = [kernel_distance(real, draw(k, 100, 0.5)) for k in range(1, 101)]
    values, errors = zip(*((f.value, f.error) for f in found if f is not None), strict=True)
    assert len(values) == 100
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_large_sets_are_drawn_from_and_small_ones_have_no_distance() -> None:
    found = kernel_distance(draw(0, 300), draw(1, 200), max_items=100)
    assert found is not None
    assert (found.real_count, found.generated_count) == (100, 100)
    assert kernel_distance(draw(0, 300), draw(1, 39)) is None
