"""What all command-line modules share: how an error of the user's is told."""

import sys
from collections.abc import Callable

from rehyat_jax.errors import InputError


def report_input_errors(run: Callable[[], None]) -> int:
    """Runs a command; prints an InputError without a traceback. Returns the exit code, 0 or 2."""
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
