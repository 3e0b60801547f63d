"""The members of a zip file, read one at a time by `zipfile`, whose faults become refusals.

`zip.py` and `arrays.py` (npz) share it.
"""

import itertools
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from pipeline.readers.entries import MAX_FILE_BYTES, Reason, Refused
from pipeline.readers.names import describe, strip_here
from pipeline.readers.streams import SeekableInput

MAX_DIRECTORY_BYTES = 1 << 27  # a million members or more; zipfile holds them in memory
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of others zipfile bounds no output
READ_BYTES = 1 << 18
_LOCAL_HEADER_BYTES = 30
_IS_UTF8 = 1 << 11  # a flag
_COUNTS = 1 << 16  # of members, in the short form of the end of the directory
_LOCAL_HEADER = b"PK\x03\x04"
_END, _LARGE_END = b"PK\x05\x06", b"PK\x06\x06"  # of the directory; of one of 65,535 or more
_END_BYTES = (1 << 16) + 256  # of the file, which both are in, whatever comment follows them
_FAULTS = (  # what zipfile raises at damaged and unusual archives
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    IndexError,
    OverflowError,
    MemoryError,
    OSError,
    struct.error,
    zlib.error,
)


class ZipInput:
    """A zip file. `members` are in the order of the central directory.

    Args:
        file: can be read at random.

    Raises:
        Refused: it is empty or no zip file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._source = SeekableInput(file, max_read_bytes=MAX_DIRECTORY_BYTES)
        if not self._source.num_bytes:
            raise Refused("empty", "the file is empty")
        with self._faults("unreadable_shard"):
            self._archive = zipfile.ZipFile(self._source)
            self._num_declared = self._read_count()
        self.members = self._archive.filelist
        by_place = sorted(self.members, key=lambda info: info.header_offset)
        self._overlapping = {
            info
            for info, after in itertools.pairwise(by_place)
            if info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size > after.header_offset
        }
        self._start = by_place[0].header_offset if by_place else self._source.num_bytes

    @property
    def unlisted(self) -> str | None:
        """In words, why there may be more than `members`; None where there is no sign of it."""
        count = len(self.members)
        if self._num_declared not in (None, count):
            return (
                f"its directory counts {self._num_declared:,} members, {count:,} can be read in it"
            )
        self._source.seek(0)
        if self._start > 0 and self._source.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER:
            return "members before the first one that the directory lists are not read"
        return None

    def _read_count(self) -> int | None:
        """How many members the end of the directory declares; zipfile does not look at it."""
        self._source.seek(max(0, self._source.num_bytes - _END_BYTES))
        tail = self._source.read()
        end = tail.rfind(_END)
        if end < 0 or len(tail) < end + 12:
            return None
        (count,) = struct.unpack_from("<H", tail, end + 10)
        if count < 0xFFFF:
            num_read = len(self._archive.filelist)  # some write its lower half alone
            return num_read if num_read % _COUNTS == count else count
        large = tail.rfind(_LARGE_END, 0, end)
        return struct.unpack_from("<Q", tail, large + 32)[0] if 0 <= large <= end - 40 else None

    def read(self, info: zipfile.ZipInfo) -> bytes:
        """The content of a member.

        Raises:
            Refused: it is too large, damaged, encrypted or in an unknown format.
        """
        if info.file_size > MAX_FILE_BYTES:
            detail = f"{info.file_size:,} bytes are more than {MAX_FILE_BYTES:,}"
            raise Refused("too_large", detail)
        return b"".join(self.iter_blocks(info))

    def iter_blocks(self, info: zipfile.ZipInfo) -> Iterator[bytes]:
        """Yields the content of a member, whatever its size; at the end its checksum is checked.

        Raises:
            Refused: it is damaged, encrypted or in an unknown format.
        """
        if info.flag_bits & 1:
            raise Refused("undecodable", "it is encrypted")
        if info.compress_type not in METHODS:
            detail = f"zip's compression method {info.compress_type} is not read, only deflate"
            raise Refused("undecodable", detail)
        if info in self._overlapping:
            raise Refused("undecodable", "it overlaps another member")
        if not 0 <= info.header_offset < self._source.num_bytes:
            raise Refused("undecodable", "it lies outside of the archive")
        count = 0
        with self._faults("undecodable"):
            member = self._archive.open(info)
        with member:
            while True:
                with self._faults("undecodable"):
                    block = member.read(READ_BYTES)
                if not block:
                    break
                count += len(block)
                yield block
        if count < info.file_size:
            raise Refused("truncated", f"it has {count:,} of {info.file_size:,} bytes")

    @contextmanager
    def _faults(self, reason: Reason) -> Iterator[None]:
        try:
            yield
        except EOFError as error:
            self._source.raise_fault()
            raise Refused("truncated", "the archive ends inside it") from error
        except _FAULTS as error:
            self._source.raise_fault()
            raise Refused(reason, describe(error)) from error


def name_of(info: zipfile.ZipInfo) -> str:
    """The name of a member; zipfile hides what follows a NUL in it.

    One that is not said to be UTF-8, and is, is read so: Info-ZIP and macOS do not say it.
    """
    hides = "\0" in info.orig_filename
    name = info.orig_filename if hides else info.filename
    if not (name.isascii() or info.flag_bits & _IS_UTF8):
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()  # zipfile decoded it
    return strip_here(name)


def kind_of(info: zipfile.ZipInfo) -> str:
    """What a member is: "a file", or in words what else."""
    if info.filename.endswith("/"):
        return "a directory"
    kind = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0  # 3: Unix
    if kind in (0, stat.S_IFREG):
        return "a file"
    if kind == stat.S_IFDIR:
        return "a directory"
    return "a symbolic link" if kind == stat.S_IFLNK else "a device"
