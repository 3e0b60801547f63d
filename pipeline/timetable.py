"""When a verb runs again: cron expressions, what was missed, and back-off after failures.

The state is `schedules/<name>.json` of the storage root, so that a run that was due while nobody
looked is made up, once. Processes and signals are in `jobs/cron.py`.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Literal

from pipeline.errors import ConfigError, RaydiffusionError, StorageError
from pipeline.leases import hold_alone
from pipeline.storage import Storage

LEAST_BACKOFF_S, MOST_BACKOFF_S = 60.0, 6 * 3600.0
LONGEST_WAIT_S = 60.0  # then the clock is looked at again: it may have been set, or have slept
LARGEST_STEP_S = 3600.0  # by which a clock is put right; further off it was wrong
NO_FAILURES = (0, 8, 9)  # done, another process is at it, the gate has refused
DAY = timedelta(days=1)
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_DAY = "[0-7]|" + "|".join(DAYS)
_DAYS_PART = re.compile(rf"(?:\*|({_DAY})(?:-({_DAY}))?)(?:/([1-9]\d*))?")

Kind = Literal["waiting", "missed", "started", "ended", "failed", "stopped", "note"]
Say = Callable[[Kind, dict[str, Any]], None]


@dataclass(frozen=True)
class Timetable:
    """A cron expression in a time zone; see `parse_timetable`."""

    expression: str
    zone: tzinfo
    triggers: tuple[Any, ...]  # of APScheduler; one of them is enough
    is_of_the_day: bool  # at hours and minutes that are named, and not again and again

    @property
    def timezone(self) -> str:
        """Its name."""
        return str(self.zone)

    def next_after(self, seconds: float) -> float | None:
        """The first time after one, in seconds since the epoch; None where there is none.

        Where the clock goes back, a time of the day comes once, as with cron.
        """
        found = [self._next_of(trigger, seconds) for trigger in self.triggers]
        return min((time for time in found if time is not None), default=None)

    def _next_of(self, trigger: Any, seconds: float) -> float | None:
        # By what the clock shows, from a day before: no change of it is larger. For APScheduler's
        # own days are 24 hours, and it passes over what such a day does not come by.
        shown = datetime.fromtimestamp(math.floor(seconds), self.zone).replace(tzinfo=UTC) - DAY
        best, until = math.inf, None
        while (shown := trigger.get_next_fire_time(None, shown)) is not None:
            if until is not None and shown > until:
                break
            best = min([best, *(time for time in self._times_of(shown) if time > seconds)])
            if until is None and best < math.inf:
                until = shown + DAY
            shown += timedelta(seconds=1)
        return None if until is None else best

    def _times_of(self, shown: datetime) -> list[float]:
        """When the clock shows a time; as much later as it skips, where it skips that time."""
        times = [shown.replace(tzinfo=self.zone, fold=fold) for fold in (0, 1)]
        first, second = (time.timestamp() for time in times)
        return [first, second] if first < second and not self.is_of_the_day else [first]


def parse_timetable(expression: str, timezone: str | None, now: float) -> Timetable:
    """Reads a cron expression of five fields as cron does.

    As in crontab(5) of Paul Vixie's cron, days of the week count from Sunday, as 0 or 7, and where
    both kinds of days are restricted, either is enough. Where hour or minute begins with `*`, it
    runs again and again, also through an hour that the change of the clock repeats.

    Args:
        expression: minute, hour, day of the month, month, day of the week.
        timezone: its name, as Europe/Berlin; that of this machine if not given.
        now: seconds since the epoch.

    Raises:
        ConfigError: it is none, its time never comes, or there is no such time zone.
    """
    from apscheduler.triggers.cron import CronTrigger

    fields, zone = expression.split(), _find_zone(timezone)
    example = "Write for example --at '0 3 * * *', minute, hour, day, month and day of the week."
    if len(fields) != 5:
        raise ConfigError(f"--at takes five fields, got {len(fields)} in {expression!r}. {example}")
    minute, hour, day, month, weekday = fields
    try:
        days = _name_days(weekday)
        both = [(day, days)]
        if not (day.startswith("*") or weekday.startswith("*")):
            both = [(day, "*"), ("*", days)]
        triggers = tuple(
            CronTrigger(minute=minute, hour=hour, day=d, month=month, day_of_week=w, timezone=UTC)
            for d, w in both
        )
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"--at {expression!r} is no cron expression: {reason}. {example}"
        ) from error
    is_of_the_day = not (minute.startswith("*") or hour.startswith("*"))
    timetable = Timetable(expression, zone, triggers, is_of_the_day)
    if timetable.next_after(now) is None:
        raise ConfigError(f"--at {expression!r} names a time that never comes. {example}")
    return timetable


@dataclass(frozen=True)
class State:
    """What is kept of a schedule; JSON.

    Args:
        at: the expression.
        timezone: its name.
        due: when the next run is to start, in seconds since the epoch.
        failures: how many runs have failed since one did not.
        last: `started`, `ended` and `exit_code` of the run before.
        running_since: of the one that goes on, or was killed.
    """

    at: str
    timezone: str
    due: float
    failures: int = 0
    last: dict[str, Any] | None = field(default=None)
    running_since: float | None = None

    @property
    def is_sound(self) -> bool:
        """Whether each field is of its kind; what was read may be damaged."""
        return (
            isinstance(self.at, str)
            and isinstance(self.timezone, str)
            and isinstance(self.due, int | float)
            and isinstance(self.failures, int)
            and isinstance(self.last, dict | None)
            and isinstance(self.running_since, int | float | None)
        )


def begin(state: State | None, timetable: Timetable, now: float) -> State:
    """The state to go on with: what was due stays due, unless the timetable is another.

    Nothing is due later than it would be from now on: the clock may have been wrong.

    Args:
        state: as it was left, if there is one.
        timetable: that holds from now on.
        now: seconds since the epoch.
    """
    at, timezone = timetable.expression, timetable.timezone
    if state is not None and (state.at, state.timezone) == (at, timezone):
        latest = now + MOST_BACKOFF_S if state.failures else _next(timetable, now, state.last)
        return replace(state, due=min(state.due, latest))
    return State(at, timezone, _next(timetable, now), last=state and state.last)


def end(state: State, timetable: Timetable, now: float, exit_code: int) -> State:
    """The state after a run: due at the next time, or soon again where it failed.

    Times that passed while it ran are passed over.

    Args:
        state: since it started.
        timetable: that holds.
        now: seconds since the epoch.
        exit_code: of the run.
    """
    failures = 0 if exit_code in NO_FAILURES else state.failures + 1
    last = {"started": state.running_since, "ended": now, "exit_code": exit_code}
    due = now + backoff_s(failures) if failures else _next(timetable, now, last)
    return replace(state, due=due, failures=failures, last=last, running_since=None)


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: a minute, then twice as long each time."""
    return min(LEAST_BACKOFF_S * 2.0 ** min(failures - 1, 30), MOST_BACKOFF_S)


