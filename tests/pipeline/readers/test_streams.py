import bz2
import gzip
import io
import lzma
import random
import tracemalloc
import zlib
from collections.abc import Callable

import pytest

from pipeline.readers import streams
from pipeline.readers.streams import InputStream, SeekableInput

COMPRESS = [bytes, gzip.compress, bz2.compress, lzma.compress]


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_stream_is_read_in_any_pieces(compress: Callable[[bytes], bytes]) -> None:
    content = random.Random(0).randbytes(100_000) + bytes(100_000)
    stream = InputStream(io.BytesIO(compress(content)))
    parts = []
    for size in (0, 1, 511, 65_536, 100_000):
        assert stream.position == sum(map(len, parts))
        parts.append(stream.read(size))
    parts.append(stream.read(1 << 40))
    assert b"".join(parts) == content
    assert stream.read(1) == b""
    assert stream.fault is None


def test_skipping_and_draining_count_what_was_there() -> None:
    stream = InputStream(io.BytesIO(b"abc" + bytes(70_000) + b"x" + bytes(70_000) + b"yz\0\0"))
    assert stream.skip(3) == 3
    assert stream.drain() == 70_003
    assert stream.skip(1) == 0


@pytest.mark.parametrize("compress", COMPRESS[1:])
def test_zeros_may_follow_compressed_data_and_nothing_else(
    compress: Callable[[bytes], bytes],
) -> None:
    content = compress(b"abc")
    for rest, fault in ((bytes(5000), None), (b"\0x", "other data follows the")):
        stream = InputStream(io.BytesIO(content + rest))
        assert stream.read(10) == b"abc"
        assert (stream.fault or "").startswith(fault or "")
        assert (stream.fault is None) == (fault is None)


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_bomb_is_stopped_and_costs_no_memory(
    compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 20)
    bomb = compress(bytes(1 << 26))
    tracemalloc.start()
    stream = InputStream(io.BytesIO(bomb))
    assert stream.skip(1 << 40) <= max(1 << 20, 1000 * len(bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.fault is not None
    assert "more than 1000 times" in stream.fault
    assert peak < 1 << 24  # of them 8 MiB are what xz asks for


def test_an_xz_file_may_not_ask_for_gigabytes() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    content = bytearray(lzma.compress(b"abc", filters=filters))
    place = content.index(b"\x21\x01") + 2  # the size of the dictionary, in the block's header
    content[place] = 40
    header = slice(12, 12 + (content[12] + 1) * 4)
    block = bytes(content[header])[:-4]
    content[header] = block + zlib.crc32(block).to_bytes(4, "little")
    stream = InputStream(io.BytesIO(bytes(content)))
    assert stream.read(10) == b""
    assert stream.fault is not None
    assert "Memory usage limit" in stream.fault


def test_a_library_may_seek_where_the_file_does_not_go() -> None:
    file = SeekableInput(io.BytesIO(b"abcdef"), max_read_bytes=4)
    assert file.seek(-2, io.SEEK_END) == 4
    assert file.read() == b"ef"
    assert file.seek(1 << 70) == 1 << 70
    assert file.read(10) == b""
    file.seek(1)
    assert file.seek(1, io.SEEK_CUR) == 2
    assert file.tell() == 2
    with pytest.raises(OSError, match="before the start"):
        file.seek(-7, io.SEEK_END)
    file.seek(0)
    with pytest.raises(MemoryError):
        file.read()
    file.raise_fault()  # none of these was one of the storage
