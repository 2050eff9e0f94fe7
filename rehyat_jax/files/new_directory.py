"""Directories that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from rehyat_jax.errors import InputError
from rehyat_jax.files.write import remove


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yields a temporary directory next to `path` to fill; it becomes `path` when the block ends without error.

    Args:
      path: absolute destination; missing parents are created.
      replace: whether to replace what exists at `path`; it is removed only after the new directory is complete.

    Raises:
      InputError: `path` exists and is not to be replaced, or can't be written.
    """
    if os.path.lexists(path) and not replace:
        raise InputError(f"{path}: already exists; choose another destination or replace it with --force")
    temporary = _temporary(path, os.getpid())
    previous = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another destination") from error
    try:
        yield temporary
        if os.path.lexists(path):
            path.rename(previous)
        try:
            temporary.rename(path)
        except OSError:
            if os.path.lexists(previous):
                previous.rename(path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    remove(previous)


@contextlib.contextmanager
def new_shared_directory(path: Path, *, replace: bool) -> Iterator[Path]:
    """`new_directory` for all processes of a run: the first creates and renames it, and all may write into it."""
    with contextlib.ExitStack() as stack:
        number, error = os.getpid(), None
        if jax.process_index() == 0:
            try:
                stack.enter_context(new_directory(path, replace=replace))
            except InputError as refusal:
                number, error = 0, refusal
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
        if number == 0:
            raise error or InputError(f"{path}: the first process could not make it; see what it says")
        yield _temporary(path, number)
        multihost_utils.sync_global_devices(f"{path} is full")
    multihost_utils.sync_global_devices(f"{path} is complete")


def _temporary(path: Path, number: int) -> Path:
    return path.with_name(f".{path.name}.{number}.incomplete")
