"""The configuration of a command line: `--config FILE`, and `--config.field=value` for single fields."""

import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from rehyat_jax.cli import as_called
from rehyat_jax.errors import InputError
from rehyat_jax.files.packaged import closest_config, here_or_packaged, importable_configs
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.training.config import check_config, check_known
from rehyat_jax.training.values import shown_value

T = TypeVar("T")

LARGEST_FILE = 2**20
"""Bytes of the largest configuration file that is read."""

UNREADABLE = (
    AttributeError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Exceptions of ml_collections and of Python's parser for names and values that they cannot parse."""


def parsed_config(values: flags.FlagValues, argv: list[str], *required: flags.FlagHolder) -> ml_collections.ConfigDict:
    """Parses `argv`, which begins with the program's name, into `values`; returns the configuration.

    Args:
      values: the command's own flags.
      required: those of them that must be given.

    Raises:
      InputError: a flag or a field is missing, unknown or has a wrong value; for an unknown field, the message names
        the closest. Or the configuration file cannot be run.
    """
    overrides = (re.match(r"--?(?:no)?config\.([^=\[]+)", argument) for argument in argv[1:])
    check_known(override[1] for override in overrides if override)
    try:
        config_flag = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values["config"].parser = _ConfigFileParser()
        unparsed = values(argv)[1:]
    except flags.Error as error:
        if isinstance(error.__context__, InputError):  # from `_ConfigFileParser`
            raise error.__context__ from None
        raise InputError(_message(error)) from error
    except UNREADABLE as error:
        raise InputError(f"the command line cannot be understood: {_message(error)}") from error
    if unparsed:
        raise InputError(f"unexpected arguments {shown_value(unparsed)}; options are given as --config.field=value")
    for flag in (config_flag, *required):
        if flag.value is None:
            usage = " ".join(f"--{needed.name} {needed.name.upper()}" for needed in (config_flag, *required))
            command = as_called(f"python -m rehyat_jax.{Path(argv[0]).stem}")
            raise InputError(f"--{flag.name} is required: {command} {usage}")
    check_config(config_flag.value)
    return config_flag.value


class _ConfigFileParser(flags.ArgumentParser):
    """Replaces the parser of ml_collections, whose errors do not name a line of the file."""

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        return read_config_file(argument).lock()

    def flag_type(self) -> str:
        return "configuration file"


def read_config_file(argument: str) -> ml_collections.ConfigDict:
    """Runs a configuration file and returns the result of its `get_config`.

    Args:
      argument: path of the file; what comes after a colon is an argument for `get_config`.

    Raises:
      InputError: the file cannot be read, or it fails, or its result is no configuration. The message has the line.
    """
    name, *arguments = argument.split(":", 1)
    expected = "a function get_config that returns default_config() with changes"
    return call_in_file(name, "get_config", ml_collections.ConfigDict, expected, *arguments)


def override_options(file: str, changes: Mapping[str, Any]) -> list[str]:
    """The options of `rehyat_jax.train` for a configuration file with other values of fields, which are paths."""
    shown = {field: value if isinstance(value, str) else repr(value) for field, value in changes.items()}
    return [f"--config={file}", *(f"--config.{field}={value}" for field, value in shown.items())]


def call_in_file(name: str, function: str, kind: type[T], expected: str, *arguments: str) -> T:
    """Runs a configuration file and returns the result of one of its functions.

    Args:
      name: path of the file. One in `configs/` that does not exist here is that of the package.
      function: name of the function, called with `arguments`.
      kind: type of its result.
      expected: the function and its result in words, for the error.

    Raises:
      InputError: the file cannot be read, or it fails, or its result has another type. The message has the line.
    """
    file = here_or_packaged(name)
    content = _content(file)
    module = ModuleType("config_file")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses in the file look for it there
    try:
        with importable_configs(file.parent):
            exec(compile(content, str(file), "exec"), module.__dict__)
            result = getattr(module, function)(*arguments) if hasattr(module, function) else None
    except (Exception, SystemExit) as error:
        kind_of_error, message = type(error).__name__, error.msg if isinstance(error, SyntaxError) else error
        place = _place(error, file)
        raise InputError(f"{place}: {kind_of_error}: {_message(message)}; correct the file") from error
    if not isinstance(result, kind):
        found = shown_value(result) if hasattr(module, function) else "no such function"
        raise InputError(f"{name}: expected {expected}, found {found}; see configs/ for examples")
    return result


def _content(file: Path) -> bytes:
    """The bytes of a configuration file. Raises InputError unless it is a regular file of a program's size."""
    if not os.path.lexists(file) and (nearest := closest_config(file)):
        raise InputError(f"{file}: does not exist here or in the package; did you mean {nearest}?")
    check_regular_file(file, largest_bytes=LARGEST_FILE)
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _place(error: BaseException, file: Path) -> str:
    """FILE:LINE of the innermost line that belongs to a configuration file or to another file in its folder."""
    if isinstance(error, SyntaxError) and error.lineno and error.filename and Path(error.filename).is_file():
        return f"{error.filename}:{error.lineno}"
    folder = file.resolve().parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    lines = [f"{frame.filename}:{frame.lineno}" for frame in frames if Path(frame.filename).resolve().parent == folder]
    return lines[-1] if lines else str(file)


def _message(error: object) -> str:
    """An error's message on one line. ml_collections names the closest field last, so the end must remain."""
    while isinstance(error, Exception) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    return shown(" ".join(str(error).split()), 400)
