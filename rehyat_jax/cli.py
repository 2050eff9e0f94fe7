"""What all command-line modules share: how a command runs and how an error of the user's is told."""

import sys
from collections.abc import Callable
from typing import Any

from absl import logging

from rehyat_jax.errors import InputError


def report_input_errors(run: Callable[[], Any]) -> int:
    """Runs a command; prints an InputError without a traceback. Returns the exit code, 0 or 2."""
    # Orbax warns that there is nothing to merge in a checkpoint, which is so by choice.
    logging.set_verbosity(logging.ERROR)
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
