"""Makes the tar shards of this directory from scikit-learn's copy of the UCI digits.

    python examples/digits/make_shards.py

Writes `digits-0000.tar` to `digits-0003.tar`, and `later/digits-0004.tar`, which stands for
the data that arrives after the first training. Each image is a PNG of 8x8 grey pixels with its
class in a `.cls` file beside it, as WebDataset lays them out. The same bytes every time.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0.
"""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_SHARDS = 5
SHADES = 16  # the set counts ink from 0 to 16


def main() -> None:
    here = Path(__file__).resolve().parent
    digits: Any = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    (here / "later").mkdir(exist_ok=True)
    for shard, indices in enumerate(np.array_split(order, NUM_SHARDS)):
        directory = here / "later" if shard == NUM_SHARDS - 1 else here
        with tarfile.open(directory / f"digits-{shard:04d}.tar", "w") as tar:
            for index in indices:
                pixels = np.rint(digits.images[index] * (255 / SHADES)).astype(np.uint8)
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                add(tar, f"{index:04d}.png", png.getvalue())
                add(tar, f"{index:04d}.cls", str(digits.target[index]).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file without owner or time."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
