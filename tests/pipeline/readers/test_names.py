import pytest

from pipeline.readers.entries import Ignored, Refusal
from pipeline.readers.names import describe, judge_member, show


@pytest.mark.parametrize("name", ["a.png", "d/e/a.PNG", "a..b.png", "Größe/été.png", "ab:c.png"])
def test_an_ordinary_name_is_looked_at(name: str) -> None:
    assert judge_member(name, "a file", (".png",)) is None


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("../a.png", "a file", "unsafe_name"),
        ("../.a.png", "a file", "unsafe_name"),
        ("c:/a.png", "a file", "unsafe_name"),
        ("a\x00.png", "a file", "unsafe_name"),
        ("a\x7f.png", "a file", "unsafe_name"),
        ("a\x85.png", "a file", "unsafe_name"),
        ("x" * 5000 + ".png", "a file", "unsafe_name"),
        ("a.png", "a pipe", "not_a_file"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(name: str, kind: str, reason: str) -> None:
    entry = judge_member(name, kind, (".png",))
    assert isinstance(entry, Refusal)
    assert entry.reason == reason
    assert entry.member.isprintable()


@pytest.mark.parametrize("name", ["", "../a", ".a.png", ".d/a.png", "__MACOSX/a.png", "a\n"])
def test_what_is_hidden_or_no_image_is_ignored(name: str) -> None:
    assert judge_member(name, "a file", (".png",)) == Ignored(show(name))
    assert judge_member("a", "a pipe", (".png",)) == Ignored("a")


def test_text_is_shown_on_one_line() -> None:
    assert show("a\n\x1b\udce9\u202eb") == "a\\n\\x1b\\udce9\\u202eb"
    assert show("x" * 50, 10) == "x" * 9 + "…"
    assert describe(ValueError("first\nsecond")) == "first second"
    assert describe(EOFError()) == "EOFError"
    assert len(describe(ValueError("x" * 5000))) == 200
