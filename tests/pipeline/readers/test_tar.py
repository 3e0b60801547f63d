import bz2
import functools
import gzip
import io
import lzma
import random
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.readers import samples, tar_headers
from pipeline.readers.entries import Entry, Ignored, Item, Refusal
from pipeline.readers.tar import _Keys, iter_tar
from pipeline.settings import DataConfig

Members = list[tuple[str, bytes]]
DATA = DataConfig(sources=("x",), resolution=8)
SEQUENCES = DataConfig(sources=("x",), sequence_shape=(1, 4))
BLOCK = 512
COMPRESS = [gzip.compress, bz2.compress, functools.partial(lzma.compress, preset=0)]


def pack(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """A header block alone, which may say anything."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksum(block: bytes) -> bytes:
    """A header block after changes, made consistent."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def read(content: bytes, data: DataConfig = DATA) -> list[Entry]:
    return list(iter_tar(io.BytesIO(content), data))


def outline(entries: list[Entry]) -> list[tuple[Any, ...]]:
    """What became of each member, without contents and details."""
    kinds: list[tuple[Any, ...]] = []
    for entry in entries:
        match entry:
            case Item(member, _, label):
                kinds.append((member, label))
            case Refusal(member, reason, _, count):
                kinds.append((member, reason, count))
            case Ignored(member):
                kinds.append((member, "ignored", 0))
    return kinds


def test_every_image_comes_in_order_with_its_label() -> None:
    members: Members = []
    for k in range(20):
        members += [(f"{k:03d}.png", b"%d" % k), (f"{k:03d}.cls", b"%d" % (k % 3))]
    assert read(pack(members)) == [Item(f"{k:03d}.png", b"%d" % k, k % 3) for k in range(20)]


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp", "tif", "TIFF"])
def test_images_are_told_by_their_suffix(suffix: str) -> None:
    assert outline(read(pack([(f"a.{suffix}", b"x"), ("a.gif", b"x"), ("a.npy", b"x")]))) == [
        ("a.gif", "ignored", 0),
        ("a.npy", "ignored", 0),
        (f"a.{suffix}", None),
    ]


def test_sequences_are_npy_files() -> None:
    content = pack([("a.npy", b"x"), ("a.cls", b"1"), ("b.png", b"x")])
    assert outline(read(content, SEQUENCES)) == [("a.npy", 1), ("b.png", "ignored", 0)]


def test_the_label_may_come_before_its_image() -> None:
    members = [("a.cls", b"1"), ("a.png", b""), ("b.json", b'{"breed": "pug"}'), ("b.png", b"")]
    data = DATA.model_copy(update={"label_field": "breed"})
    assert outline(read(pack(members), data)) == [("a.png", 1), ("b.png", "pug")]


def test_an_invalid_label_refuses_its_sample_only() -> None:
    members = [("a.png", b""), ("a.cls", b"-7"), ("b.png", b""), ("b.json", b"{"), ("c.png", b"")]
    assert outline(read(pack(members))) == [
        ("a.png", "label_invalid", 1),
        ("b.png", "label_invalid", 1),
        ("c.png", None),
    ]


def test_a_large_companion_is_not_read_for_a_label() -> None:
    text = b"7" + b" " * (1 << 20)
    members = [("a.png", b""), ("a.cls", text), ("b.png", b""), ("b.txt", text)]
    assert outline(read(pack(members))) == [("a.png", "label_invalid", 1), ("b.png", None)]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_a_mask_beside_an_image_is_ignored(order: tuple[int, ...]) -> None:
    members = [("a.png", b"image"), ("a.seg.png", b"mask"), ("a.cls", b"1")]
    entries = read(pack([members[k] for k in order]))
    assert sorted(outline(entries), key=str) == [("a.png", 1), ("a.seg.png", "ignored", 0)]
    assert Item("a.png", b"image", 1) in entries


def test_a_name_with_more_dots_is_the_image_where_there_is_no_other() -> None:
    members = [("photo.v2.jpg", b""), ("photo.cls", b"1"), ("b.png", b"")]
    assert outline(read(pack(members))) == [("photo.v2.jpg", 1), ("b.png", None)]


def test_names_that_are_split_at_the_first_dot_are_not_lost_unseen() -> None:
    names = ["2021.01.01.jpg", "2021.01.02.jpg", "2021.01.03.jpg"]
    entries = read(pack([(name, b"") for name in names]))
    assert outline(entries) == [
        (names[0], None),
        (names[1], "duplicate_key", 1),
        (names[2], "duplicate_key", 1),
    ]
    assert isinstance(entries[1], Refusal)
    assert "names are split at the first dot, so the key is 2021" in entries[1].detail


def test_a_second_image_of_a_sample_is_refused() -> None:
    members = [("a.png", b"1"), ("a.jpg", b"2"), ("a.png", b"3"), ("a.cls", b"1"), ("a.cls", b"2")]
    entries = read(pack(members))
    assert sorted(outline(entries), key=str) == [
        ("a.cls", "duplicate_key", 1),
        ("a.jpg", "duplicate_key", 1),
        ("a.png", "duplicate_key", 1),
        ("a.png", 1),
    ]
    assert Item("a.png", b"1", 1) in entries


def test_a_key_that_comes_again_later_is_refused() -> None:
    members = [("a.png", b""), ("b.png", b""), ("a.png", b""), ("a.cls", b"1"), ("d/a.png", b"")]
    assert outline(read(pack(members))) == [
        ("a.png", None),
        ("b.png", None),
        ("a.png", "duplicate_key", 1),
        ("a.cls", "ignored", 0),
        ("d/a.png", None),
    ]


def test_a_label_that_comes_after_its_image_is_refused() -> None:
    members = [("a.png", b""), ("b.png", b""), ("c.png", b""), ("a.cls", b"1"), ("b.json", b"{")]
    members += [("b.txt", b"a dog"), ("c.json", b"{}"), ("c.txt", b"a cat")]
    entries = read(pack(members))
    assert outline(entries) == [
        ("a.png", None), ("b.png", None), ("c.png", None),
        ("a.cls", "duplicate_key", 1),
        ("b.json", "duplicate_key", 1), ("b.txt", "ignored", 0),
        ("c.json", "ignored", 0), ("c.txt", "ignored", 0),
    ]  # fmt: skip
    assert isinstance(entries[3], Refusal)
    assert entries[3].detail.startswith("its label came after its image, and the files of a sample")
    no_json = DATA.model_copy(update={"label_field": ""})
    assert ("b.json", "ignored", 0) in outline(read(pack(members), no_json))


@pytest.mark.parametrize(
    "first", ["", "a.cls b.cls", "a.png a.cls b.png b.cls", "a.png a.cls b.png b.cls d.png"]
)
def test_a_label_that_no_image_lacks_is_ignored(first: str) -> None:
    names = [*first.split(), "a.json", "b.json", "c.json", "a.txt", "b.txt"]
    assert not any(isinstance(entry, Refusal) for entry in read(pack([(n, b"7") for n in names])))


def test_files_that_belong_to_no_image_are_ignored() -> None:
    members = [("README", b""), ("a.txt", b"7"), ("a.xyz", b""), (".DS_Store", b""), ("b.png", b"")]
    members += [(".hidden.png", b""), ("__MACOSX/b.png", b""), ("d/._b.png", b"")]
    entries = outline(read(pack(members)))
    ignored = {name for name, *_ in entries} - {"b.png"}
    assert ignored == {name for name, _ in members} - {"b.png"}
    assert ("b.png", None) in entries


def test_an_empty_image_is_left_to_the_decoder() -> None:
    assert read(pack([("a.png", b"")])) == [Item("a.png", b"", None)]


def test_dots_that_name_no_directory_are_dropped() -> None:
    members = [("./a.png", b""), ("./a.cls", b"1"), ("d/./b.png", b""), ("././d/././b.cls", b"2")]
    assert outline(read(pack(members))) == [("a.png", 1), ("d/b.png", 2)]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/etc/a.png", "/etc/a.png"),
        ("../a.png", "../a.png"),
        ("d/../../a.png", "d/../../a.png"),
        ("d\\a.png", "d\\a.png"),
        ("C:a.png", "C:a.png"),
        ("a\nb.png", "a\\nb.png"),
        ("a\x1b[2Jb.png", "a\\x1b[2Jb.png"),
        (".//a.png", "/a.png"),
        ("d/./../a.png", "d/../a.png"),
    ],
)
def test_an_unsafe_name_is_refused(name: str, shown: str) -> None:
    entries = read(pack([(name, b"x"), ("../a.txt", b"x"), ("b.png", b"")]))
    assert outline(entries) == [
        (shown, "unsafe_name", 1),
        ("../a.txt", "ignored", 0),
        ("b.png", None),
    ]


