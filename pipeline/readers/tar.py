"""WebDataset shards: tar files in which the files of a sample follow one another.

A sample is the files of one directory whose names agree up to the first dot. Which file is the
image of a sample, and what becomes of the others, is in `samples.py`; the headers are followed in
`tar_headers.py`.
"""

from array import array
from collections.abc import Iterator
from hashlib import blake2b

from pipeline.readers.entries import Entry, Ignored, Item, Refusal
from pipeline.readers.names import item_suffixes, judge_member, strip_here
from pipeline.readers.samples import Sample
from pipeline.readers.streams import InputStream, Readable
from pipeline.readers.tar_headers import BLOCK_BYTES, TarHeaders
from pipeline.settings import DataConfig


def iter_tar(file: Readable, data: DataConfig) -> Iterator[Entry]:
    """Yields the samples of a tar file, in their order.

    The label of an image is what `.cls`, `.json` or `.txt` of its sample say; other files are
    ignored. A label that comes later, by itself, is refused. A damaged or missing end is one
    refusal, with an estimate of the images lost.

    Args:
        file: read once from its start; may be compressed with gzip, bzip2 or xz.
        data: tells images from sequences, and the field of `.json`.
    """
    stream = InputStream(file)
    headers = TarHeaders(stream)
    num_images, is_cut = 0, False
    for entry in _iter_samples(stream, headers, data):
        if not isinstance(entry, Ignored):
            num_images += 1
            is_cut = isinstance(entry, Refusal) and entry.reason == "truncated"
        yield entry
    if stream.position == 0 and stream.fault is None:
        yield Refusal("", "empty", "the file is empty", hides_more=True)
    elif headers.position == 0 and headers.end != "mark":
        detail = f"it is no tar file: {stream.fault or headers.detail}"
        yield Refusal("", "unreadable_shard", detail, hides_more=True)
    else:
        yield from _judge_end(stream, headers, num_images, is_cut=is_cut)


def _judge_end(
    stream: InputStream, headers: TarHeaders, num_images: int, *, is_cut: bool
) -> Iterator[Refusal]:
    """What was lost after the last member, unless the image that was cut tells it already."""
    faults, lost_bytes = [headers.detail], stream.drain()
    if headers.end == "mark":
        faults = ["the archive goes on after its end mark"] if lost_bytes else []
    elif headers.end == "damaged":
        lost_bytes += BLOCK_BYTES
    num_read, lost_in_file = stream.num_read, 0
    if stream.fault is not None:
        faults.append(stream.fault)
        lost_in_file = stream.drain_file()
    if not faults or (is_cut and headers.end in ("cut", "empty") and not lost_in_file):
        return
    detail = f"{'; '.join(faults)}, at byte {headers.position:,}"
    if lost_bytes + lost_in_file:
        detail += f"; {lost_bytes + lost_in_file:,} bytes were not read"
    share = lost_bytes / max(1, headers.position) + lost_in_file / max(1, num_read)
    lost = max(1, round(share * num_images))
    yield Refusal("", "unreadable_tail", detail, lost, hides_more=not num_images)


def _iter_samples(stream: InputStream, headers: TarHeaders, data: DataConfig) -> Iterator[Entry]:
    suffixes, sample, has_labels = item_suffixes(data), None, False
    keys, unlabelled = _Keys(), _Keys()
    for member in headers:
        name = strip_here(member.name)
        if member.kind == "a directory":
            continue
        if (entry := judge_member(name, member.kind, suffixes)) is not None:
            yield entry
            continue
        dot = name.find(".", name.rfind("/") + 1)
        key = name if dot < 0 else name[:dot]
        if sample is None or sample.key != key:
            if sample is not None:
                for entry in sample.finish(data.label_field):
                    if isinstance(entry, Item):
                        has_labels |= entry.label is not None
                        if entry.label is None:
                            unlabelled.add(sample.key)
                    yield entry
            is_repeated = not keys.add(key)
            lacks_label = is_repeated and key in unlabelled
            sample = Sample(key, suffixes, is_repeated=is_repeated, lacks_label=lacks_label)
        yield from sample.add(name, member.size, stream)
    if sample is not None:
        may_lack = has_labels and headers.end != "mark"
        yield from sample.finish(data.label_field, may_lack=may_lack)


class _Keys:
    """Keys that have been, as 8 bytes of the hash of each: 16 to 32 MB for a million."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))  # 0: free
        self._count = 0

    def add(self, key: str) -> bool:
        """Remembers a key; whether it is new."""
        if 2 * self._count >= len(self._slots):
            old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
            for number in filter(None, old):
                self._slots[self._find(number)] = number
        number = _number_of(key)
        place = self._find(number)
        if self._slots[place]:
            return False
        self._slots[place] = number
        self._count += 1
        return True

    def __contains__(self, key: str) -> bool:
        return bool(self._slots[self._find(_number_of(key))])

    def _find(self, number: int) -> int:
        place = number % len(self._slots)
        while self._slots[place] not in (0, number):
            place = (place + 1) % len(self._slots)
        return place


def _number_of(key: str) -> int:
    digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1
