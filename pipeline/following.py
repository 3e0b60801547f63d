"""Following a job's logs to its end, over connections that may drop.

A new connection begins with the log's first character; what was passed on already is counted and
left out, so that nothing is repeated and nothing is lost.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol, cast

from pipeline.cluster_jobs import ConnectionLostError, Job
from pipeline.errors import ClusterError, ConfigError

SILENT_S = 30.0  # after that a connection is made anew: it may be dead without a word
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
LOG_TRIES = 3  # to read the rest of the log when the job has ended


class Followed(Protocol):
    """What following asks of a cluster."""

    @property
    def address(self) -> str: ...

    def job(self, job_id: str) -> Job: ...

    def logs(self, job_id: str) -> str: ...

    def tail(self, job_id: str) -> AsyncIterator[str]: ...


async def follow(
    server: Followed,
    job_id: str,
    *,
    write: Callable[[str], None],
    tell: Callable[[str], None] = lambda text: None,
    patience_s: float,
    silent_s: float = SILENT_S,
    first_wait_s: float = FIRST_WAIT_S,
) -> Job:
    """Passes a job's log on until the job has ended, and returns it.

    The log comes from the node of the job's process, its status from the head: what became of the
    job is returned also where its log cannot be read any more.

    Args:
        server: the cluster.
        job_id: of the job.
        write: takes the next part of the log.
        tell: takes a sentence on the connection.
        patience_s: how long a cluster may give no answer.
        silent_s: how long a connection may bring nothing before it is made anew.
        first_wait_s: before the first new attempt; each further one waits twice as long.

    Raises:
        ClusterError: no answer for that long, or the cluster has forgotten the job.
    """
    written = 0
    is_lost = False  # the connection of the log, as it was told
    silent_since: float | None = None  # the whole cluster
    wait_s = first_wait_s

    def fail(error: ConnectionLostError) -> None:
        nonlocal is_lost
        if not is_lost:
            tell(f"connection lost, trying again: {_fault(error)}")
        is_lost = True

    while True:
        try:
            seen = 0
            try:
                async for part in _until_silent(server.tail(job_id), silent_s):
                    new = part[max(0, written - seen) :]
                    seen += len(part)
                    if new:
                        write(new)
                        written = seen
                    if is_lost:
                        tell("connected again")
                    is_lost, silent_since, wait_s = False, None, first_wait_s
            except ConnectionLostError as error:
                fail(error)
            job = server.job(job_id)
            if job.has_ended:
                write(await _rest(server, job_id, written, tell, first_wait_s))
                return job
            silent_since = None
            if not is_lost:
                wait_s = first_wait_s
        except ConnectionLostError as error:
            fail(error)
            now = time.monotonic()
            silent_since = now if silent_since is None else silent_since
            if now + wait_s - silent_since > patience_s:
                raise _gave_up(server.address, job_id, patience_s) from error
        except ConfigError as error:  # it was there when we began
            raise ClusterError(
                f"The cluster at {server.address} has forgotten the job {job_id}: it was started "
                "anew, and its jobs ended with it. Submit again: finished work is kept."
            ) from error
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


async def _rest(
    server: Followed, job_id: str, written: int, tell: Callable[[str], None], wait_s: float
) -> str:
    """What is left of the log of a job that has ended: a connection may close before its end."""
    fault = ""
    for tries_left in reversed(range(LOG_TRIES)):
        try:
            return server.logs(job_id)[written:]
        except (ClusterError, ConfigError) as error:
            fault = _fault(error)
        if tries_left:
            await asyncio.sleep(wait_s)
    tell(f"the job has ended, and the rest of its log cannot be read: {fault}")
    return ""


def _fault(error: Exception) -> str:
    return str(error).split(". ", 1)[0]


def _gave_up(address: str, job_id: str, patience_s: float) -> ClusterError:
    return ClusterError(
        f"The cluster at {address} gave no answer for {patience_s:.0f} s. If it lives, so does the "
        f"job: `raydiffusion attach {job_id} --address {address}`. If its head died, its jobs died "
        "with it: submit again once it is back; finished work is kept."
    )


async def _until_silent(parts: AsyncIterator[str], silent_s: float) -> AsyncIterator[str]:
    """The parts, until there are no more or none has come for so long."""
    try:
        while True:
            yield await asyncio.wait_for(anext(parts), silent_s)
    except (StopAsyncIteration, TimeoutError):
        return
    finally:
        with contextlib.suppress(ConnectionLostError):
            await cast("AsyncGenerator[str]", parts).aclose()
