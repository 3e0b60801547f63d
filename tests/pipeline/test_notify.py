"""Who is told how a run ended: real commands, a real web server, and runs that fail."""

import errno
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import notify as module
from pipeline.config import load_config, override_config
from pipeline.driver import run_config
from pipeline.errors import BusyError, ConfigError, DataError
from pipeline.notify import notify, tells_how_it_ended
from pipeline.runs import RunRecord
from pipeline.settings import Config, DataConfig, NotifyConfig
from pipeline.storage import open_storage
from pipeline.webhooks import RETRY_DELAYS_S

SECRET = "T0K3N"
UNTOLD = "steps/promote/k/untold"
WRITE = "import os, sys; open(sys.argv[1], 'wb').write({what})"
STDIN, FILE = (
    "sys.stdin.buffer.read()",
    "open(os.environ['RAYDIFFUSION_NOTIFICATION'], 'rb').read()",
)
EVENT = "os.environ['RAYDIFFUSION_EVENT'].encode()"


@dataclass
class Hook:
    """A web server that answers as it is told, and remembers what it got."""

    url: str
    answers: list[int] = field(default_factory=list)
    got: list[tuple[str, str, Any]] = field(default_factory=list)


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hook.got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(hook.answers.pop(0) if hook.answers else 200)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            hook.got.append((self.path, "GET", None))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hook.url = f"http://127.0.0.1:{server.server_port}/hooks/{SECRET}"
    yield hook
    server.shutdown()
    thread.join()
    server.server_close()


def config_of(**receivers: Any) -> Config:
    data = DataConfig(sources=("x",), resolution=8)
    return Config(name="t", data=data, notify=NotifyConfig(**receivers))


def python(code: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *args)


@pytest.mark.parametrize("what", [STDIN, FILE])
def test_a_command_gets_the_document_both_ways(tmp_path: Path, what: str) -> None:
    written = tmp_path / "written"
    config = config_of(on_success=python(WRITE.format(what=what), str(written)))
    assert notify(config, "success", {"text": "done", "run": "t-1"}) is None
    assert json.loads(written.read_bytes()) == {"event": "success", "text": "done", "run": "t-1"}


def test_a_command_is_told_which_event_it_is(tmp_path: Path) -> None:
    written = tmp_path / "written"
    config = config_of(on_promote=python(WRITE.format(what=EVENT), str(written)))
    assert notify(config, "promote", {}) is None
    assert written.read_text() == "promote"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (("no-such-program", SECRET), r"no-such-program cannot be started: No such file"),
        (python("import sys; sys.exit('no such list')"), r"ended with 1: no such list$"),
        (python("import time; time.sleep(600)", SECRET), r"took more than 0.2 s, and was ended$"),
    ],
)
def test_a_command_that_fails_is_a_sentence(command: tuple[str, ...], fault: str) -> None:
    timeout_s = 0.2 if SECRET in command else 30.0
    said = notify(config_of(on_failure=command, timeout_s=timeout_s), "failure", {})
    assert said is not None
    assert said.startswith("notify.on_failure: the command ")
    assert re.search(fault, said), said
    assert SECRET not in said


def test_nobody_is_told_what_nobody_wants_to_know(hook: Hook) -> None:
    assert notify(config_of(on_failure=hook.url), "success", {}) is None
    assert hook.got == []


def test_a_webhook_gets_the_document(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HOOK", hook.url)
    assert notify(config_of(on_failure="env:MY_HOOK"), "failure", {"text": "broken"}) is None
    (request,) = hook.got
    assert request == (
        f"/hooks/{SECRET}", "application/json", {"event": "failure", "text": "broken"}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "requests", "fault"),
    [
        ([503, 429, 200], 3, None),
        ([500, 500, 500], 3, "the webhook at 127.0.0.1 answered 500, 3 times"),
        ([404], 1, "the webhook at 127.0.0.1 answered 404"),
        ([302], 1, "the webhook at 127.0.0.1 answered 302"),  # a GET elsewhere would tell nobody
    ],
)
def test_a_webhook_that_is_overloaded_is_tried_again(
    hook: Hook, answers: list[int], requests: int, fault: str | None
) -> None:
    hook.answers, slept = answers, []
    said = notify(config_of(on_success=hook.url), "success", {}, sleep=slept.append)
    assert said == (fault and f"notify.on_success: {fault}")
    assert len(hook.got) == requests
    assert slept == list(RETRY_DELAYS_S[: requests - 1]) or fault is not None


