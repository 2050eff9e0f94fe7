"""Directories that appear complete or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from rehyat_jax.errors import InputError
from rehyat_jax.files.temporary import LONGEST_NAME, new_token, remove, remove_leftovers, temporary_path

TOKEN_BYTES = 128
"""More than a token of `new_token` takes."""


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool, token: str | None = None) -> Iterator[Path]:
    """Yields a temporary directory next to `path` to fill; it becomes `path` when the block ends without error.

    Args:
      path: absolute destination; missing parents are created.
      replace: whether to replace what exists at `path`; it is removed only after the new directory is complete.
      token: of the temporary directory's name; None for a new one.

    Raises:
      InputError: `path` exists and is not to be replaced, or can't be written.
    """
    if os.path.lexists(path) and not replace:
        raise InputError(f"{path}: already exists; choose another destination or replace it with --force")
    token = token or new_token()
    temporary, previous = (temporary_path(path, token, kind) for kind in ("incomplete", "replaced"))
    try:
        if len(os.fsencode(previous.name)) > LONGEST_NAME:  # or a later --force could not put it back
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        temporary.mkdir(parents=True)
        remove_leftovers(path.parent)
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
        token, error = new_token(), None
        if jax.process_index() == 0:
            try:
                stack.enter_context(new_directory(path, replace=replace, token=token))
            except InputError as refusal:
                token, error = "", refusal
        token = _of_first_process(token)
        if not token:
            raise error or InputError(f"{path}: the first process could not make it; see what it says")
        yield temporary_path(path, token, "incomplete")
        multihost_utils.sync_global_devices(f"{path} is full")
    multihost_utils.sync_global_devices(f"{path} is complete")


def _of_first_process(token: str) -> str:
    sent = np.frombuffer(token.encode().ljust(TOKEN_BYTES), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes().decode().strip()
