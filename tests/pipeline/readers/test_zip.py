import io
import random
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.readers import zip_members
from pipeline.readers.entries import Entry, Ignored, Item, Refusal
from pipeline.readers.zip import iter_zip
from pipeline.settings import DataConfig

Members = list[tuple[str, bytes]]
DATA = DataConfig(sources=("x",), resolution=8)
SEQUENCES = DataConfig(sources=("x",), sequence_shape=(1, 4))
STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14


def pack(members: Members, method: int = STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def in_directory(content: bytes, name: str) -> int:
    """Where the central directory's entry of a member begins."""
    return content.rindex(name.encode()) - 46


def patch(content: bytes, place: int, layout: str, value: int) -> bytes:
    return content[:place] + struct.pack(layout, value) + content[place + struct.calcsize(layout) :]


def read(content: bytes, data: DataConfig = DATA) -> list[Entry]:
    return list(iter_zip(io.BytesIO(content), data))


def outline(entries: list[Entry]) -> list[tuple[Any, ...]]:
    kinds: list[tuple[Any, ...]] = []
    for entry in entries:
        match entry:
            case Item(member, _, label):
                kinds.append((member, label))
            case Refusal(member, reason, _, _):
                kinds.append((member, reason))
            case Ignored(member):
                kinds.append((member, "ignored"))
    return kinds


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_every_image_comes_with_its_directory_as_class(method: int) -> None:
    members = [(f"{name}/{k}.png", b"%d" % k * 9000) for k in range(5) for name in ("cat", "3")]
    assert read(pack(members, method)) == [
        Item(name, content, "cat" if name.startswith("cat") else 3) for name, content in members
    ]


def test_an_image_at_the_top_has_no_class() -> None:
    members = [("a.png", b""), ("./b.png", b""), ("train/cats/./c.png", b""), ("-1/d.png", b"")]
    assert outline(read(pack(members))) == [
        ("a.png", None),
        ("b.png", None),
        ("train/cats/c.png", "cats"),
        ("-1/d.png", None),
    ]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [("äpfel".encode(), "äpfel"), (b"\x84pfel", "äpfel"), (b"\xe4\xffl", "Σ\\xa0l")],
)
def test_a_name_in_utf_8_that_does_not_say_so_is_read(raw: bytes, shown: str) -> None:
    content = pack([("x" * len(raw) + "/1.png", b"")]).replace(b"x" * len(raw), raw)
    (entry,) = read(content)
    assert entry.member == f"{shown}/1.png"


def test_companions_give_the_label_wherever_they_lie() -> None:
    members = [
        ("cat/a.png", b""), ("cat/b.v2.png", b""), ("dog/c.png", b""), ("dog/d.png", b""),
        ("dog/e.JPG", b""), ("cat/a.cls", b"1"), ("cat/b.v2.json", b'{"label": "pug"}'),
        ("dog/c.txt", b"a dog"), ("cat/d.cls", b"2"), ("dog/e.TXT", b"5"),
    ]  # fmt: skip
    assert outline(read(pack(members))) == [
        ("cat/a.png", 1),
        ("cat/b.v2.png", "pug"),
        ("dog/c.png", "dog"),
        ("dog/d.png", "dog"),
        ("dog/e.JPG", 5),
        ("cat/d.cls", "ignored"),
    ]


def test_an_invalid_label_refuses_its_image_only() -> None:
    members = [("a.png", b""), ("a.cls", b"-7"), ("b\u202ec/b.png", b""), ("c.png", b"")]
    members += [("c.json", b"7" * (2 << 20))]
    assert outline(read(pack(members))) == [
        ("a.png", "label_invalid"),
        ("b\\u202ec/b.png", "label_invalid"),
        ("c.png", "label_invalid"),
    ]


def test_sequences_are_npy_files() -> None:
    content = pack([("a.npy", b"x"), ("b.png", b"x")])
    assert outline(read(content, SEQUENCES)) == [("a.npy", None), ("b.png", "ignored")]


def test_files_that_are_no_images_are_ignored() -> None:
    names = ["README", "a.gif", "a/.b.png", ".git/c.png", "__MACOSX/._a.png", "Thumbs.db", "x.cls"]
    assert outline(read(pack([(name, b"") for name in names]))) == [
        (name, "ignored") for name in names
    ]


