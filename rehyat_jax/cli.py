"""Functions shared by all command-line modules: running a command and reporting errors in the user's input."""

import os
import signal
import sys
from collections.abc import Callable
from logging import CRITICAL, getLogger
from typing import Any

import jax
from absl import logging

from rehyat_jax.errors import InputError, RunEndedError

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""


def report_input_errors(run: Callable[[], Any]) -> int:
    """Runs a command; prints the errors of `rehyat_jax.errors`, or of Ctrl-C, without a traceback.

    Returns:
      The exit code.
    """
    # Orbax warns that a checkpoint has nothing to merge, which is intended, and logs the errors that it raises.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if jax.distributed.is_initialized():
            # The other processes wait for this one in some collective, and its orderly exit would wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.exit_code)
        return error.exit_code
    except RunEndedError as end:
        print(end, file=sys.stderr)
        return end.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was complete is kept", file=sys.stderr)
        return INTERRUPTED
    return 0