def test_a_webhook_that_is_not_there_is_a_sentence_without_its_url(hook: Hook) -> None:
    url = f"http://127.0.0.1:1/{SECRET}"
    said = notify(config_of(on_success=url), "success", {}, sleep=lambda seconds: None)
    expected = "the webhook at 127.0.0.1 cannot be reached (Connection refused), 3 times"
    assert said == f"notify.on_success: {expected}"


def test_a_variable_without_a_url_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HOOK", SECRET)
    for name in ("MY_HOOK", "NOT_SET_ANYWHERE"):
        said = notify(config_of(on_success=f"env:{name}"), "success", {})
        assert said is not None
        assert f"the variable {name} holds no URL" in said
        assert SECRET not in said


@pytest.mark.parametrize(
    "value",
    [f'"ftp://{SECRET}"', f'"{SECRET}"', "[]", '[""]', '"env:"', "3", '["a", 3]', '"http://"'],
)
def test_what_is_no_receiver_is_refused_without_being_shown(tiny_config: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"notify.on_failure: must be a command") as raised:
        load_config(tiny_config, [f"notify.on_failure={value}"])
    assert SECRET not in str(raised.value)


def test_receivers_are_in_no_record_and_survive_overrides(tiny_config: Path) -> None:
    config = load_config(tiny_config, [f"notify.on_failure=https://example.org/{SECRET}"])
    assert SECRET not in config.model_dump_json()
    storage = open_storage(str(tiny_config.parent / "root"))
    RunRecord(storage, "r", config, [])
    assert SECRET.encode() not in storage.read("runs/r/run.json")
    changed = override_config(config, ["train.num_steps=7"])
    assert (changed.train.num_steps, changed.notify) == (7, config.notify)


def test_a_run_that_fails_before_it_begins_is_told(tiny_config: Path, hook: Hook) -> None:
    overrides = [
        f"notify.on_failure={hook.url}", f"storage.root={tiny_config.parent / 'root'}",
        'data.sources=["no/*.tar"]',
    ]  # fmt: skip
    with pytest.raises(DataError):
        run_config(load_config(tiny_config, overrides), observer=lambda event: None)
    (_, _, document) = hook.got[0]
    assert (document["event"], document["name"], document["run"]) == ("failure", "tiny", None)
    assert document["error"]["kind"] == "DataError"
    assert document["error"]["exit_code"] == 3
    assert document["text"].startswith("tiny: a run failed: There are no images at")


def make_runner(
    tmp_path: Path, actions: Mapping[str, str], error: Exception | None = None
) -> Callable[..., Any]:
    """A function as `run_config` is, that plans steps and ends as it is told."""
    steps = [SimpleNamespace(step=SimpleNamespace(name=n), action=a) for n, a in actions.items()]
    plan = SimpleNamespace(storage=open_storage(str(tmp_path)), run="t-1", steps=steps)

    @tells_how_it_ended
    def run(config: Config, *, observer: Any, on_plan: Any = lambda plan: None) -> Any:
        on_plan(plan)
        if error is not None:
            raise error
        if actions.get("promote") == "run":
            plan.storage.replace(UNTOLD, b"")
        metrics = {
            "evaluate": {"metric": "fid[x]", "value": 9.5},
            "promote": {"version": 2, "promoted": True, "reason": "lower"},
        }
        manifests = {
            name: {"step": name, "key": "k", "metrics": metrics.get(name, {})} for name in actions
        }
        return SimpleNamespace(plan=plan, manifests=manifests, report="r.html", search=None)

    return run


def tell_all(hook: Hook, run: Callable[..., Any]) -> list[Any]:
    events: list[Any] = []
    config = config_of(on_success=hook.url, on_failure=hook.url, on_promote=hook.url)
    run(config, observer=events.append)
    return events