def keep_timetable(
    storage: Storage,
    name: str,
    timetable: Timetable,
    run: Callable[[], int],
    *,
    wait: Callable[[float], bool],
    now: Callable[[], float],
    say: Say,
    once_now: bool = False,
) -> None:
    """Runs again and again, one at a time, until it is told to stop.

    Args:
        storage: the root, which keeps the state.
        name: of the model; one process keeps its timetable.
        timetable: when to run.
        run: does it; returns the exit code.
        wait: for at most so many seconds; True when it is time to stop.
        now: seconds since the epoch.
        say: told what happens.
        once_now: whether not to wait for the first time.

    Raises:
        BusyError: another process keeps the timetable of this model.
        StorageError: the state cannot be read, or not be written for the first time.
    """
    with hold_alone(storage, f"schedules/{name}", f"keeps the timetable of {name}"):
        before = read_state(storage, name)
        state = begin(before, timetable, now())
        if once_now:
            state = replace(state, due=min(state.due, now()))
        elif before is not None and state.due <= now():
            say("missed", {"due": state.due})
        write_state(storage, name, state)
        told = None
        while not wait(0.0):
            state = begin(state, timetable, now())
            if (left_s := state.due - now()) > 0:
                if told != state.due:
                    say("waiting", {"due": state.due, "failures": state.failures})
                told = state.due
                wait(min(left_s, LONGEST_WAIT_S))
                continue
            state = replace(state, running_since=now())
            _try_to_write(storage, name, state, say)
            say("started", {})
            exit_code = run()
            if wait(0.0):  # told to stop meanwhile: what was not done stays due
                if exit_code in NO_FAILURES:
                    state = end(state, timetable, now(), exit_code)
                _try_to_write(storage, name, replace(state, running_since=None), say)
                break
            state = end(state, timetable, now(), exit_code)
            assert state.last is not None
            say("failed" if state.failures else "ended", dict(state.last))
            _try_to_write(storage, name, state, say)
        say("stopped", {})


