"""The exceptions that command-line users are meant to read: they are printed without a traceback."""


class InputError(ValueError):
    """Something the user gave (a file, a tensor, a config field, an argument) is wrong.

    The message names what was read, what was expected, what was found and what to do about it. So it is with what the
    user's machine has: a full disk, a vanished file.
    """

    exit_code = 2


class RunEndedError(Exception):
    """A training run ended before its last step, all its processes together, with everything saved."""

    exit_code: int


class RunDivergedError(RunEndedError):
    """Too many updates in a row were no use."""

    exit_code = 4


class RunStoppedError(RunEndedError):
    """The run was asked to stop. The code is EX_TEMPFAIL of sysexits.h: the same command goes on."""

    exit_code = 75