def test_directories_are_passed_over() -> None:
    unix = zipfile.ZipInfo("e.png")
    unix.create_system, unix.external_attr = 3, (stat.S_IFDIR | 0o755) << 16
    buffer = io.BytesIO(pack([("d.png/", b"")]))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(unix, b"")
    assert read(buffer.getvalue()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_again_is_refused() -> None:
    members = [("a.png", b"1"), ("a.png", b"2"), ("a.cls", b"3"), ("a.cls", b"4")]
    entries = read(pack(members))
    assert entries[0] == Item("a.png", b"1", 3)
    assert outline(entries[1:]) == [("a.png", "duplicate_key"), ("a.cls", "duplicate_key")]


@pytest.mark.parametrize("name", ["/a.png", "../a.png", "d\\a.png", "C:/a.png", "a\tb.png"])
def test_an_unsafe_name_is_refused(name: str) -> None:
    entries = read(pack([(name, b"x"), ("b.png", b"")]))
    assert outline(entries) == [(name.replace("\t", "\\t"), "unsafe_name"), ("b.png", None)]


def test_a_name_with_a_hidden_end_is_refused() -> None:
    content = pack([("a.pngX.png", b"x")]).replace(b"a.pngX.png", b"a.png\0.png")
    assert outline(read(content)) == [("a.png\\x00.png", "unsafe_name")]


def test_a_link_is_refused() -> None:
    link = zipfile.ZipInfo("a.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert outline(read(buffer.getvalue())) == [("a.png", "not_a_file")]


def test_an_empty_image_is_left_to_the_decoder() -> None:
    assert read(pack([("a.png", b"")])) == [Item("a.png", b"", None)]


@pytest.mark.parametrize("content", [b"x", b"no zip file" * 100, b"PK\x05\x06"])
def test_a_file_that_is_no_zip_is_refused(content: bytes) -> None:
    assert outline(read(content)) == [("", "unreadable_shard")]


def test_an_empty_file_is_refused_and_an_empty_zip_holds_nothing() -> None:
    assert outline(read(b"")) == [("", "empty")]
    assert read(pack([])) == []


def test_a_zip_without_its_directory_is_refused() -> None:
    content = pack([(f"{k}.png", b"x" * 500) for k in range(5)])
    for end in (10, 600, len(content) - 30, len(content) - 1):
        assert outline(read(content[:end])) == [("", "unreadable_shard")]


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_wrong_checksum_refuses_its_member_only(method: int) -> None:
    texts = [random.Random(k).randbytes(900) for k in range(3)]
    content = bytearray(pack([(f"{k}.png", text) for k, text in enumerate(texts)], method))
    content[content.index(b"1.png") + 400] ^= 1
    assert outline(read(bytes(content))) == [
        ("0.png", None),
        ("1.png", "undecodable"),
        ("2.png", None),
    ]


def test_a_damaged_companion_refuses_its_image() -> None:
    content = bytearray(pack([("a.png", b""), ("a.cls", b"1")]))
    content[content.index(b"a.cls") + 5] = ord("2")
    (entry,) = read(bytes(content))
    assert isinstance(entry, Refusal)
    assert entry.reason == "label_invalid"
    assert "the .cls file cannot be read: Bad CRC-32" in entry.detail


@pytest.mark.parametrize(
    ("offset", "layout", "value", "detail"),
    [
        (8, "<H", 1, "encrypted"),
        (10, "<H", 99, "compression method 99 is not read"),
        (42, "<I", 1 << 31, "outside of the archive"),
        (42, "<I", 36, "Bad magic number"),
        (24, "<I", 10, "Bad CRC-32"),
    ],
)
def test_a_member_that_cannot_be_read_is_refused(
    offset: int, layout: str, value: int, detail: str
) -> None:
    content = pack([("a.png", b""), ("b.png", b"x" * 900)], DEFLATED)
    content = patch(content, in_directory(content, "b.png") + offset, layout, value)
    other, entry = read(content)
    assert isinstance(entry, Refusal)
    assert entry.reason == "undecodable"
    assert detail in entry.detail
    assert other == Item("a.png", b"", None)


def test_a_member_that_holds_less_than_it_declares_is_truncated() -> None:
    content = pack([("a.png", b"x" * 900)])
    place = in_directory(content, "a.png")
    content = patch(patch(content, place + 20, "<I", 5000), place + 24, "<I", 5000)
    assert outline(read(content)) == [("a.png", "truncated")]


def test_a_member_too_large_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_members, "MAX_FILE_BYTES", 1000)
    content = pack([("a.png", bytes(1001)), ("b.png", bytes(1000))], DEFLATED)
    assert outline(read(content)) == [("a.png", "too_large"), ("b.png", None)]


@pytest.mark.parametrize("method", [DEFLATED, BZIP2, LZMA])
def test_a_bomb_costs_no_memory(method: int) -> None:
    content = pack([("a.png", bytes(1 << 26))], method)
    content = patch(content, in_directory(content, "a.png") + 24, "<I", 1000)
    tracemalloc.start()
    assert outline(read(content)) == [("a.png", "undecodable")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_members_that_overlap_are_refused() -> None:
    content = pack([("a.png", b"x" * 900), ("b.png", b"y" * 900), ("c.png", b"")])
    content = patch(content, in_directory(content, "b.png") + 42, "<I", 0)
    assert [kind for _, kind in outline(read(content))] == ["undecodable", "undecodable", None]
    content = patch(content, in_directory(content, "b.png") + 42, "<I", 500)
    entry = read(content)[0]
    assert isinstance(entry, Refusal)
    assert entry.detail == "it overlaps another member"


def test_a_zip_after_another_tells_that_there_is_more() -> None:
    first, second = pack([("a.png", b"")]), pack([("b.png", b"")])
    assert outline(read(first + second)) == [("", "unreadable_shard"), ("b.png", None)]
    assert outline(read(b"#!/bin/sh\n" + second)) == [("b.png", None)]


def test_a_directory_that_ends_before_its_time_tells_that_there_is_more() -> None:
    content = pack([("a/0.png", b"0"), ("b/1.png", b"1"), ("b/2.png", b"2")])
    comment = in_directory(content, "b/1.png") + 32
    first, *items = read(patch(content, comment, "<H", 0xFFFF))  # it hides what follows
    assert first == Refusal(
        "", "unreadable_shard", "its directory counts 3 members, 2 can be read in it",
        hides_more=True,
    )  # fmt: skip
    assert [item.member for item in items if isinstance(item, Item)] == ["a/0.png", "b/1.png"]


def test_more_members_than_the_short_count_holds_are_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)  # beyond it zipfile writes the long one
    content = pack([(f"a/{k}.png", b"x") for k in range(4)])
    assert b"PK\x06\x06" in content
    assert len(read(content)) == 4
    place = content.rindex(b"PK\x06\x06") + 32
    short = content.rindex(b"PK\x05\x06") + 10
    first, *items = read(patch(patch(content, place, "<Q", 5), short, "<H", 0xFFFF))
    assert isinstance(first, Refusal)
    assert first.detail == "its directory counts 5 members, 4 can be read in it"
    assert len(items) == 4


def test_a_short_count_may_have_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_members, "_COUNTS", 4)
    content = pack([(f"a/{k}.png", b"x") for k in range(6)])
    counts = {2: 6, 1: 7, 7: 7}
    for short, entries in counts.items():
        changed = patch(content, content.rindex(b"PK\x05\x06") + 10, "<H", short)
        assert len(read(changed)) == entries