def test_a_name_that_is_no_utf8_is_shown_escaped() -> None:
    content = header("a.png").replace(b"a.png", b"\xe9.png")
    assert outline(read(with_checksum(content) + bytes(1024))) == [("\\udce9.png", None)]


def test_a_name_of_a_megabyte_is_refused_and_cut() -> None:
    long, short = read(pack([("x" * 1_000_000 + ".png", b""), ("b.png", b"")]))
    assert isinstance(long, Refusal)
    assert long.reason == "unsafe_name"
    assert len(long.member) == 4096
    assert short == Item("b.png", b"", None)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"Z"],
)
def test_what_is_no_file_is_refused(kind: bytes) -> None:
    links = header("a.png", kind=kind, linkname="b.png") + header("c", kind=kind)
    entries = outline(read(links + pack([("b.png", b"")])))
    assert entries == [("a.png", "not_a_file", 1), ("c", "ignored", 0), ("b.png", None)]


def test_directories_are_passed_over() -> None:
    content = header("d.png/", kind=tarfile.DIRTYPE) + pack([("d.png/a.png", b"")])
    assert outline(read(content)) == [("d.png/a.png", None)]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tar_format: int) -> None:
    name = "/".join(["ordner-für-bilder"] * 20) + "/a.png"
    assert outline(read(pack([(name, b"x"), ("b.png", b"")], tar_format))) == [
        (name, None),
        ("b.png", None),
    ]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.AREGTYPE])
