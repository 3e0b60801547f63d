import json
from typing import Any

import numpy as np
import pytest

from pipeline.readers.entries import Refused
from pipeline.readers.labels import TOO_LARGE, label_of, parse_label


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (7, 7), ("7", 7), (b" 7\n", 7), ("007", 7), (np.int64(7), 7), (np.uint8(0), 0),
        (2**63 - 1, 2**63 - 1), (-1, None), ("-1", None), (np.int32(-1), None), (None, None),
        ("cat", "cat"), (b"cat\n", "cat"), ("tabby cat", "tabby cat"), ("7.0", "7.0"),
        ("Größe", "Größe"), ("Größe".encode(), "Größe"), ("٧", "٧"), ("1_000", "1_000"),
        (np.str_("cat"), "cat"), (np.bytes_(b"cat"), "cat"), ("x" * 100, "x" * 100),
    ],
)  # fmt: skip
def test_whole_numbers_and_names_are_labels(value: Any, label: Any) -> None:
    parsed = parse_label(value)
    assert parsed == label
    assert type(parsed) is type(label)


@pytest.mark.parametrize(
    "value",
    [
        -2, "-2", 2**63, "9223372036854775808", "9" * 5000, "", " \n", b"", "x" * 101, "a\x00b",
        "a\nb", "a\u202eb", b"\xff\xfe", True, np.True_, 7.0, np.float32(7), float("nan"), [7],
        {"a": 7}, (), b"\x00",
    ],
)  # fmt: skip
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(Refused) as raised:
        parse_label(value)
    assert raised.value.reason == "label_invalid"
    assert raised.value.detail.isprintable()


@pytest.mark.parametrize(
    ("companions", "label"),
    [
        ({}, None),
        ({".cls": b"3"}, 3),
        ({".cls": b"-1", ".json": b'{"label": 5}'}, None),
        ({".cls": b"3", ".json": b'{"label": 5}', ".txt": b"7"}, 3),
        ({".json": b'{"label": 5}', ".txt": b"7"}, 5),
        ({".json": b'{"label": "dog"}'}, "dog"),
        ({".json": b'{"label": null}', ".txt": b"7"}, None),
        ({".json": b'\xef\xbb\xbf{"label": 5}'}, 5),
        ({".json": b'{"width": 5}', ".txt": b"7"}, 7),
        ({".json": b'["label"]'}, None),
        ({".txt": b" 7\n"}, 7),
        ({".txt": b"a photo of 7 cats"}, None),
        ({".txt": b"-5"}, None),
        ({".txt": b"\xff"}, None),
        ({".txt": TOO_LARGE}, None),
    ],
)
def test_the_label_comes_from_the_first_file_that_gives_one(
    companions: dict[str, bytes | str], label: Any
) -> None:
    assert label_of(companions, "label") == label


@pytest.mark.parametrize(
    ("companions", "fault"),
    [
        ({".cls": b"3.5.\x07"}, "do not print"),
        ({".cls": TOO_LARGE}, r"the \.cls file is larger than 1,048,576 bytes"),
        ({".json": "is cut short"}, r"the \.json file is cut short"),
        ({".json": b"{"}, "no valid JSON"),
        ({".json": b"[" * 100_000}, "no valid JSON"),
        ({".json": b"9" * 100_000}, "no valid JSON"),
        ({".json": b'{"label": NaN}'}, "a float is no label"),
        ({".json": b'{"label": [1, 2]}'}, "a list is no label"),
        ({".json": json.dumps({"label": "x" * 101}).encode()}, "has 101"),
    ],
)
def test_a_file_that_should_give_the_label_must(
    companions: dict[str, bytes | str], fault: str
) -> None:
    with pytest.raises(Refused, match=fault):
        label_of(companions, "label")


def test_the_directory_is_the_class_where_no_file_says_otherwise() -> None:
    assert label_of({}, "label", "cat") == "cat"
    assert label_of({}, "label", "7") == 7
    assert label_of({".txt": b"a caption"}, "label", "cat") == "cat"
    assert label_of({".cls": b"-1"}, "label", "cat") is None


def test_the_field_of_the_object_is_that_of_the_config() -> None:
    assert label_of({".json": b'{"label": 1, "breed": "pug"}'}, "breed") == "pug"
    assert label_of({".json": b'{"breed": null}'}, "breed", "dogs") is None


@pytest.mark.parametrize("content", [b'{"label": 1}', b"[1]", b"{}"])
def test_a_field_that_the_config_names_must_be_there(content: bytes) -> None:
    with pytest.raises(Refused, match=r"the \.json file has no field breed") as caught:
        label_of({".json": content, ".txt": b"7"}, "breed", "dogs")
    assert caught.value.reason == "label_missing"


@pytest.mark.parametrize("content", [b'{"": 1, "label": 2}', b"{", TOO_LARGE, "is cut short"])
def test_an_empty_field_reads_no_object(content: bytes | str) -> None:
    assert label_of({".json": content}, "") is None
    assert label_of({".json": content}, "", "dogs") == "dogs"
    assert label_of({".json": content, ".txt": b"7"}, "") == 7
