"""Waiting for a storage that is away."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import StorageError

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 15.0

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Tries again what the storage refuses, for so many seconds since it was first tried.

    Args:
        seconds: until the last attempt begins.
        sleep: waits for so many seconds.
        clock: seconds.
    """

    seconds: float
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def until_done(
        self,
        action: Callable[[], T],
        what: str,
        is_lasting: Callable[[StorageError], bool] = lambda error: False,
    ) -> T:
        """What an action gives, as soon as it does.

        Args:
            action: may raise StorageError, and may be called again.
            what: for the warning, as in "The checkpoint is not read yet".
            is_lasting: of a fault that waiting does not mend.

        Raises:
            StorageError: of the last attempt.
        """
        ends, pause = self.clock() + self.seconds, 1.0
        while True:
            try:
                return action()
            except StorageError as error:
                if is_lasting(error) or (left := ends - self.clock()) <= 0:
                    raise
                pause = min(pause, left)
                logger.warning("%s yet, next try in %.0f s: %s", what, pause, error)
                self.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