@pytest.mark.parametrize(
    ("magic", "rest", "name"),
    [
        (b"ustar\x0000", b"d", "d/a.png"),
        (b"ustar  \0", b"15301012131\x0015301000321\0", "a.png"),  # times of an incremental tar
        (bytes(8), b"", "a.png"),
    ],
)
def test_only_posix_keeps_the_start_of_a_name_elsewhere(
    kind: bytes, magic: bytes, rest: bytes, name: str
) -> None:
    block = header("a.png", kind=kind)
    block = block[:257] + magic + block[265:345] + rest.ljust(BLOCK - 345, b"\0")
    assert outline(read(with_checksum(block) + bytes(1024))) == [(name, None)]


def test_sparse_files_are_refused_and_their_content_is_passed_over() -> None:
    old = bytearray(header("a.png", size=600, kind=tarfile.GNUTYPE_SPARSE))
    old[482] = 1  # another block of the map follows
    more = bytes(504) + b"\x01" + bytes(7) + bytes(512)
    content = with_checksum(bytes(old)) + more + bytes(1024)
    info = tarfile.TarInfo("b.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "c.png"}
    content += info.tobuf(tarfile.PAX_FORMAT) + pack([("d.png", b"")])
    assert outline(read(content)) == [
        ("a.png", "not_a_file", 1),
        ("c.png", "not_a_file", 1),
        ("d.png", None),
    ]


def test_a_member_too_large_is_passed_over_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_FILE_BYTES", 1000)
    content = pack([("a.png", bytes(5000)), ("a.cls", b"1"), ("b.png", b"")])
    assert outline(read(content)) == [("a.png", "too_large", 1), ("b.png", None)]


def test_an_empty_file_is_refused() -> None:
    assert outline(read(b"")) == [("", "empty", 1)]
    assert outline(read(gzip.compress(b""))) == [("", "empty", 1)]


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"no tar file" * 100,
        b"\x1f\x8b\x08 no gzip",
        gzip.compress(b"no tar file" * 100, mtime=0),
    ],
)
def test_a_file_that_is_no_tar_is_refused(content: bytes) -> None:
    assert outline(read(content)) == [("", "unreadable_shard", 1)]


