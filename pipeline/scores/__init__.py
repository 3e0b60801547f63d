"""Scores: how far samples are from real images, from the features of both.

Each module is one family of scores. They take arrays of features or of images and know neither
networks nor storage; what extracts the features is in `extractors/`, what puts the scores of a
model together is in `evaluate.py`.
"""


def show_number(value: float) -> str:
    """A score as a person reads it: 51.69, and 0.0231 where it is small."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
