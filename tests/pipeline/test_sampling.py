import numpy as np
import torch

from pipeline.sampling import draw_labels

COUNTS = {0: 10, 1: 0, 2: 30, 3: 60}


def test_labels_are_drawn_with_the_shares_of_the_data_set() -> None:
    labels = draw_labels(COUNTS, 0, range(20_000)).numpy()
    shares = np.bincount(labels, minlength=4) / len(labels)
    np.testing.assert_allclose(shares, [0.1, 0, 0.3, 0.6], atol=0.015)  # more than 4 deviations
    assert shares[1] == 0


def test_a_samples_label_is_the_same_in_whatever_company() -> None:
    labels = draw_labels(COUNTS, 0, range(200))
    parts = [draw_labels(COUNTS, 0, range(k, k + 50)) for k in range(0, 200, 50)]
    assert torch.equal(torch.cat(parts), labels)
    assert not torch.equal(draw_labels(COUNTS, 1, range(200)), labels)


def test_samples_of_a_class_vary_in_number_as_independent_draws_do() -> None:
    """Real images do, and a score compares with them."""
    numbers = [int((draw_labels(COUNTS, seed, range(100)) == 3).sum()) for seed in range(400)]
    deviation = np.sqrt(100 * 0.6 * 0.4)
    assert abs(np.std(numbers) / deviation - 1) < 0.15  # more than 4 deviations
    assert abs(np.mean(numbers) - 60) < 4 * deviation / np.sqrt(400)