def test_a_tar_without_members_holds_nothing() -> None:
    assert read(pack([])) == []


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_compressed_tar_is_read(compress: Callable[[bytes], bytes]) -> None:
    content = pack([(f"{k}.png", random.Random(k).randbytes(9000)) for k in range(50)])
    assert read(compress(content)) == read(content)
    assert len(read(content)) == 50


def test_a_truncated_image_is_refused_and_stands_for_the_end() -> None:
    content = pack([("a.png", b"x" * 600), ("b.png", b"y" * 600)])
    place = content.index(b"yyy") + 10
    (a, b) = read(content[:place])
    assert a == Item("a.png", b"x" * 600, None)
    assert isinstance(b, Refusal)
    assert outline([b]) == [("b.png", "truncated", 1)]
    assert "after 10 of 600 bytes" in b.detail


def test_a_truncated_companion_refuses_its_sample_and_stands_for_the_end() -> None:
    content = pack([("a.png", b""), ("a.cls", b"12"), ("b.png", b"")])
    entries = read(content[: content.index(b"12\0\0") + 1])
    assert outline(entries) == [("a.png", "truncated", 1)]


@pytest.mark.parametrize("cut", [0, 100, BLOCK])
def test_an_image_whose_label_is_beyond_the_end_is_refused(cut: int) -> None:
    members = [(f"{k}{suffix}", b"1") for k in range(3) for suffix in (".png", ".cls")]
    place = pack(members).index(b"2.cls") + cut
    *others, last = read(pack(members)[:place])
    assert outline(others) == [("0.png", 1), ("1.png", 1)]
    assert outline([last]) == [("2.png", "truncated", 1)]
    # Without labels before it there is none to be missed.
    plain = [(name, content) for name, content in members if name.endswith(".png")]
    place = pack(plain).index(b"2.png") + 2 * BLOCK
    assert outline(read(pack(plain)[:place]))[2:] == [("2.png", None), ("", "unreadable_tail", 1)]


def test_a_tar_that_ends_at_any_byte_never_loses_an_image_unseen() -> None:
    content = pack([(f"{k}.png", b"x" * 100) for k in range(3)])
    for end in range(1, 4000):
        entries = read(content[:end])
        items = sum(isinstance(entry, Item) for entry in entries)
        refusals = [entry for entry in entries if isinstance(entry, Refusal)]
        has_mark = end > 3 * 2 * BLOCK + BLOCK - 1
        assert (items == 3) == (end >= 2 * 2 * BLOCK + BLOCK + 100)
        assert len(refusals) == (0 if has_mark else 1), end


def test_a_tar_without_an_end_mark_lists_its_tail() -> None:
    entries = read(pack([("a.png", b"")])[:BLOCK])
    assert outline(entries) == [("a.png", None), ("", "unreadable_tail", 1)]
    assert isinstance(entries[1], Refusal)
    assert entries[1].detail == "the archive has no end mark, at byte 512"


