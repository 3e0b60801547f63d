import numpy as np
import pytest

from pipeline.scores import manifold
from pipeline.scores.manifold import precision_recall


def draw(seed: int, count: int = 60, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, 3)) + shift).astype(np.float32)


def scores(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    found = precision_recall(real, generated)
    assert found is not None
    return found.precision, found.recall


def share_inside(items: np.ndarray, of: np.ndarray) -> float:
    """By the definition, an item at a time."""
    count = 0
    radii = [
        sorted(np.linalg.norm(o - other) for j, other in enumerate(of) if j != i)[2]
        for i, o in enumerate(of)
    ]
    for item in items:
        count += any(np.linalg.norm(item - o) <= r for o, r in zip(of, radii, strict=True))
    return count / len(items)


def test_agrees_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "BLOCK", 7)  # several blocks, the last one short
    real, generated = draw(0), draw(1, shift=0.8)
    a, b = real.astype(np.float64), generated.astype(np.float64)
    expected = share_inside(b, a), share_inside(a, b)
    assert 0 < expected[0] < 1
    assert scores(real, generated) == pytest.approx(expected)


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    assert scores(draw(0), draw(0)) == (1, 1)
    assert scores(draw(0), draw(1, shift=50)) == (0, 0)


def test_a_dropped_mode_lowers_recall_alone() -> None:
    real = np.concatenate([draw(0, 100), draw(1, 100, shift=50)])
    one_mode = draw(2, 200)
    precision, recall = scores(real, one_mode)
    both = scores(real, np.concatenate([draw(3, 100), draw(4, 100, shift=50)]))
    assert precision > 0.8
    assert recall < 0.6
    assert min(both) > 0.8


def test_copies_lie_at_no_distance_however_far_from_0() -> None:
    # Five of each: the third neighbour is a copy too, so that every ball is a point.
    real = np.repeat(1e4 + draw(0, 12), 5, axis=0)
    assert scores(real, real[::-1].copy()) == (1, 1)
    assert scores(real, real + np.float32(0.01)) == (0, 0)


def test_as_many_of_each_are_drawn_whatever_their_order() -> None:
    real = np.concatenate([draw(0, 500), draw(1, 500, shift=50)])  # sorted by class
    found = precision_recall(real, draw(2, 300, shift=50), max_items=200)
    assert found is not None
    assert found.count == 200
    assert found.precision > 0.8
    assert found.recall == pytest.approx(0.5, abs=0.15)
    assert precision_recall(real, draw(2, 9)) is None
