"""Every command that README.md and docs/ print, through the program's own parser."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup
from typer.exceptions import TyperException

from jobs.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = typer.main.get_command(app)
assert isinstance(PROGRAM, TyperGroup)
VERBS = PROGRAM.commands
# Where a shell, cron or systemd begins a command, in which variables may be set.
COMMAND = re.compile(r"(?:^|&& |ExecStart=)(?:[A-Z]+=\S+ )*(?:[\w./]*/)?raydiffusion +([a-z].*)")
SHELL = {"|", ">", ">>", "&&", ";"}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")


def commands_of(text: str) -> Iterator[tuple[list[str], bool]]:
    """The words after `raydiffusion` of each command, and whether a block shows it to be typed."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if found := COMMAND.search(line):
                yield words_of(found[1]), True
    for code in INLINE.findall(FENCE.sub("", text)):
        if found := COMMAND.search(" ".join(code.split())):
            yield words_of(found[1]), False


def words_of(command: str) -> list[str]:
    """The words of one command, without what a shell keeps; [NAME] and NAME are some number."""
    words = shlex.split(command, comments=True)
    end = next((k for k, word in enumerate(words) if word in SHELL), len(words))
    named = [re.sub(r"^\[(.+)\]$", r"\1", word) for word in words[:end] if word != "..."]
    return ["1" if re.fullmatch(r"[A-Z][A-Z_]*", word) else word for word in named]


def check_command(words: list[str]) -> None:
    """Has the verb's own parser read the words; nothing is run."""
    verb, *rest = words
    assert verb in VERBS, f"there is no verb {verb}"
    context = VERBS[verb].make_context(verb, list(rest))
    if verb == "submit" and context.params["command"][0] != "1":
        check_command(list(context.params["command"]))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_can_be_typed(page: Path) -> None:
    faults = []
    for words, is_typed in commands_of(page.read_text()):
        if len(words) == 1 and not is_typed and words[0] in VERBS:
            continue  # a verb that is spoken of
        try:
            check_command(words)
        except (TyperException, AssertionError) as error:
            faults.append(f"{' '.join(words)}: {error}")
    assert faults == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_are_spoken_of_exist(page: Path) -> None:
    """`retrain --accept-held SHARD` and the like, in the middle of a sentence."""
    faults = []
    for code in INLINE.findall(FENCE.sub("", page.read_text())):
        verb, *words = code.split() or [""]
        if verb not in VERBS or not words:
            continue
        known = {option for parameter in VERBS[verb].params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        faults += [f"{code}: {option}" for option in sorted(used - known)]
    assert faults == []


@pytest.mark.parametrize(
    "command",
    [
        "trian my.toml",
        "run",
        "run my.toml --no-wiat",
        "promote NAME VERSION",
        "drill CONFIG --kill wroker",
        "submit --adress URL run my.toml",
        "submit run my.toml --no-wiat",
        "gc --keep-runs",
    ],
)
def test_what_cannot_be_typed_is_found(command: str) -> None:
    with pytest.raises((TyperException, AssertionError)):
        check_command(words_of(command))


def test_commands_are_found_where_they_are_printed() -> None:
    text = """
Use `raydiffusion models [NAME]` or `PYTHONPATH=$PWD raydiffusion run
my.toml ...`, not `kubectl get raydiffusion run`.

```sh
.venv/bin/raydiffusion run my.toml \\
  --set a.b=c    # a comment
0 3 * * *  cd /srv && .venv/bin/raydiffusion retrain my.toml >> retrain.log 2>&1
docker build -t raydiffusion:0.1.0 .
```
"""
    assert list(commands_of(text)) == [
        (["run", "my.toml", "--set", "a.b=c"], True),
        (["retrain", "my.toml"], True),
        (["models", "1"], False),
        (["run", "my.toml"], False),
    ]
