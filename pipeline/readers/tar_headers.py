"""The headers of a tar stream, one after another, and why they ended.

Python's `tarfile` reads each header block. Following the blocks is done here, because `tarfile`
holds every header in memory, reads extended headers of any size whole, follows them recursively,
and stops without a word at a damaged header.
"""

import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pipeline.readers.names import show
from pipeline.readers.streams import InputStream

BLOCK_BYTES = 512
MAX_EXTENDED_BYTES = 1 << 20  # of a header that holds a long name or attributes
End = Literal["mark", "empty", "damaged", "cut"]

_NO_CONTENT = {  # types of members that no content follows, whatever their size says
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a directory",
    tarfile.FIFOTYPE: "a pipe",
}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_POSIX = b"ustar\0"
_OCTAL = re.compile(rb"([0-7]+)[\0 ]*$")
_PAX_SPARSE, _PAX_SPARSE_NAME = b"GNU.sparse.", b"GNU.sparse.name"
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=")


class TarMember(NamedTuple):
    """A file in a tar. `kind` is "a file", or in words what it is instead."""

    name: str
    size: int
    kind: str


class _Ended(Exception):  # noqa: N818 - how the headers end, usually well
    """With `end` and `detail`."""


class TarHeaders:
    """Iterates over the members of a stream; the caller reads the content of each, or does not.

    `end` is how they ended, once they have: at a "mark", because nothing is there ("empty"), with
    a "damaged" header, or "cut" short. `detail` says it in words, `position` is the byte where.
    """

    def __init__(self, stream: InputStream) -> None:
        self.end: End = "mark"
        self.detail = ""
        self.position = 0
        self._stream = stream

    def __iter__(self) -> Iterator[TarMember]:
        stream = self._stream
        while True:
            self.position = stream.position
            try:
                member = self._read_headers()
            except _Ended as ended:
                self.end, self.detail = ended.args
                return
            end = stream.position + member.size
            yield member
            left, padding = end - stream.position, -member.size % BLOCK_BYTES
            missing = left - stream.skip(left + padding)
            if missing > 0:
                self.end, self.position = "cut", stream.position
                where = f"inside {show(member.name, 100)}"
                self.detail = f"the archive ends {where}, {missing:,} bytes early"
                return

    def _read_headers(self) -> TarMember:
        """The next header, with what the extended ones before it say."""
        name: bytes | None = None
        attributes: dict[bytes, bytes] = {}  # never more than the few of `_parse_pax`
        is_first = True
        while True:
            block = self._stream.read(BLOCK_BYTES)
            if is_first and (plain := _plain_file(block)) is not None:
                return plain
            if is_first and not block:
                raise _Ended("empty", "the archive has no end mark")
            if len(block) < BLOCK_BYTES:
                raise _Ended("cut", "the archive ends inside a header")
            if is_first and not block.strip(b"\0"):
                raise _Ended("mark", "")
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise _damaged(str(error)) from error
            if header.size < 0:
                raise _damaged("its size is negative")
            is_first = False
            match header.type:
                case tarfile.GNUTYPE_LONGNAME:
                    name = self._read_extended(header.size).split(b"\0", 1)[0]
                case tarfile.XHDTYPE | tarfile.SOLARIS_XHDTYPE:
                    attributes |= _parse_pax(self._read_extended(header.size))
                case tarfile.GNUTYPE_LONGLINK:
                    self._read_extended(header.size)
                case tarfile.XGLTYPE:  # of all members: comments, as git writes them
                    self._read_extended(header.size)
                case _:
                    break
        name = attributes.get(b"path", name)
        size, kind = _size_of(header.size, attributes), "a file"
        if header.type in _NO_CONTENT:
            size, kind = 0, _NO_CONTENT[header.type]
        elif header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map(block)
            kind = "a sparse file"
        elif _PAX_SPARSE in attributes:
            kind = "a sparse file"
            name = attributes.get(_PAX_SPARSE_NAME, name)
        elif header.type not in _FILES:
            kind = f"of the unknown type {header.type!r}"
        name = _name_of(block) if name is None else name
        return TarMember(name.decode("utf-8", "surrogateescape"), size, kind)

    def _read_extended(self, size: int) -> bytes:
        if size > MAX_EXTENDED_BYTES:
            raise _damaged(f"it has {size:,} bytes")
        content = self._stream.read(size)
        if len(content) < size:
            raise _Ended("cut", "the archive ends inside a header")
        self._stream.skip(-size % BLOCK_BYTES)
        return content

    def _skip_sparse_map(self, block: bytes) -> None:
        """The holes of a sparse file are listed in blocks before its content."""
        is_more = block[482]
        while is_more:
            block = self._stream.read(BLOCK_BYTES)
            if len(block) < BLOCK_BYTES:
                raise _Ended("cut", "the archive ends inside a header")
            is_more = block[504]


def _damaged(what: str) -> _Ended:
    return _Ended("damaged", f"a header is damaged ({what})")


def _plain_file(block: bytes) -> TarMember | None:
    """What the header of an ordinary file says, as `tarfile` reads it, in a tenth of the time.

    None where anything about it is unusual.
    """
    checksum, size = _OCTAL.match(block, 148, 156), _OCTAL.match(block, 124, 136)
    if checksum is None or size is None or block[156:157] != tarfile.REGTYPE:
        return None
    if int(checksum[1], 8) != _sum_of_header(block):
        return None
    name = _name_of(block).decode("utf-8", "surrogateescape")
    return TarMember(name, int(size[1], 8), "a file")


def _name_of(block: bytes) -> bytes:
    """The name in a header. Only POSIX has its start elsewhere: GNU may have times there."""
    path = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == _POSIX else b""
    return prefix + b"/" + path if prefix else path


def _sum_of_header(block: bytes) -> int:
    """The sum of its bytes, those of the checksum taken for spaces.

    The lower half of Adler-32 is one more than the sum, modulo 65,521: of up to 256 bytes exactly,
    in a tenth of the time that `sum` takes.
    """
    halves = zlib.adler32(block[:148] + b" " * 8 + block[156:256]), zlib.adler32(block[256:])
    return (halves[0] & 0xFFFF) + (halves[1] & 0xFFFF) - 2


def _parse_pax(content: bytes) -> dict[bytes, bytes]:
    """The path, the size and whether it is sparse, of records "length key=value" and a line end."""
    attributes: dict[bytes, bytes] = {}
    start = 0
    while start < len(content) and content[start]:
        match = _PAX_RECORD.match(content, start)
        end = start + int(match[1]) if match else 0
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            raise _damaged("its attributes")
        key, value = match[2], content[match.end() : end - 1]
        if key in (b"path", b"size", _PAX_SPARSE_NAME):
            attributes[key] = value
        if key.startswith(_PAX_SPARSE):
            attributes[_PAX_SPARSE] = b""
        start = end
    return attributes


def _size_of(size: int, attributes: dict[bytes, bytes]) -> int:
    """The size of a member: that in the attributes is for those beyond 8 GiB."""
    text = attributes.get(b"size")
    if text is None:
        return size
    if not re.fullmatch(rb"[0-9]{1,19}", text):
        raise _damaged("its size is no number")
    return int(text)
