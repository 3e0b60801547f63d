"""When a verb runs again: expressions as cron reads them, and a clock that is set by hand."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from pipeline.errors import BusyError, ConfigError, StorageError
from pipeline.leases import hold_lease
from pipeline.storage import LocalStorage
from pipeline.timetable import Timetable, backoff_s, keep_timetable, parse_timetable, read_state

HOUR = 3600.0
# Thursday
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()


def parse(expression: str, timezone: str = "UTC") -> Timetable:
    return parse_timetable(expression, timezone, NOON)


def times(expression: str, count: int, timezone: str = "UTC", start: float = NOON) -> list[str]:
    timetable, found = parse(expression, timezone), []
    for _ in range(count):
        start = timetable.next_after(start) or 0.0
        found.append(datetime.fromtimestamp(start, ZoneInfo(timezone)).strftime("%a %d %b %H:%M"))
    return found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("0 3 * * *", ["Fri 02 Jan 03:00", "Sat 03 Jan 03:00"]),
        ("0 12 * * *", ["Fri 02 Jan 12:00", "Sat 03 Jan 12:00"]),  # after noon, not at noon
        ("*/20 * * * *", ["Thu 01 Jan 12:20", "Thu 01 Jan 12:40"]),
        ("0 0 1 feb *", ["Sun 01 Feb 00:00", "Mon 01 Feb 00:00"]),
        ("0 0 * * 0", ["Sun 04 Jan 00:00", "Sun 11 Jan 00:00"]),  # cron's Sunday
        ("0 0 * * 7", ["Sun 04 Jan 00:00", "Sun 11 Jan 00:00"]),
        ("0 0 * * 1-2", ["Mon 05 Jan 00:00", "Tue 06 Jan 00:00"]),
        ("0 0 * * FRI-sun", ["Fri 02 Jan 00:00", "Sat 03 Jan 00:00"]),
        ("0 0 * * */3", ["Sat 03 Jan 00:00", "Sun 04 Jan 00:00"]),  # 0, 3, 6
        ("0 0 * * 5,1", ["Fri 02 Jan 00:00", "Mon 05 Jan 00:00"]),
        ("0 0 10 * 1", ["Mon 05 Jan 00:00", "Sat 10 Jan 00:00"]),  # either is enough
    ],
)
def test_expressions_are_read_as_cron_does(expression: str, expected: list[str]) -> None:
    assert times(expression, 2) == expected


def test_the_time_zone_counts_also_where_the_clock_is_changed() -> None:
    before = datetime(2026, 3, 28, 12, tzinfo=UTC).timestamp()
    assert times("0 3 * * *", 2, "Europe/Berlin", before) == [
        "Sun 29 Mar 03:00",
        "Mon 30 Mar 03:00",
    ]
    first = parse("0 3 * * *", "Europe/Berlin").next_after(before)
    assert first == datetime(2026, 3, 29, 1, tzinfo=UTC).timestamp()  # summer time by then


@pytest.mark.parametrize(
    ("expression", "timezone", "expected"),
    [
        # Of the day: once, the first time.
        ("30 2 * * *", "Europe/Berlin", "Sat 02:30+0200, Sun 02:30+0200, Mon 02:30+0100"),
        (
            "0,30 2,3 * * 0",
            "Europe/Berlin",
            "Sun 02:00+0200, Sun 02:30+0200, Sun 03:00+0100, Sun 03:30+0100",
        ),
        ("30 0 * * *", "America/Havana", "Sat 00:30-0400, Sun 00:30-0400, Mon 00:30-0500"),
        # Again and again: each time.
        (
            "30 * * * 0",
            "Europe/Berlin",
            "Sun 00:30+0200, Sun 01:30+0200, Sun 02:30+0200, Sun 02:30+0100, Sun 03:30+0100",
        ),
        (
            "*/30 2 * * 0",
            "Europe/Berlin",
            "Sun 02:00+0200, Sun 02:30+0200, Sun 02:00+0100, Sun 02:30+0100",
        ),
    ],
)
def test_an_hour_that_the_clock_repeats(expression: str, timezone: str, expected: str) -> None:
    changed = {"Europe/Berlin": datetime(2026, 10, 25), "America/Havana": datetime(2026, 11, 1)}
    zone = ZoneInfo(timezone)
    start = (changed[timezone] - timedelta(days=1)).replace(tzinfo=zone).timestamp()
    timetable, found = parse(expression, timezone), []
    for _ in expected.split(", "):
        start = timetable.next_after(start) or 0.0
        found.append(datetime.fromtimestamp(start, zone).strftime("%a %H:%M%z"))
    assert ", ".join(found) == expected


QUARTER = 900


def shown_times(timezone: str, year: int) -> dict[datetime, list[float]]:
    """When each quarter of an hour of a year is shown, found by looking at the clock at each."""
    zone = ZoneInfo(timezone)
    start, end = (datetime(y, 1, 1, tzinfo=zone).timestamp() for y in (year, year + 1))
    found: dict[datetime, list[float]] = {}
    last = datetime(year, 1, 1) - timedelta(seconds=QUARTER)
    for seconds in range(int(start), int(end), QUARTER):
        shown = datetime.fromtimestamp(seconds, zone).replace(tzinfo=None)
        skipped = last + timedelta(seconds=QUARTER)
        while skipped < shown:
            later_s = (skipped - last).total_seconds() - QUARTER
            found.setdefault(skipped, []).append(seconds + later_s)
            skipped += timedelta(seconds=QUARTER)
        found.setdefault(shown, []).append(seconds)
        last = shown
    return found


@pytest.mark.parametrize(
    ("timezone", "year"),
    [
        ("Europe/Berlin", 2026),
        ("Europe/Berlin", 2024),  # the last of March, and the first of April, a Monday
        ("Africa/Cairo", 2026),  # at midnight
        ("Asia/Beirut", 2026),
        ("America/Santiago", 2026),
        ("America/Havana", 2026),
        ("Australia/Lord_Howe", 2026),  # by half an hour
        ("Pacific/Apia", 2011),  # which left out a day
    ],
)
def test_all_times_of_a_year_are_those_that_the_clock_shows(timezone: str, year: int) -> None:
    found = shown_times(timezone, year)
    expressions: dict[str, Callable[[datetime], bool]] = {
        "0 0 * * *": lambda t: (t.hour, t.minute) == (0, 0),
        "0,30 2 * * *": lambda t: t.hour == 2 and t.minute in (0, 30),
        "15 0,1,23 * * mon": lambda t: t.hour in (0, 1, 23) and t.minute == 15 and t.weekday() == 0,
        "0 0 1 * *": lambda t: (t.day, t.hour, t.minute) == (1, 0, 0),
        "*/30 0,2 * * *": lambda t: t.hour in (0, 2) and t.minute in (0, 30),
        "0 */6 * * *": lambda t: t.hour % 6 == 0 and t.minute == 0,
    }
    for expression, holds in expressions.items():
        is_of_the_day = "*/" not in expression
        times = {
            t
            for shown, ts in found.items()
            if holds(shown)
            for t in ts[: 1 if is_of_the_day else 2]
        }
        expected = sorted(times)
        timetable = parse_timetable(expression, timezone, expected[0] - 1)
        assert [timetable.next_after(t) for t in expected[:-1]] == expected[1:], expression


def test_between_the_two_a_time_of_the_day_is_over() -> None:
    between = datetime(2026, 10, 25, 0, 45, tzinfo=UTC).timestamp()  # 02:45, the first time
    assert times("30 2 * * *", 1, "Europe/Berlin", between) == ["Mon 26 Oct 02:30"]


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("0 3 * *", "takes five fields, got 4"),
        ("@daily", "takes five fields, got 1"),
        ("61 3 * * *", "is no cron expression"),
        ("a 3 * * *", "is no cron expression"),
        ("0 3 * * 8", "'8' is no day of the week"),
        ("0 3 * * 4-2", "'4-2' goes backwards"),
        ("0 3 * * ", "takes five fields"),
        ("0 0 31 2 *", "names a time that never comes"),
    ],
)
def test_what_is_no_expression_is_refused(expression: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(expression)
    assert sentence in str(raised.value)
    assert "Write for example --at '0 3 * * *'" in str(raised.value)


@pytest.mark.parametrize("name", ["Europe/Nowhere", "../etc/passwd", ""])
def test_a_time_zone_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="There is no time zone"):
        parse("0 3 * * *", name)


@pytest.mark.parametrize("rule", ["UTC0", "CET-1CEST,M3.5.0,M10.5.0/3", "/nowhere"])
def test_a_rule_in_place_of_a_time_zone_is_refused(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", rule)
    with pytest.raises(ConfigError, match=f"^TZ={rule} is no name of a time zone. Give one, such"):
        parse_timetable("0 3 * * *", None, NOON)


def test_pauses_after_failures_grow_up_to_six_hours() -> None:
    assert [backoff_s(failures) for failures in (1, 2, 3, 4)] == [60, 120, 240, 480]
    assert backoff_s(10) == backoff_s(5000) == 6 * HOUR


class World:
    """A clock, a verb, and what happened."""

    def __init__(self, directory: Path) -> None:
        self.storage = LocalStorage(str(directory))
        self.time = NOON
        self.ends_at = NOON + 24 * HOUR
        self.takes_s = 600.0
        self.exit_codes: list[int] = []
        self.started: list[float] = []
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.on_run: Callable[[], None] = lambda: None

    def wait(self, seconds: float) -> bool:
        assert seconds <= 60
        self.time += seconds
        return self.time >= self.ends_at

    def run(self) -> int:
        self.started.append((self.time - NOON) / HOUR)
        self.on_run()
        self.time += self.takes_s
        return self.exit_codes.pop(0) if self.exit_codes else 0

    def keep(self, expression: str, hours: float, **options: Any) -> list[float]:
        """Hours after noon at which it ran, in so many hours from now."""
        self.started, self.ends_at = [], self.time + hours * HOUR
        keep_timetable(
            self.storage, "m", parse(expression), self.run, wait=self.wait, now=lambda: self.time,
            say=lambda kind, fields: self.said.append((kind, fields)), **options,
        )  # fmt: skip
        return self.started


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_runs_at_each_time(world: World) -> None:
    assert world.keep("0 */6 * * *", 24.5) == [6, 12, 18, 24]
    kinds = [kind for kind, _ in world.said]
    assert kinds == [*["waiting", "started", "ended"] * 4, "waiting", "stopped"]


def test_times_that_pass_while_it_runs_are_passed_over(world: World) -> None:
    world.takes_s = 2.5 * HOUR
    assert world.keep("0 * * * *", 8) == [1, 4, 7]


def test_what_was_missed_is_made_up_once(world: World) -> None:
    assert world.keep("0 * * * *", 1.5) == [1]
    world.time += 100.5 * HOUR
    assert world.keep("0 * * * *", 2) == [102, 103]
    assert [fields for kind, fields in world.said if kind == "missed"] == [{"due": NOON + 2 * HOUR}]


def test_another_timetable_makes_up_nothing(world: World) -> None:
    world.keep("0 * * * *", 1.5)
    world.time += 100.5 * HOUR
    assert world.keep("30 * * * *", 1) == [102.5]


def test_failures_are_tried_again_ever_later_until_one_succeeds(world: World) -> None:
    world.takes_s = 0.0
    world.exit_codes = [5, -9, 7]
    found = world.keep("0 1 * * *", 40)
    minutes = [round((hours - found[0]) * 60) for hours in found]
    assert minutes == [0, 1, 3, 7, 24 * 60]
    assert [fields["failures"] for kind, fields in world.said if kind == "waiting"] == [
        0, 1, 2, 3, 0, 0
    ]  # fmt: skip


@pytest.mark.parametrize("exit_code", [0, 8, 9])
def test_what_is_no_failure_waits_for_the_next_time(world: World, exit_code: int) -> None:
    world.exit_codes = [exit_code] * 3
    assert world.keep("0 * * * *", 3.5) == [1, 2, 3]


def test_it_need_not_wait_for_the_first_time(world: World) -> None:
    assert world.keep("0 18 * * *", 8, once_now=True) == [0, 6]


def test_told_to_stop_while_it_runs_what_was_not_done_stays_due(world: World) -> None:
    world.exit_codes = [130]
    world.takes_s = 2 * HOUR
    assert world.keep("0 * * * *", 1.5) == [1]
    state = read_state(world.storage, "m")
    assert state is not None
    assert (state.due, state.running_since, state.failures) == (NOON + HOUR, None, 0)
    assert world.keep("0 * * * *", 3.5) == [3, 6]


def test_a_run_that_was_killed_with_it_is_made_up(world: World) -> None:
    class KilledError(Exception):
        pass

    def kill() -> None:
        raise KilledError

    world.on_run = kill
    with pytest.raises(KilledError):
        world.keep("0 * * * *", 3)
    state = read_state(world.storage, "m")
    assert state is not None
    assert state.running_since == NOON + HOUR
    world.on_run = lambda: None
    assert world.keep("0 * * * *", 0.5) == [1]


def test_one_process_for_each_name(world: World) -> None:
    with (
        hold_lease(world.storage, "schedules/m"),
        pytest.raises(BusyError, match="keeps the timetable of m already"),
    ):
        world.keep("0 * * * *", 1)


def test_a_storage_that_is_away_for_a_while_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = LocalStorage.replace

    def fail(storage: LocalStorage, path: str, content: bytes) -> None:
        if world.started and path == "schedules/m.json":
            raise StorageError("away. Bring it back.")
        replace(storage, path, content)

    monkeypatch.setattr(LocalStorage, "replace", fail)
    assert world.keep("0 * * * *", 3.5) == [1, 2, 3]
    assert ("note", {"text": "the state is not kept for now: away. Bring it back."}) in world.said


@pytest.mark.parametrize(
    "content",
    [
        b'{"odd": 1}',
        b"",
        b"\0\xff",
        b"[]",
        b'{"at": "0 * * * *", "timezone": "UTC", "due": "soon"}',
    ],
)
def test_a_state_that_cannot_be_read_is_said(world: World, content: bytes) -> None:
    world.storage.replace("schedules/m.json", content)
    with pytest.raises(
        StorageError, match=r"schedules/m.json is no state of a timetable\. Delete this file"
    ):
        world.keep("0 * * * *", 1)


def test_a_clock_that_was_ahead_is_forgotten(world: World) -> None:
    world.time += 10_000 * HOUR
    world.keep("0 * * * *", 0.5)
    world.time = NOON  # it was set, and the process started again
    assert world.keep("0 * * * *", 2.5) == [1, 2]


def test_a_clock_put_back_by_seconds_runs_nothing_again(world: World) -> None:
    world.takes_s, wait, steps_s = 0.5, world.wait, [-2.0]

    def put_back(seconds: float) -> bool:
        if world.started and steps_s:
            world.time += steps_s.pop()
        return wait(seconds)

    world.wait = put_back
    assert world.keep("0 * * * *", 1.5) == [1]


def test_a_clock_that_is_set_back_while_it_waits_is_forgotten(world: World) -> None:
    world.time += 10_000 * HOUR
    world.ends_at, wait = world.time + 5 * HOUR, world.wait

    def set_back(seconds: float) -> bool:
        if world.time > NOON + 10_000 * HOUR:
            world.time, world.ends_at = NOON, NOON + 2.5 * HOUR
        return wait(seconds)

    world.wait = set_back
    assert world.keep("0 * * * *", 5) == [1, 2]


def test_a_back_off_by_a_clock_that_was_ahead_is_over_after_the_longest(world: World) -> None:
    world.time += 10_000 * HOUR
    world.exit_codes = [5, 5, 0]
    world.takes_s = 0.0
    world.keep("0 * * * *", 1.01)
    world.time = NOON
    world.exit_codes = []
    assert world.keep("0 * * * *", 6.5) == [6]
