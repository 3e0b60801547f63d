"""Fixtures of the readers' tests."""

import io
import random
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def iter_damaged() -> Callable[..., Iterator[bytes]]:
    """Yields damaged copies of a file: cut, with bits flipped, bytes overwritten or moved."""

    def damage(content: bytes, count: int) -> Iterator[bytes]:
        source = random.Random(0)
        for _ in range(count):
            copy = bytearray(content)
            start = source.randrange(len(copy))
            match source.randrange(5):
                case 0:
                    del copy[start:]
                case 1:
                    copy[start] ^= 1 << source.randrange(8)
                case 2:
                    copy[start : start + 8] = source.choice([bytes(8), b"\xff" * 8, b"7" * 8])
                case 3:
                    copy[start : start + 64] = source.randbytes(64)
                case 4:
                    other = source.randrange(len(copy))
                    copy[start : start + 200] = copy[other : other + 200]
            yield bytes(copy)

    return damage


@pytest.fixture
def failing_file() -> Callable[[bytes, Exception], io.BytesIO]:
    """A file on a storage that fails at the second half."""

    class Failing(io.BytesIO):
        def __init__(self, content: bytes, error: Exception) -> None:
            super().__init__(content)
            self.error, self.limit = error, len(content) // 2

        def read(self, size: int | None = -1, /) -> bytes:
            wanted = len(self.getvalue()) if size is None or size < 0 else size
            if self.tell() + min(wanted, 1 << 12) > self.limit:
                raise self.error
            return super().read(min(wanted, 1 << 12))

    return Failing
