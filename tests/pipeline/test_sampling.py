from collections import Counter

import torch

from pipeline.sampling import spread_labels


def test_labels_are_as_frequent_as_in_the_data_set_and_independent_of_the_split() -> None:
    counts = {0: 10, 1: 0, 2: 30, 3: 60}
    labels = spread_labels(counts, range(200), 200)
    assert Counter(labels.tolist()) == {0: 20, 2: 60, 3: 120}
    parts = [spread_labels(counts, range(k, k + 50), 200) for k in range(0, 200, 50)]
    assert torch.equal(torch.cat(parts), labels)
    assert len(set(labels[:5].tolist())) > 1


def test_one_sample_has_the_label_in_the_middle() -> None:
    assert spread_labels({0: 1, 1: 1, 2: 1}, range(1), 1).tolist() == [1]
