"""What a strike cost a training, from the rows of its trace."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Recovery:
    """What a strike cost.

    Args:
        struck_at_step: the last optimiser step that was made before training stopped, or was struck
            if it did not.
        resumed_from: the checkpoint from which new processes went on; None: the old ones did.
        steps_lost: optimiser steps that had been made and were made again; None: nothing went on.
        seconds_to_recover: from the strike to the first step that had not been made before; None
            if there was none.
        longest_pause_s: between two steps, from the strike on.
        workers_before: processes that trained.
        workers_after: processes that went on.
    """

    struck_at_step: int
    resumed_from: int | None
    steps_lost: int | None
    seconds_to_recover: float | None
    longest_pause_s: float
    workers_before: int
    workers_after: int


def measure(rows: Sequence[Row], struck_at: float) -> Recovery:
    """What a strike cost, from the rows of a trace.

    Steps that survivors still made after the strike count as made before it. Where no process came
    anew, whether anything was lost is not for the rows to say.

    Args:
        rows: of the trace, in order; at least one from before the strike.
        struck_at: when, in seconds since the epoch.
    """
    old = [row for row in rows if row["at"] <= struck_at][-1]
    times = [old["at"], *(row["at"] for row in rows if row["at"] > struck_at)]
    new = [row for row in rows if row["at"] > struck_at and row["pid"] != old["pid"]]
    last, past, resumed_from = old["global_step"], None, None
    if new:
        last = max(row["global_step"] for row in rows if row["pid"] == old["pid"])
        past = next((row for row in new if row["global_step"] > last), None)
        resumed_from = (past or new[-1])["first_step"]
    return Recovery(
        struck_at_step=last,
        resumed_from=resumed_from,
        steps_lost=last - resumed_from if resumed_from is not None else None,
        seconds_to_recover=past["at"] - struck_at if past is not None else None,
        longest_pause_s=max((b - a for a, b in itertools.pairwise(times)), default=0.0),
        workers_before=old["world_size"],
        workers_after=rows[-1]["world_size"],
    )
