"""The errors a user can meet, by who is at fault, each with the exit code of the program.

Every message is one sentence of fault and one of remedy. All are picklable: Ray moves them
between processes.
"""


class RaydiffusionError(Exception):
    """Something the user can mend; `exit_code` is what the program ends with."""

    exit_code = 1


class ConfigError(RaydiffusionError):
    """The config or the command line is wrong."""

    exit_code = 2


class DataError(RaydiffusionError):
    """The images are missing or not what they should be."""

    exit_code = 3


class StorageError(RaydiffusionError):
    """The storage root cannot be read or written, or holds something damaged."""

    exit_code = 4


class TrainingError(RaydiffusionError):
    """Training cannot go on."""

    exit_code = 5


class EvaluationError(RaydiffusionError):
    """A score cannot be computed or would mean nothing."""

    exit_code = 6


class ClusterError(RaydiffusionError):
    """The Ray cluster cannot hold or finish the work."""

    exit_code = 7


class BusyError(RaydiffusionError):
    """Another process holds the lease and waiting was not wanted."""

    exit_code = 8


class RefusedError(RaydiffusionError):
    """The gate refused a model, or all that is new was held."""

    exit_code = 9


ERRORS: dict[str, type[RaydiffusionError]] = {
    kind.__name__: kind for kind in RaydiffusionError.__subclasses__()
}
