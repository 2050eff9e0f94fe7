"""Functions shared by all command-line modules: running a command and reporting errors in the user's input."""

import os
import signal
import sys
from collections.abc import Callable
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags, logging

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


def parsed_config(
    values: flags.FlagValues, argv: list[str], config_flag: flags.FlagHolder, *required: flags.FlagHolder
) -> ml_collections.ConfigDict:
    """Parses `argv`, which begins with the program's name, into `values`; returns the --config flag's configuration.

    Raises:
      InputError: a flag or a field is missing, unknown or of the wrong type; for an unknown one, the message names the
        nearest.
    """
    try:
        unparsed = values(argv)[1:]
        if unparsed:
            raise InputError(f"unexpected arguments {unparsed}; options are given as --config.field=value")
        for flag in (config_flag, *required):
            if flag.value is None:
                usage = " ".join(f"--{needed.name} {needed.name.upper()}" for needed in (config_flag, *required))
                raise InputError(f"--{flag.name} is required: python -m rehyat_jax.{Path(argv[0]).stem} {usage}")
        config = config_flag.value
        config.keys()  # a file that failed to load raises its error only when it is used
    except AttributeError as error:
        # ml_collections names the closest field in a nested exception.
        reason = error.args[0]
        while isinstance(reason, Exception):
            reason = reason.args[0]
        raise InputError(f"unknown field of the configuration: {reason}".replace("\n", " ")) from error
    except InputError:
        raise
    except (flags.Error, TypeError, OSError) as error:
        raise InputError(str(error)) from error
    except (ValueError, KeyError) as error:  # ml_collections raises them for a malformed field name
        raise InputError(f"the command line cannot be understood: {error}") from error
    return config
