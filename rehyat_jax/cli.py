"""Functions shared by all command-line modules: the command line's parser, running a command, and reporting errors."""

import argparse
import atexit
import contextlib
import errno
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from logging import CRITICAL, ERROR, LogRecord, getLogger
from typing import Any, NoReturn

import jax

from rehyat_jax.ctrl_c import kept_ctrl_c
from rehyat_jax.errors import InputError, RunEndedError
from rehyat_jax.extras import missing_extra
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import REMEDIES

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""

NO_READER = 128 + signal.SIGPIPE
"""The exit code if the program that reads the output ends first, as `head` does."""

MESSAGE_WIDTH, MESSAGE_LINES = 2000, 100
"""Largest size of an error on the terminal; names and values in it may be those of a hostile file."""


started_by_rehyat = False
"""True in a process of the command `rehyat`, which runs a module as `python -m` does."""


def as_called(text: str) -> str:
    """A text with commands as this process was called: `rehyat train` or `python -m rehyat_jax.train`."""
    return re.sub(r"python -m rehyat_jax\.(\w+)(?![\w.])", r"rehyat \1", text) if started_by_rehyat else text


class CommandParser(argparse.ArgumentParser):
    """The parser of a command line; it exits with code 2 on a wrong one.

    Args:
      module: the module below `rehyat_jax`, and a subcommand, as in "prepare latents".
      description: of the command, such as its module's docstring.
      example: arguments of a typical call.
      prog: not used; argparse gives it to the parsers of subcommands.
    """

    def __init__(self, module: str, description: str | None, example: str, prog: str | None = None):
        command = as_called(f"python -m rehyat_jax.{module}")
        super().__init__(
            prog=command,
            description=as_called(description or ""),
            epilog=f"example:\n  {command} {example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        super().error(shown(message, MESSAGE_WIDTH))


def printed_help(argv: list[str], text: str | None) -> bool:
    """True if a command line asks for help; prints the text, for commands without a `CommandParser`."""
    if not {"-h", "--help"}.intersection(argv):
        return False
    print(as_called(text or ""))
    return True


def not_a_command(text: str | None, command: str) -> int:
    """Prints what a module is for, and the command that it belongs to; returns the exit code."""
    usage = "Options: none. Another command uses this module.\n\nExample:\n\n"
    print(f"{text}\n{usage}  python -m rehyat_jax.{command} --help")
    return 0 if {"-h", "--help"}.intersection(sys.argv) else 2


def report_input_errors(run: Callable[[], Any]) -> int:
    """Runs a command; prints the errors of `rehyat_jax.errors`, or of Ctrl-C, without a traceback.

    The system's errors, about files, disks and memory, are the user's to mend too.

    Returns:
      The exit code.
    """
    getLogger("absl").addFilter(_is_news)
    getLogger("asyncio").setLevel(CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        # A path may have bytes that are no text, or characters that the terminal lacks.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        with kept_ctrl_c():
            run()
        sys.stdout.flush()
    except RunEndedError as end:
        print_message(str(end))
        return end.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was complete is kept", file=sys.stderr)
        if _is_own_process():
            atexit.register(_end_at_once, INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        if jax.distributed.is_initialized():
            os._exit(NO_READER)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return NO_READER
    except Exception as error:
        refusal = _as_input_error(error)
        if refusal is None:
            raise
        print_message(f"error: {refusal}")
        if jax.distributed.is_initialized():
            # The other processes wait for this one in some collective, and its orderly exit would wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(refusal.exit_code)
        return refusal.exit_code
    return 0


@contextlib.contextmanager
def progress(message: str) -> Iterator[Callable[[str], None]]:
    """Prints a message on stderr, and the elapsed time every half minute until the block ends.

    Yields a function that prints a further message with the elapsed time.
    """
    print(message, file=sys.stderr, flush=True)
    done, start = threading.Event(), time.monotonic()

    def report(text: str = "") -> None:
        text = f": {text}" if text else ""
        print(f"  {time.monotonic() - start:.0f} seconds{text}", file=sys.stderr, flush=True)

    def tick() -> None:
        while not done.wait(30):
            report()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        done.set()
        thread.join()
        print(f"  done in {time.monotonic() - start:.0f} seconds", file=sys.stderr, flush=True)


def print_message(message: str, *, result: bool = False) -> None:
    """Prints a message of bounded size and without control characters: a result on stdout, all others on stderr.

    Lines after the first are indented, so that no name with a line break passes for a message of its own.
    """
    first, *more = message.split("\n")[:MESSAGE_LINES]
    lines = [first, *(line if line.startswith("  ") else f"  {line}" for line in more)]
    text = "\n".join(shown(line, MESSAGE_WIDTH) for line in lines)
    print(text, file=sys.stdout if result else sys.stderr, flush=True)


def _as_input_error(error: Exception) -> InputError | None:
    """The report of a fault of the user's input or machine; None for any other error."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, ImportError):
        return missing_extra(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    ):
        reason = next(iter(str(error).splitlines()), "") or "an allocation failed"
        return InputError(f"there is too little memory ({reason}); choose smaller sizes or batches, or more devices")
    if isinstance(error, OSError) and (error.filename is not None or error.errno in REMEDIES):
        check = "check the path, its permissions and the disk"
        remedy = check if error.errno == errno.ENOENT else REMEDIES.get(error.errno, check)
        return InputError(f"{'the system' if error.filename is None else error.filename}: {error.strerror}; {remedy}")
    return None


def _is_own_process() -> bool:
    """True if the process was started as `python -m rehyat_jax.COMMAND`, not by a program that called the command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("rehyat_jax.")


def _end_at_once(code: int) -> None:
    """Ends the process without destroying JAX's clients: a thread of XLA that still compiles would crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_lost_its_reader() -> bool:
    """True if the program that reads the output has ended.

    The system is asked: with PYTHONUNBUFFERED, Python keeps nothing that it could flush again to find out.
    """
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return bool(output.poll(0))
    except (OSError, ValueError):  # closed, or no file of the system
        return False


def _is_news(record: LogRecord) -> bool:
    """False for errors that Orbax logs. It also raises them, and those are reported here."""
    return record.levelno < ERROR
