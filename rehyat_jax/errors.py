"""The one exception that command-line users are meant to read."""


class InputError(ValueError):
    """Something the user gave (a file, a tensor, a config field, an argument) is wrong.

    The message names what was read, what was expected, what was found and what to do about it. Command-line modules
    print it without a traceback and exit with code 2.
    """