@pytest.mark.parametrize(
    ("actions", "told"),
    [
        ({"evaluate": "run", "promote": "run"}, ["success", "promote"]),
        ({"train": "extend", "evaluate": "run"}, ["success"]),
        ({"evaluate": "cached", "promote": "cached", "report": "run"}, ["success"]),
        ({"evaluate": "cached", "promote": "cached"}, []),  # nothing new
    ],
)
def test_what_is_told_of_a_run_that_ends_well(
    tmp_path: Path, hook: Hook, actions: dict[str, str], told: list[str]
) -> None:
    tell_all(hook, make_runner(tmp_path, actions))
    assert [document["event"] for _, _, document in hook.got] == told
    if "promote" in actions and told:
        document = hook.got[0][2]
        assert document["text"] == "t: t-1 is done, fid[x] 9.5; version 2 promoted: lower"
        assert (document["report"], document["promotion"]["version"]) == ("r.html", 2)


@pytest.mark.parametrize("report", ["run", "cached"])
def test_a_promotion_that_a_kill_left_untold_is_told_by_the_next_run_and_once(
    tmp_path: Path, hook: Hook, report: str
) -> None:
    storage = open_storage(str(tmp_path))
    storage.replace(UNTOLD, b"")  # as the step promote leaves it
    actions = {"evaluate": "cached", "promote": "cached", "report": report}
    for _ in range(2):
        tell_all(hook, make_runner(tmp_path, actions))
    told = [document["event"] for _, _, document in hook.got]
    assert told == (["success", "promote", "success"] if report == "run" else ["promote"])
    assert not storage.exists(UNTOLD)


def test_failures_are_told_but_not_that_another_process_is_at_it(
    tmp_path: Path, hook: Hook
) -> None:
    with pytest.raises(OSError, match="odd"):
        tell_all(hook, make_runner(tmp_path, {"train": "run"}, OSError("odd")))
    with pytest.raises(BusyError):
        tell_all(hook, make_runner(tmp_path, {"train": "run"}, BusyError("busy")))
    (request,) = hook.got
    assert request[2]["text"] == "t: t-1 failed: odd"
    assert request[2]["error"] == {"kind": "OSError", "message": "odd", "exit_code": 1}


def test_a_failure_to_tell_is_a_note_and_fails_nothing(tmp_path: Path, hook: Hook) -> None:
    hook.answers = [400]
    (event,) = tell_all(hook, make_runner(tmp_path, {"train": "run"}))
    assert (event.kind, event.step) == ("note", "notify")
    assert event.fields["text"] == "notify.on_success: the webhook at 127.0.0.1 answered 400"


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            lambda patch: patch.setattr(tempfile, "tempdir", "/proc/no/such/place"),
            "the command cat cannot be given the document: No such file or directory",
        ),
        (
            lambda patch: patch.setattr(Path, "write_bytes", fill_the_disk),
            "the command cat cannot be given the document: No space left on device",
        ),
        (
            lambda patch: patch.setattr(module, "read_run", lambda *_: {}["execution"]),
            "it could not be told (KeyError)",
        ),
    ],
    ids=["no place for files", "a full disk", "a bug"],
)
def test_what_ends_a_run_is_not_what_goes_wrong_with_telling_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], fault: str
) -> None:
    run, events = make_runner(tmp_path, {"train": "run"}, DataError("No. Try again.")), []
    with monkeypatch.context() as spoilt:
        spoil(spoilt)
        with pytest.raises(DataError):
            run(config_of(on_failure=("cat",)), observer=events.append)
    assert [event.fields["text"] for event in events] == [f"notify.on_failure: {fault}"]


def fill_the_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_webhook_that_answers_a_byte_at_a_time_is_given_up() -> None:
    """As long as it is listened to, it goes on; or until it must be that nobody gives up."""
    told, was_heard_out = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            deadline = time.monotonic() + 30
            while not told.wait(0.02):
                if time.monotonic() > deadline:
                    was_heard_out.set()
                    break
                self.wfile.write(b"x")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    config = config_of(on_success=f"http://127.0.0.1:{server.server_port}/{SECRET}", timeout_s=0.2)
    said = notify(config, "success", {}, sleep=lambda seconds: None)
    told.set()
    server.shutdown()
    thread.join()
    server.server_close()
    expected = "the webhook at 127.0.0.1 cannot be reached (no answer within 0.2 s), 3 times"
    assert said == f"notify.on_success: {expected}"
    assert not was_heard_out.is_set()
