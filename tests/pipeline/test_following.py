import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pipeline.cluster_jobs import ConnectionLostError, Job, Status
from pipeline.errors import ClusterError, ConfigError
from pipeline.following import follow

LOG = "one\ntwo\nthree\nfour\n"
LOST = ConnectionLostError("gone. Wait.")


def job(status: Status, code: int | None = None) -> Job:
    return Job("j", status, "exec python", "", code, 1.0, None, {})


class Cluster:
    """Answers from a script: each connection brings parts of the log, and then an end.

    An end is None (it closes), "hang" (it goes silent) or an error.
    """

    address = "http://head:8265"

    def __init__(
        self, connections: list[tuple[list[str], Any]], states: list[Job | Exception]
    ) -> None:
        self.connections, self.states = connections, states
        self.reads = self.unread = 0  # of the whole log; how many of them fail

    async def tail(self, job_id: str) -> AsyncIterator[str]:
        parts, end = self.connections.pop(0)
        for part in parts:
            yield part
        if end == "hang":
            await asyncio.Event().wait()
        elif end is not None:
            raise end

    def job(self, job_id: str) -> Job:
        state = self.states.pop(0)
        if isinstance(state, Exception):
            raise state
        return state

    def logs(self, job_id: str) -> str:
        self.reads += 1
        if self.reads <= self.unread:
            raise LOST
        return LOG


def followed(cluster: Cluster, patience_s: float = 60.0) -> tuple[Job, str, list[str]]:
    written: list[str] = []
    told: list[str] = []
    done = asyncio.run(
        follow(
            cluster, "j", write=written.append, tell=told.append,
            patience_s=patience_s, silent_s=0.05, first_wait_s=0.001,
        )
    )  # fmt: skip
    return done, "".join(written), told


def test_the_log_is_passed_on_to_its_end() -> None:
    done, text, told = followed(
        Cluster([(["one\ntwo\n", "three\nfour\n"], None)], [job("SUCCEEDED")])
    )
    assert done.exit_code == 0
    assert text == LOG
    assert told == []


def test_a_dropped_connection_repeats_and_loses_nothing() -> None:
    # Parts are cut elsewhere each time, also inside of a line that was passed on in half.
    connections = [
        (["one\nt"], LOST),
        ([], LOST),
        (["o", "ne\ntwo\nth"], LOST),
        (["one\ntwo\nthree\n"], LOST),
        (["one\ntwo\nthree\nfour\n"], None),
    ]
    done, text, told = followed(Cluster(connections, [*[job("RUNNING")] * 4, job("FAILED", 3)]))
    assert text == LOG
    assert done.exit_code == 3
    assert told == ["connection lost, trying again: gone", "connected again"] * 3


def test_what_a_connection_that_closed_early_left_out_is_passed_on() -> None:
    cluster = Cluster(
        [(["one\n"], None), (["one\ntwo\n"], None)], [job("RUNNING"), job("SUCCEEDED", 0)]
    )
    assert followed(cluster)[1] == LOG


def test_a_connection_that_says_nothing_is_made_anew() -> None:
    cluster = Cluster(
        [(["one\n"], "hang"), ([], "hang"), ([LOG], None)],
        [job("RUNNING"), job("RUNNING"), job("SUCCEEDED", 0)],
    )
    done, text, told = followed(cluster)
    assert (done.status, text, told) == ("SUCCEEDED", LOG, [])


def test_a_lost_answer_on_the_job_is_asked_for_again() -> None:
    cluster = Cluster([([LOG], None)] * 2, [LOST, job("STOPPED")])
    done, text, _ = followed(cluster)
    assert (done.exit_code, text) == (130, LOG)


def test_a_cluster_that_stays_away_is_given_up_with_what_to_do() -> None:
    cluster = Cluster([(["one\n"], LOST), *[([], LOST)] * 500], [LOST] * 500)
    with pytest.raises(ClusterError, match=r"no answer for 0 s.*attach j --address http://head"):
        followed(cluster, patience_s=0.02)


def test_a_cluster_started_anew_has_forgotten_the_job() -> None:
    unknown = ConfigError("no such job. List them.")
    with pytest.raises(ClusterError, match=r"has forgotten the job j.*Submit again"):
        followed(Cluster([([], LOST), ([], unknown)], [LOST]))


@pytest.mark.parametrize("end", [None, LOST], ids=["the log closes", "the log is lost"])
def test_a_job_that_ended_is_told_where_its_log_cannot_be_read(end: Any) -> None:
    cluster = Cluster([(["one\n"], end)], [job("FAILED", 9)])
    cluster.unread = 500
    done, text, told = followed(cluster, patience_s=0)
    assert (done.exit_code, text) == (9, "one\n")
    assert told[-1] == "the job has ended, and the rest of its log cannot be read: gone"
    assert 1 < cluster.reads < 10


def test_the_rest_of_a_log_is_asked_for_again() -> None:
    cluster = Cluster([(["one\n"], None)], [job("SUCCEEDED", 0)])
    cluster.unread = 1
    assert followed(cluster)[1:] == (LOG, [])


def test_a_log_that_cannot_be_followed_does_not_end_the_following() -> None:
    # The node of the job's process is away, and the head, which knows the job's status, is not.
    cluster = Cluster([([], LOST)] * 6, [*[job("RUNNING")] * 5, job("SUCCEEDED", 0)])
    done, text, told = followed(cluster, patience_s=0)
    assert (done.exit_code, text) == (0, LOG)
    assert told == ["connection lost, trying again: gone"]


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (job("SUCCEEDED", 0), 0),
        (job("FAILED", 3), 3),
        (job("FAILED", -9), 137),
        (job("FAILED"), None),
        (job("STOPPED"), 130),
        (job("RUNNING"), None),
    ],
)
def test_the_exit_code_is_what_a_shell_would_say(state: Job, code: int | None) -> None:
    assert state.exit_code == code
