"""The exceptions whose messages are for command-line users: commands print them without a traceback."""


class InputError(ValueError):
    """Something the user gave (a file, a tensor, a config field, an argument) is wrong.

    The message names what was read, what was expected, what was found and what to do about it. Faults of the user's
    machine, such as a full disk or a vanished file, raise it too.
    """

    exit_code = 2


class RunEndedError(Exception):
    """A training run ended before its last step, in all its processes together, with everything saved."""

    exit_code: int


class RunDivergedError(RunEndedError):
    """Too many updates in a row were skipped."""

    exit_code = 4


class RunStoppedError(RunEndedError):
    """The run was asked to stop; the same command resumes it. The exit code is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75
