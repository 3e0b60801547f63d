from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from pipeline.errors import EvaluationError
from pipeline.scores import copies
from pipeline.scores.copies import CopyCheck, NearestImages, _chance_of_so_many, check_copies


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Handwritten digits: 1,200 to train on, 300 held out, 297 like samples of a perfect model."""
    images = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:, None]  # pyright: ignore
    images = images[np.random.default_rng(0).permutation(len(images))]
    return images[:1200], images[1200:1500], images[1500:]


def nearest(queries: np.ndarray, training: np.ndarray, count: int = 50) -> NearestImages:
    found = NearestImages(queries, count)
    for start in range(0, len(training), 500):
        found.add(training[start : start + 500], start)
    return found


def check(samples: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> CopyCheck:
    found = check_copies(nearest(samples, training), nearest(held_out, training))
    assert found is not None
    return found


def plant(samples: np.ndarray, copied: np.ndarray, share: float = 0.05) -> np.ndarray:
    count = round(share * len(samples))
    return np.concatenate([copied[:count], samples[count:]])


def test_a_share_of_training_copies_trips_the_check(digits: tuple[np.ndarray, ...]) -> None:
    training, held_out, samples = digits
    found = check(plant(samples, training[::7]), training, held_out)
    assert found.is_memorising
    assert found.p_value < 1e-4
    assert found.share >= 0.05 > found.held_out_share
    assert found.ratios[:15] == (0,) * 15
    assert found.nearest_ids[:15] == tuple(range(0, 105, 7))


def test_samples_that_are_no_copies_do_not_trip_it(digits: tuple[np.ndarray, ...]) -> None:
    training, held_out, samples = digits
    found = check(samples, training, held_out)
    assert not found.is_memorising
    assert found.median_distance == pytest.approx(found.held_out_median_distance, rel=0.1)
    assert min(found.ratios) > 0.1
    # Nor do noise and blank images, though all of them are near the same training images.
    for value in (0, 128):
        assert not check(np.full_like(samples, value), training, held_out).is_memorising
    noise = np.random.default_rng(0).integers(0, 256, samples.shape, dtype=np.uint8)
    assert not check(noise, training, held_out).is_memorising


def test_a_share_that_is_sure_but_small_does_not_trip_it() -> None:
    images = np.random.default_rng(0).normal(size=(4300, 1, 20)).astype(np.float32)
    training, held_out, samples = images[:300], images[300:2300], images[2300:]
    found = check(plant(samples, training, share=0.015), training, held_out)
    assert found.p_value < 1e-3
    assert not found.is_memorising
    assert check(plant(samples, training, share=0.05), training, held_out).is_memorising


def test_copies_that_were_altered_a_little_trip_it_too(digits: tuple[np.ndarray, ...]) -> None:
    training, held_out, samples = digits
    rng = np.random.default_rng(1)
    altered = np.clip(training.astype(int) + rng.integers(-10, 11, training.shape), 0, 255)
    planted = plant(samples, altered.astype(np.uint8))
    assert check(planted, training, held_out).is_memorising


@pytest.mark.parametrize("num_twins", [0, 2, 9])  # up to 3% of the held-out images
@pytest.mark.parametrize("levels", [0, 2])  # saved as PNG, or with loss
def test_twins_of_held_out_images_do_not_hide_copies(
    digits: tuple[np.ndarray, ...], num_twins: int, levels: int
) -> None:
    training, held_out, samples = digits
    rng = np.random.default_rng(1)

    def altered(images: np.ndarray, levels: int) -> np.ndarray:
        changed = images.astype(int) + rng.integers(-levels, levels + 1, images.shape)
        return changed.clip(0, 255).astype(np.uint8)

    held_out = np.concatenate([altered(training[-num_twins or 1200 :], levels), held_out])[:300]
    assert not check(samples, training, held_out).is_memorising
    assert check(plant(samples, altered(training, 10), 0.1), training, held_out).is_memorising


def test_an_exact_copy_of_a_large_image_is_at_distance_0() -> None:
    rng = np.random.default_rng(0)
    training = rng.integers(250, 256, (20, 3, 80, 48), dtype=np.uint8)  # far from 0, and alike
    found = nearest(training[[3, 17]], training, count=4)
    assert found.ids[:, 0].tolist() == [3, 17]
    assert found.distances[:, 0].tolist() == [0, 0]
    assert found.distances[:, 1].min() > 1e-3


def test_a_distance_is_the_root_mean_square_of_values_from_minus_1_to_1() -> None:
    queries, training = (np.full((1, 3, 40, 64), v, np.uint8) for v in (0, 255))
    assert nearest(queries, training, count=1).distances.item() == pytest.approx(2)


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 59), max_size=5))
def test_any_grouping_of_shards_finds_the_same(cuts: list[int]) -> None:
    rng = np.random.default_rng(0)
    training, queries = (rng.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8) for n in (60, 7))
    found = NearestImages(queries, 5)
    for start, end in pairwise([0, *sorted(set(cuts)), 60]):
        found.add(training[start:end], start)
    a, b = (x.reshape(len(x), 1, -1) / 127.5 - 1 for x in (queries, training))
    distances = np.sqrt(np.square(a - b.swapaxes(0, 1)).mean(2))
    assert found.ids.tolist() == np.argsort(distances, axis=1)[:, :5].tolist()
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :5], rtol=1e-6)


def test_blocks_find_what_one_matrix_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    training, queries = (rng.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8) for n in (60, 17))
    whole = nearest(queries, training, count=5)
    monkeypatch.setattr(copies, "BLOCK", 7)
    assert nearest(queries, training, count=5).ids.tolist() == whole.ids.tolist()


def test_copied_sequences_trip_it() -> None:
    steps = np.random.default_rng(0).normal(size=(900, 2, 30)).astype(np.float32)
    sequences = np.cumsum(steps, axis=2)
    training, held_out, samples = sequences[:500], sequences[500:700], sequences[700:]
    assert not check(samples, training, held_out).is_memorising
    found = check(plant(samples, training), training, held_out)
    assert found.is_memorising
    assert found.nearest_ids[:10] == tuple(range(10))


def test_an_image_that_training_holds_many_times_is_a_copy() -> None:
    training = np.random.default_rng(0).integers(0, 256, (100, 1, 4, 4), dtype=np.uint8)
    training[:60] = 0
    found = check(training[:1].repeat(100, 0), training, training[60:].repeat(5, 0))
    assert found.ratios == (0,) * 100


def test_too_few_images_tell_nothing(digits: tuple[np.ndarray, ...]) -> None:
    training, held_out, samples = digits
    near = nearest(samples, training)
    assert check_copies(near, nearest(held_out[:199], training)) is None
    few = training[:49]
    assert check_copies(nearest(samples, few), nearest(held_out, few)) is None


def test_what_cannot_be_compared_is_refused() -> None:
    found = NearestImages(np.zeros((2, 1, 8, 8), np.uint8))
    with pytest.raises(EvaluationError, match=r"\[3, 8, 8\].*\[1, 8, 8\]"):
        found.add(np.zeros((2, 3, 8, 8), np.uint8), 0)
    with pytest.raises(EvaluationError, match="NaN"):
        NearestImages(np.full((2, 1, 8), np.nan, np.float32))


@pytest.mark.parametrize("found", [1, 2, 4])
@pytest.mark.parametrize("expected", [1, 2, 3])
def test_the_chance_is_that_of_all_orders_alike(found: int, expected: int) -> None:
    """Counted: of four samples and five held-out images, in which places the samples may come."""
    orders = list(combinations(range(9), 4))
    hits = 0
    for places in orders:
        held_out = sorted(set(range(9)) - set(places))
        hits += sum(place < held_out[expected - 1] for place in places) >= found
    chance = _chance_of_so_many(found, 4, expected, 5)
    assert chance == pytest.approx(hits / len(orders))


def test_the_threshold_is_the_lowest_ratio_of_held_out_images_and_what_is_at_it_is_near() -> None:
    def near(ratios: np.ndarray) -> Any:
        distances = np.ones((len(ratios), 5))
        distances[:, 0] = ratios
        return SimpleNamespace(distances=distances, ids=np.zeros((len(ratios), 5), int))

    ratios = np.linspace(0.8, 0.999, 200)
    found = check_copies(near(np.array([0.2, 0.8, 0.9])), near(ratios))
    assert found is not None
    assert found.threshold == pytest.approx(0.8)
    assert found.ratios == pytest.approx((0.2, 0.8, 0.9))
    assert (found.num_near_copies, found.held_out_share) == (2, 1 / 200)
