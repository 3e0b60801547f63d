"""Samples of a WebDataset: which of the files that share a key is the image, and its label."""

from collections.abc import Iterator

from pipeline.readers.entries import MAX_FILE_BYTES, Entry, Ignored, Item, Refusal, Refused
from pipeline.readers.labels import (
    CUT_SHORT,
    LABEL_SUFFIXES,
    MAX_LABEL_BYTES,
    TOO_LARGE,
    label_of,
)
from pipeline.readers.names import show
from pipeline.readers.streams import InputStream

_MUST_FOLLOW = "the files of a sample must follow one another"


class Sample:
    """The files of one key while they follow one another; the content of one image at most.

    The image is the file whose name is the key and a suffix, such as `a.png`; without one it is
    the first with a longer name, such as `a.v2.png`, which otherwise is a mask or the like.

    Args:
        key: the common start of the names.
        suffixes: those of images, or of sequences.
        is_repeated: whether the key came before, so that nothing here is used.
        lacks_label: whether an image came with it and had none: labels alone come too late.
    """

    def __init__(
        self, key: str, suffixes: tuple[str, ...], *, is_repeated: bool, lacks_label: bool = False
    ) -> None:
        self.key = key
        self._suffixes, self._is_repeated = suffixes, is_repeated
        self._is_late = lacks_label  # unless an image comes again
        self._image: Item | Refusal | None = None
        self._spare: Item | Refusal | None = None  # the first with a longer name
        self._others: list[str] = []  # further ones with a longer name
        self._companions: dict[str, bytes | str] = {}
        self._companion_names: list[str] = []

    def add(self, name: str, size: int, stream: InputStream) -> Iterator[Entry]:
        """Takes in a file, or yields what else becomes of it.

        Args:
            name: begins with the key.
            size: of the content, in bytes.
            stream: stands at the start of the content, which is read if it is needed.
        """
        rest = name[len(self.key) :].lower()
        is_image, is_label = rest.endswith(self._suffixes), rest in LABEL_SUFFIXES
        if self._is_repeated and is_image:
            self._is_late = False
            yield self._refuse(name, f"its key came before, and {_MUST_FOLLOW}")
        elif is_image and rest in self._suffixes:
            if self._image is None:
                if self._spare is not None:
                    self._others.insert(0, self._spare.member)
                    self._spare = None
                self._image = _read_item(name, size, stream)
            else:
                yield self._refuse(name, f"{self._image.member} is the image of this sample")
        elif is_image and self._image is None:
            if self._spare is None:
                self._spare = _read_item(name, size, stream)
            else:
                self._others.append(show(name))
        elif is_label:
            if rest in self._companions:
                yield self._refuse(name, "the sample has this file already")
            else:
                self._companions[rest] = _read_companion(size, stream)
                self._companion_names.append(show(name))
        else:
            yield Ignored(show(name))

    def finish(self, label_field: str, *, may_lack: bool = False) -> Iterator[Entry]:
        """Yields the image with its label, and what becomes of the files not yielded before.

        Args:
            label_field: of the object in `.json`.
            may_lack: whether the archive ends too early, and samples before had labels: one without
                is refused.
        """
        item = self._image or self._spare
        if item is None:
            names = self._companion_names
            if self._is_late and self._gives_label(label_field):
                name, *names = names
                yield self._refuse(name, f"its label came after its image, and {_MUST_FOLLOW}")
            yield from map(Ignored, names)
        elif isinstance(item, Refusal):
            yield item
        else:
            try:
                label = label_of(self._companions, label_field)
                if label is None and may_lack and not self._companions:
                    raise Refused("truncated", "the archive ends where its label would be")
                yield Item(item.member, item.content, label)
            except Refused as refused:
                yield Refusal(item.member, refused.reason, refused.detail)
        for name in self._others:
            if self._image is None and item is not None:
                yield self._refuse(name, f"{item.member} is the image of this sample")
            else:
                yield Ignored(name)

    def _gives_label(self, label_field: str) -> bool:
        try:
            return label_of(self._companions, label_field) is not None
        except Refused:  # with its image that would be
            return True

    def _refuse(self, name: str, detail: str) -> Refusal:
        key = show(self.key, 100)
        split = f"names are split at the first dot, so the key is {key}"
        return Refusal(show(name), "duplicate_key", f"{detail}; {split}")


def _read_item(name: str, size: int, stream: InputStream) -> Item | Refusal:
    if size > MAX_FILE_BYTES:
        detail = f"{size:,} bytes are more than {MAX_FILE_BYTES:,}"
        return Refusal(show(name), "too_large", detail)
    content = stream.read(size)
    if len(content) < size:
        detail = stream.fault or "the archive ends"
        where = f"after {len(content):,} of {size:,} bytes"
        return Refusal(show(name), "truncated", f"{detail}, {where}")
    return Item(show(name), content)


def _read_companion(size: int, stream: InputStream) -> bytes | str:
    if size > MAX_LABEL_BYTES:
        return TOO_LARGE
    content = stream.read(size)
    return content if len(content) == size else CUT_SHORT
