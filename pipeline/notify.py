"""Tells a command or a webhook how a run ended; a failure to tell fails nothing.

What is told is one JSON object, with a sentence under `text`, which chat services show. How it gets
to a webhook is in `webhooks.py`.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from pipeline.errors import BusyError, RaydiffusionError, RefusedError, StorageError
from pipeline.runs import read_run
from pipeline.settings import Config
from pipeline.workflow import Event as WorkflowEvent
from pipeline.workflow import Observer

P = ParamSpec("P")
T = TypeVar("T")
Event = Literal["success", "failure", "promote"]
VARIABLES = ("RAYDIFFUSION_EVENT", "RAYDIFFUSION_NOTIFICATION")
SHOWN = 200  # characters of what a command said last
UNTOLD = "untold"  # beside the result of `promote`, until its promotion was told


def notify(
    config: Config,
    event: Event,
    document: Mapping[str, Any],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> str | None:
    """Tells whoever the config names for an event.

    Args:
        config: its section `notify` says whom.
        event: what happened.
        document: JSON; gets `event`.
        sleep: waits before a webhook is tried again.

    Returns:
        Why it could not be told, for a note; None where it was, or nobody wants to know.
    """
    receiver = getattr(config.notify, f"on_{event}")
    if receiver is None:
        return None
    content = json.dumps({"event": event, **document}).encode()
    timeout_s = config.notify.timeout_s
    if isinstance(receiver, str):
        from pipeline.webhooks import post  # urllib: only here

        fault = post(receiver, content, timeout_s, sleep)
    else:
        fault = _run(receiver, event, content, timeout_s)
    return fault and f"notify.on_{event}: {fault}"


def tells_how_it_ended(function: Callable[P, T]) -> Callable[P, T]:
    """Has a function that runs a config tell how that ended: `run_config` of `driver.py`.

    Success is told where something was done; a promotion where one was made and was not told yet,
    be it that the run that made it was killed. Ctrl-C, and another process at the same run, are no
    failures.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given: dict[str, Any] = dict(kwargs)
        config: Config = given["config"] if "config" in given else args[0]  # pyright: ignore
        on_plan = given.get("on_plan", lambda plan: None)
        plans: list[Any] = []

        def keep_plan(plan: Any) -> None:
            plans.append(plan)
            on_plan(plan)

        kwargs["on_plan"] = keep_plan
        with failure_is_told(config, given["observer"], plans):
            outcome: Any = function(*args, **kwargs)
        tell = functools.partial(_tell, config, given["observer"])
        describe = functools.partial(_describe_success, config, plans, outcome)
        if any(p.action != "cached" for plan in plans for p in plan.steps):
            tell("success", describe)
        if "promote" in outcome.manifests:
            with contextlib.suppress(StorageError):  # the next run tells it then
                storage = plans[-1].storage
                untold = f"steps/promote/{outcome.manifests['promote']['key']}/{UNTOLD}"
                if storage.exists(untold):
                    tell("promote", describe)
                    storage.delete(untold)
        return outcome

    return run


@contextlib.contextmanager
def failure_is_told(
    config: Config, observer: Observer, plans: Sequence[Any] = ()
) -> Iterator[None]:
    """Inside the block, a failure is told; Ctrl-C, and another process at the same work, is none.

    Args:
        config: its section `notify` says whom.
        observer: told, as a note, what could not be told.
        plans: of the run, filled while the block goes on.
    """
    try:
        yield
    except BusyError:
        raise
    except Exception as error:
        describe = functools.partial(_describe_failure, config, plans, error)
        _tell(config, observer, "failure", describe)
        raise


def tell_refusal(
    config: Config, observer: Observer, sentence: str, facts: Mapping[str, Any]
) -> None:
    """Tells, as a failure, of work that was refused before there was a run.

    Args:
        config: its section `notify` says whom.
        observer: told, as a note, what could not be told.
        sentence: for people.
        facts: JSON, for the document.
    """
    error = RefusedError(sentence)
    _tell(config, observer, "failure", lambda: {**_describe_failure(config, (), error), **facts})


def _tell(
    config: Config, observer: Observer, kind: Event, describe: Callable[[], Mapping[str, Any]]
) -> None:
    """Tells what there is to tell; whatever goes wrong with it is a note."""
    try:
        fault = notify(config, kind, describe())
    except Exception as error:  # its text may hold a URL, which is a secret
        fault = f"notify.on_{kind}: it could not be told ({type(error).__name__})"
    if fault:
        observer(WorkflowEvent("note", "notify", {"text": fault}))


def _describe_failure(config: Config, plans: Sequence[Any], error: Exception) -> dict[str, Any]:
    facts, said = _describe_run(config, plans), str(error) or type(error).__name__
    return {
        **facts,
        "text": f"{config.name}: {facts['run'] or 'a run'} failed: {said}",
        "error": {
            "kind": type(error).__name__,
            "message": said,
            "exit_code": error.exit_code if isinstance(error, RaydiffusionError) else 1,
        },
    }


def _describe_success(config: Config, plans: Sequence[Any], outcome: Any) -> dict[str, Any]:
    facts, manifests = _describe_run(config, plans), outcome.manifests
    score = manifests["evaluate"]["metrics"] if "evaluate" in manifests else None
    promotion = manifests["promote"]["metrics"] if "promote" in manifests else None
    text = f"{config.name}: {facts['run']} is done"
    if score is not None:
        text += f", {score['metric']} {score['value']:.4g}"
    if promotion is not None:
        word = "promoted" if promotion["promoted"] else "not promoted"
        text += f"; version {promotion['version']} {word}: {promotion['reason']}"
    pages = {"report": outcome.report, "search": outcome.search}
    return {**facts, "text": text, "score": score, "promotion": promotion, **pages}


def _describe_run(config: Config, plans: Sequence[Any]) -> dict[str, Any]:
    """What both kinds of documents say of the run, as far as it came."""
    facts: dict[str, Any] = {"name": config.name, "run": None, "execution": None}
    if not plans:
        return facts | {"root": config.storage.root}
    storage, run = plans[-1].storage, plans[-1].run
    with contextlib.suppress(RaydiffusionError):  # the storage may be what failed
        facts["execution"] = read_run(storage, run)["executions"][-1]
    return facts | {"run": run, "root": storage.uri}


def _run(command: Sequence[str], event: Event, content: bytes, timeout_s: float) -> str | None:
    """Runs a command with the document on its standard input, and in a file that it is named."""
    try:
        made = tempfile.TemporaryDirectory(prefix="raydiffusion-", ignore_cleanup_errors=True)
        with made as directory:
            return _run_in(Path(directory), command, event, content, timeout_s)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return f"the command {command[0]} cannot be given the document: {reason}"


def _run_in(
    directory: Path, command: Sequence[str], event: Event, content: bytes, timeout_s: float
) -> str | None:
    path, log = directory / "notification.json", directory / "stderr"
    path.write_bytes(content)
    environment = {**os.environ, **dict(zip(VARIABLES, (event, str(path)), strict=True))}
    with path.open("rb") as stdin, log.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                list(command),
                env=environment,
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # so that what it starts ends with it
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return f"the command {command[0]} cannot be started: {reason}"
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"the command {command[0]} took more than {timeout_s:g} s, and was ended"
    if status == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1][:SHOWN]}" if lines else ""
    return f"the command {command[0]} ended with {status}{last}"
