"""Where Pillow's JPEG decoder keeps the row of pixels that libjpeg-turbo writes.

For each image Pillow takes memory for one row of RGBX from `calloc`. Where that begins at a
multiple of 32 bytes, libjpeg-turbo's colour conversion (AVX2) writes it past the processor's
cache, and Pillow, which copies the row at once, waits for it: decoding takes 1.1 to 1.3 times as
long. glibc gives out multiples of 16 and takes what was given back the longest ago, so that places
of one size go round. Here some are taken before each image; the slow ones are kept, the others are
given back, until those that go round are fast. It costs a microsecond. With another allocator, or
without AVX2, nothing comes of it; the pixels are the same anyway.
"""

import sys
from collections import deque

_SLOW = 32  # bytes: rows that begin at a multiple
_TAKEN = 4  # before each image
_MIN_BYTES = 513  # that Python asks of the allocator; less it keeps in pools of its own
_MAX_BYTES = 1 << 14  # longer rows gain next to nothing
_HEADER_BYTES = sys.getsizeof(b"")

_kept: deque[bytes] = deque(maxlen=256)  # the oldest are given back: 4 MiB at most


def prepare_rows(width: int) -> None:
    """Has the next image of so many RGB pixels a row decoded into memory where that is fast."""
    num_bytes = 4 * width
    if not _MIN_BYTES - 16 < num_bytes <= _MAX_BYTES:
        return
    # Where glibc takes a multiple of 32 for a row, with its own eight bytes, rows side by side
    # begin alike: something between them sets them apart.
    is_between = -(num_bytes + 8) % _SLOW < 16
    places, between = [], []
    for _ in range(_TAKEN):  # these bytes are from `calloc` as well
        places.append(bytes(max(num_bytes, _MIN_BYTES) - _HEADER_BYTES))
        if is_between:
            between.append(bytes(_MIN_BYTES - _HEADER_BYTES))
    slow = [place for place in places if id(place) % _SLOW == 0]
    if slow:
        _kept.extend(slow + between)
