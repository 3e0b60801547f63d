import numpy as np

from pipeline.scores.degenerate import DegenerateCounts, count_degenerate


def test_counts_images_of_one_colour_and_black_ones() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    images[1] = 0
    images[2] = np.array([10, 0, 30], np.uint8)[:, None, None]  # one colour, not one grey
    images[3, :2] = 5  # its third channel varies
    assert count_degenerate(images) == DegenerateCounts(6, constant=2, black=1)


def test_counts_constant_sequences() -> None:
    sequences = np.random.default_rng(0).normal(size=(5, 2, 7)).astype(np.float32)
    sequences[0] = 0.0
    sequences[1] = -0.5
    assert count_degenerate(sequences) == DegenerateCounts(5, constant=2, black=0)


def test_counts_of_parts_add_up() -> None:
    images = np.zeros((5, 1, 2, 2), np.uint8)
    images[3, 0, 0, 0] = 1
    parts = count_degenerate(images[:2]) + count_degenerate(images[2:])
    assert parts == count_degenerate(images) == DegenerateCounts(5, 4, 4)