def test_a_damaged_header_lists_its_tail_with_the_images_lost() -> None:
    content = bytearray(pack([(f"{k}.png", b"x" * 3000) for k in range(20)]))
    place = 10 * (BLOCK + 3072)
    content[place + 3] ^= 1
    *items, tail = read(bytes(content))
    assert outline(items) == [(f"{k}.png", None) for k in range(10)]
    assert isinstance(tail, Refusal)
    assert outline([tail]) == [("", "unreadable_tail", 10)]
    assert tail.detail.startswith(f"a header is damaged (bad checksum), at byte {place:,}; ")


def test_a_tar_after_another_is_a_tail() -> None:
    first, second = pack([("a.png", b"x" * 9000)]), pack([("b.png", b"y" * 9000)])
    *items, tail = read(first + second)
    assert outline(items) == [("a.png", None)]
    assert outline([tail]) == [("", "unreadable_tail", 1)]
    assert isinstance(tail, Refusal)
    assert "goes on after its end mark" in tail.detail
    assert outline(read(first + bytes(100_000))) == [("a.png", None)]


@pytest.mark.parametrize("compress", COMPRESS)
def test_broken_compression_is_a_tail(compress: Callable[[bytes], bytes]) -> None:
    source = random.Random(0)
    members = [(f"{k:03d}.png", source.randbytes(4500).hex().encode()) for k in range(300)]
    whole = read(pack(members))
    content = bytearray(compress(pack(members)))
    place = len(content) // 2
    content[place : place + 64] = bytes(64)
    *entries, tail = read(bytes(content))
    assert entries[:90] == whole[:90]
    assert sum(isinstance(entry, Item) for entry in entries) < 200
    assert isinstance(tail, Refusal)
    assert tail.reason == "unreadable_tail"
    assert 80 < tail.count < 200


@pytest.mark.parametrize("compress", COMPRESS)
def test_compression_that_is_cut_short_is_told(compress: Callable[[bytes], bytes]) -> None:
    source = random.Random(0)
    content = pack([(f"{k:03d}.png", source.randbytes(9000)) for k in range(200)])
    whole, cut = read(content), compress(content)[:1_200_000]
    *entries, end = read(cut)
    assert entries == whole[: len(entries)]
    assert len(entries) > 90
    assert isinstance(end, Refusal)
    assert "data is cut short" in end.detail


def test_two_gzip_files_in_one_are_one_tar() -> None:
    content = pack([("a.png", b"x" * 5000), ("b.png", b"y" * 5000)])
    halves = gzip.compress(content[:4000]) + gzip.compress(content[4000:])
    assert read(halves) == read(content)


def test_a_wrong_checksum_of_gzip_is_told() -> None:
    content = bytearray(gzip.compress(pack([("a.png", b"x"), ("b.png", bytes(200_000))])))
    content[-5] ^= 1
    first, last = read(bytes(content))
    assert first == Item("a.png", b"x", None)
    assert isinstance(last, Refusal)
    assert "incorrect data check" in last.detail


def test_a_file_that_is_read_byte_by_byte_is_the_same() -> None:
    class Dribble(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(1, size or 0))

    content = gzip.compress(pack([("a.png", b"x" * 100), ("a.cls", b"1")]))
    assert list(iter_tar(Dribble(content), DATA)) == read(content)