def read_state(storage: Storage, name: str) -> State | None:
    """What is kept of a schedule, or None.

    Raises:
        StorageError: it cannot be read.
    """
    path = _path(name)
    try:
        state = State(**json.loads(storage.read(path)))
        if not state.is_sound:
            raise ValueError("a field is of another kind")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StorageError(
            f"{storage.uri}/{path} is no state of a timetable. Delete this file and run again: the "
            "timetable begins anew."
        ) from error
    return state


def write_state(storage: Storage, name: str, state: State) -> None:
    """Keeps the state of a schedule."""
    storage.replace(_path(name), json.dumps(asdict(state), indent=1).encode())


def _try_to_write(storage: Storage, name: str, state: State, say: Say) -> None:
    try:
        write_state(storage, name, state)
    except RaydiffusionError as error:  # it goes on by heart
        say("note", {"text": f"the state is not kept for now: {error}"})


def _next(timetable: Timetable, now: float, last: Mapping[str, Any] | None = None) -> float:
    """The next time from now on, and after the run before, if the clock was put back a little."""
    known = [time for name in ("started", "ended") if (time := (last or {}).get(name)) is not None]
    since = max(known, default=now)
    found = timetable.next_after(since if now < since < now + LARGEST_STEP_S else now)
    return math.inf if found is None else found  # the year 10000


def _path(name: str) -> str:
    return f"schedules/{name}.json"


def _name_days(text: str) -> str:
    """Days of the week as names, for APScheduler counts from Monday."""
    found: set[int] = set()
    for part in text.lower().split(","):
        match = _DAYS_PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no day of the week")
        first, last, step = match.groups()
        low = 0 if first is None else _number(first)
        high = low if last is None else _number(last)
        if first is None or (last is None and step is not None):
            high = 6
        if high < low and high == 0:
            high = 7  # fri-sun
        if high < low:
            raise ValueError(f"{part!r} goes backwards")
        found |= {number % 7 for number in range(low, high + 1, int(step or 1))}
    return "*" if len(found) == len(DAYS) else ",".join(DAYS[number] for number in sorted(found))


def _number(day: str) -> int:
    return int(day) if day.isdigit() else DAYS.index(day)


def _find_zone(name: str | None) -> tzinfo:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    if name is None:
        from tzlocal import get_localzone

        try:
            return get_localzone()
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            told = f"TZ={os.environ['TZ']}" if os.environ.get("TZ") else "What this machine says"
            raise ConfigError(
                f"{told} is no name of a time zone. Give one, such as --timezone Europe/Berlin."
            ) from error
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            f"There is no time zone {name!r} on this machine. Give one such as Europe/Berlin or "
            "UTC; where none is known, install the package tzdata."
        ) from error