def test_a_directory_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_members, "MAX_DIRECTORY_BYTES", 1 << 17)
    content = pack([(f"{k:060d}.png", b"") for k in range(1500)])
    assert outline(read(content)) == [("", "unreadable_shard")]


@pytest.mark.parametrize("error", [OSError("disk"), DataError("storage")])
def test_an_error_of_the_storage_is_not_taken_for_bad_content(
    failing_file: Callable[..., Any], error: Exception
) -> None:
    content = pack([(f"{k}.png", b"x" * 500) for k in range(40)])
    for start in (content, content[:9000]):
        with pytest.raises(type(error)) as raised:
            list(iter_zip(failing_file(start, error), DATA))
        assert raised.value is error


@pytest.mark.parametrize("error", [OSError("disk"), DataError("storage")])
def test_an_error_of_the_storage_amid_the_members_is_raised(error: Exception) -> None:
    class Failing(io.BytesIO):
        is_broken = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.is_broken:
                raise error
            return super().read(size)

    file = Failing(pack([("a.png", b"x"), ("b.png", b"y")]))
    entries = iter_zip(file, DATA)
    assert next(entries) == Item("a.png", b"x", None)
    file.is_broken = True
    with pytest.raises(type(error)) as raised:
        next(entries)
    assert raised.value is error


@pytest.mark.parametrize("method", [STORED, DEFLATED, BZIP2, LZMA])
def test_no_damage_raises(iter_damaged: Callable[..., Iterator[bytes]], method: int) -> None:
    members: Members = []
    for k in range(4):
        members += [(f"cat/{k}.png", b"x%d" % k * 100), (f"cat/{k}.cls", b"1")]
    for damaged in iter_damaged(pack(members, method), 300):
        for entry in read(damaged):
            assert entry.member.isprintable()