@pytest.mark.parametrize(
    "start",
    [
        header("x", size=1 << 40, kind=tarfile.XHDTYPE),
        header("x", size=1 << 40, kind=tarfile.XGLTYPE),
        header("x", size=1 << 40, kind=tarfile.GNUTYPE_LONGNAME),
        header("x", size=-1024),
        header("x.png", size=1 << 80),
        header("x", size=5, kind=tarfile.GNUTYPE_LONGNAME) * 2000,
        header("x", kind=tarfile.XHDTYPE) * 2000,
        header("x", size=20, kind=tarfile.XHDTYPE) + b"20 size=-1234567890\n".ljust(512, b"\0"),
        header("x", size=20, kind=tarfile.XHDTYPE) + b"99999 path=12345678\n".ljust(512, b"\0"),
    ],
)
def test_a_hostile_header_costs_neither_memory_nor_time(start: bytes) -> None:
    filler = bytes(1 << 20) + random.Random(0).randbytes(1 << 20)
    tracemalloc.start()
    entries = read(pack([("a.png", b"x")])[: 2 * BLOCK] + start + filler * 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entries[0] == Item("a.png", b"x", None)
    assert {entry.reason for entry in entries[1:] if isinstance(entry, Refusal)} - {
        "too_large"
    } == {"unreadable_tail"}
    assert peak < 20 << 20


def test_attributes_before_one_member_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_headers, "MAX_EXTENDED_BYTES", 1 << 16)

    def attributes() -> Iterator[bytes]:
        for k in range(200):
            record = b"%d key%06d=%s\n" % (60_000, k, b"x" * (60_000 - 17))
            yield header("x", size=len(record), kind=tarfile.XHDTYPE)
            yield record.ljust(-(-len(record) // 512) * 512, b"\0")

    content = b"".join(attributes()) + pack([("a.png", b"x")])
    tracemalloc.start()
    assert outline(read(content)) == [("a.png", None)]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_members() -> None:
    def entries_of(count: int) -> int:
        members = [(f"{k:06d}.png", b"x" * 100) for k in range(count)]
        content = io.BytesIO(pack(members, tarfile.USTAR_FORMAT))
        tracemalloc.start()
        assert sum(1 for _ in iter_tar(content, DATA)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert entries_of(3000) - entries_of(500) < 200_000


def test_every_image_of_any_archive_ends_as_exactly_one_entry() -> None:
    source = random.Random(0)
    stems = ["a", "b", "d/a", "a.v1", "a.v2", ".a", "../a", "__MACOSX/a", "./b"]
    suffixes = [".png", ".jpg", ".cls", ".json", ".txt", ".xyz", ".seg.png"]
    for _ in range(200):
        names = [source.choice(stems) + source.choice(suffixes) for _ in range(12)]
        entries = read(pack([(name, b"7") for name in names]))
        images = [name.removeprefix("./") for name in names if name.endswith((".png", ".jpg"))]
        found = [e.member for e in entries if e.member.endswith((".png", ".jpg"))]
        assert sorted(found) == sorted(images)


def test_keys_are_told_apart_in_any_number() -> None:
    keys = _Keys()
    assert all(keys.add(f"d/{k}") for k in range(20_000))
    assert not any(keys.add(f"d/{k}") for k in range(20_000))
    assert keys.add("\udce9")


@pytest.mark.parametrize("error", [OSError("disk"), DataError("storage")])
def test_an_error_of_the_storage_is_not_taken_for_bad_content(
    failing_file: Callable[..., Any], error: Exception
) -> None:
    content = pack([(f"{k}.png", random.Random(k).randbytes(9000)) for k in range(20)])
    for file in (content, gzip.compress(content), bz2.compress(content)):
        with pytest.raises(type(error)) as raised:
            list(iter_tar(failing_file(file, error), DATA))
        assert raised.value is error


@pytest.mark.parametrize("compress", [bytes, *COMPRESS])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_damage_raises(
    iter_damaged: Callable[..., Iterator[bytes]],
    compress: Callable[[bytes], bytes],
    tar_format: int,
) -> None:
    members: Members = []
    for k in range(4):
        members += [(f"{'d' * 99}/{k}.png", struct.pack(">400H", *range(400))), (f"{k}.cls", b"1")]
    content = pack(members, tar_format)
    for damaged in iter_damaged(compress(content), 100):
        for entry in read(damaged):
            assert entry.member.isprintable()
    for damaged in iter_damaged(content, 100):
        blocks = [damaged[start : start + BLOCK] for start in range(0, len(damaged), BLOCK)]
        read(b"".join(with_checksum(b) if b[257:262] == b"ustar" else b for b in blocks))
