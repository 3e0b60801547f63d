"""Input files on their way in: decompressed as they are read, and never read whole.

What the storage raises passes through. Damaged content raises nothing here: a stream ends early
and its `fault` says why.
"""

import bz2
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

BLOCK_BYTES = 1 << 16  # of output at a time: what is lost before a damaged place
PLAIN_BYTES = 1 << 18  # at a time of what is not compressed
MAX_INFLATION = 1000  # times; bzip2 and xz reach 10^5 on bombs, images and sequences never do
FREE_BYTES = 1 << 30  # may come out of however little
MAX_XZ_BYTES = 1 << 27  # memory that an xz file may ask for; its own tool asks for half at most
_GZIP = 31  # zlib's number for 32 KiB of window and a gzip header

_FORMATS: tuple[tuple[str, re.Pattern[bytes], Callable[[], Any]], ...] = (
    ("gzip", re.compile(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(_GZIP)),
    ("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", re.DOTALL), bz2.BZ2Decompressor),
    ("xz", re.compile(rb"\xfd7zXZ\x00"), lambda: lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES)),
)
_LONGEST_MAGIC = 10


class Readable(Protocol):
    """A file that is read once from its start."""

    def read(self, size: int, /) -> bytes:
        """Reads on; nothing at the end."""
        ...


class InputStream:
    """A file read once from its start; gzip, bzip2 and xz are told by their first bytes.

    `position` counts the bytes delivered, `num_read` those taken from the file; `fault` says why
    a compressed file ended before its end.
    """

    def __init__(self, file: Readable) -> None:
        self.position = 0
        self.num_read = 0
        self.fault: str | None = None
        self._file = file
        self._blocks = self._iter_blocks()
        self._block, self._start = b"", 0  # what was read last, and how far it was delivered

    def read(self, size: int) -> bytes:
        """The next bytes: fewer than `size` only at the end."""
        start, end = self._start, self._start + size
        if start < end <= len(self._block):  # most often; the rest is general, and slower
            self._start = end
            self.position += size
            return self._block[start:end]
        return b"".join(self._iter_parts(size))

    def skip(self, size: int) -> int:
        """Passes over the next bytes; how many there were."""
        end = self._start + size
        if self._start <= end <= len(self._block):  # as in `read`
            self._start = end
            self.position += size
            return size
        return sum(len(part) for part in self._iter_parts(size))

    def skip_rest(self) -> int:
        """Passes over all that follows; how many bytes there were."""
        return self.skip(sys.maxsize)

    def drain(self) -> int:
        """Reads to the end; how many bytes there were between the zeros at both ends."""
        first, last, position = None, 0, 0
        while part := bytes(next(self._iter_parts(BLOCK_BYTES), b"")):
            if part.strip(b"\0"):
                if first is None:
                    first = position + len(part) - len(part.lstrip(b"\0"))
                last = position + len(part.rstrip(b"\0"))
            position += len(part)
        return 0 if first is None else last - first

    def drain_file(self) -> int:
        """Reads the file behind to its end, undecoded; how many bytes there were."""
        before = self.num_read
        while self._take():
            pass
        return self.num_read - before

    def _iter_parts(self, size: int) -> Iterator[memoryview]:
        while size > 0:
            if self._start == len(self._block):
                self._block, self._start = next(self._blocks, b""), 0
                if not self._block:
                    return
            part = memoryview(self._block)[self._start :][:size]
            self._start += len(part)
            size -= len(part)
            self.position += len(part)
            yield part

    def _take(self, size: int = BLOCK_BYTES) -> bytes:
        block = self._file.read(size)
        self.num_read += len(block)
        return block

    def _iter_blocks(self) -> Iterator[bytes]:
        head = self._take()
        while len(head) < _LONGEST_MAGIC and (more := self._take()):
            head += more
        for name, magic, make in _FORMATS:
            if magic.match(head):
                yield from self._inflate(head, name, magic, make)
                return
        while head:
            yield head
            head = self._take(PLAIN_BYTES)

    def _inflate(
        self, head: bytes, name: str, magic: re.Pattern[bytes], make: Callable[[], Any]
    ) -> Iterator[bytes]:
        num_out, decompressor = 0, make()
        while True:
            try:
                block = decompressor.decompress(head, BLOCK_BYTES)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, MemoryError) as error:
                self.fault = f"the {name} data is damaged: {error}"
                return
            num_out += len(block)
            if num_out > max(FREE_BYTES, MAX_INFLATION * self.num_read):
                self.fault = f"the {name} data inflates to more than {MAX_INFLATION} times its size"
                return
            if block:
                yield block
            if decompressor.eof:  # several may follow one another, and zeros the last
                head = decompressor.unused_data.lstrip(b"\0")
                while len(head) < _LONGEST_MAGIC and (more := self._take()):
                    head = (head + more).lstrip(b"\0")
                if not head:
                    return
                if not magic.match(head):
                    self.fault = f"other data follows the {name} data"
                    return
                decompressor = make()
                continue
            head = getattr(decompressor, "unconsumed_tail", b"")
            if not head and (not block or getattr(decompressor, "needs_input", True)):
                head = self._take()
                if not head and not block:
                    self.fault = f"the {name} data is cut short"
                    return


class SeekableInput(io.RawIOBase):
    """A file for a library that seeks in it, and that may take the storage's errors for its own.

    Args:
        file: open for reading.
        max_read_bytes: a larger read at once is refused: it is a size that the content lies about.
    """

    def __init__(self, file: IO[bytes], *, max_read_bytes: int | None = None) -> None:
        self.fault: Exception | None = None
        self._file, self._max_read_bytes = file, max_read_bytes
        self._position = 0
        self.num_bytes = self._watch(file.seek, 0, io.SEEK_END)

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes, all when `size` is negative."""
        left = max(0, self.num_bytes - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if self._max_read_bytes is not None and size > self._max_read_bytes:
            raise MemoryError(f"{size:,} bytes at once are more than {self._max_read_bytes:,}")
        if not size:
            return b""  # also beyond the end, where the file itself might not go
        self._watch(self._file.seek, self._position)
        content = self._watch(self._file.read, size)
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves to a place, which may be beyond the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        if start + offset < 0:
            raise OSError("seeking to before the start")  # what the libraries expect of a file
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def raise_fault(self) -> None:
        """Raises what the storage raised, if it did: then the content is not to blame."""
        if self.fault is not None:
            raise self.fault

    def _watch(self, call: Callable[..., Any], *args: int) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self.fault = error
            raise
