"""On which items the validation loss is measured; that ranks share them is in `test_ranks.py`."""

import numpy as np
import pytest

from pipeline.validation import NEIGHBOURS, choose_items


@pytest.mark.parametrize("num_items", [0, 1, 511, 512, 513, 519, 520, 1181, 100_003])
@pytest.mark.parametrize("at_most", [1, 8, 13, 512])
def test_items_are_as_many_as_asked_for_each_once(num_items: int, at_most: int) -> None:
    chosen = choose_items(num_items, at_most)
    assert len(chosen) == min(num_items, at_most)
    assert (np.diff(chosen) > 0).all()
    assert not len(chosen) or (chosen[0] == 0 and chosen[-1] < num_items)
    if at_most > NEIGHBOURS:
        assert not len(chosen) or chosen[-1] == num_items - 1


def test_items_are_of_all_classes_though_the_split_is_in_their_order() -> None:
    classes = np.repeat(np.arange(10), 1000)
    shares = np.bincount(classes[choose_items(len(classes), 512)], minlength=10) / 512
    np.testing.assert_allclose(shares, 0.1, atol=0.02)


def test_few_places_of_a_split_are_read() -> None:
    chosen = choose_items(1_000_000, 512)
    assert (np.diff(chosen) > 1).sum() == 512 // NEIGHBOURS - 1
