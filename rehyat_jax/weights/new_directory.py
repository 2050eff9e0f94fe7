"""Directories that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rehyat_jax.errors import InputError


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yields a temporary directory beside `path` to be filled; it becomes `path` when the block ends without error.

    Args:
      path: absolute destination; missing parents are created.
      replace: whether to replace what exists at `path`; it is removed only after the new directory is complete.

    Raises:
      InputError: `path` exists and is not to be replaced, or can't be written.
    """
    if os.path.lexists(path) and not replace:
        raise InputError(f"{path}: already exists; choose another destination or replace it with --force")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
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


def remove(path: Path) -> None:
    """Removes a directory, file or link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
