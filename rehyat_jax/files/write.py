"""Writes files so that a reader never sees an incomplete one, and reports why a file cannot be written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.temporary import new_token, temporary_path

REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EIO: "check the disk",
    errno.EEXIST: "move the file that is in the way, or choose another place",
    errno.ENOTDIR: "move the file that is in the way, or choose another place",
    errno.EISDIR: "move the directory that is in the way, or choose another place",
    errno.ENOENT: "make its directory, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "correct the links that lead to one another",
    errno.ESTALE: "mount it again",
}
"""The remedy for each system error of a place that cannot be written."""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; its file is renamed to `path` when the block ends without an exception.

    Missing parent directories are created. After an exception the temporary file is removed, and `path` is unchanged.

    Raises:
      InputError: a directory, a pipe or a device is at `path`. Renaming would remove it, /dev/null for instance.
    """
    path = Path(path)
    if os.path.exists(path):
        check_regular_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is different in every call: several hosts may write the same file of a shared folder.
    temporary = temporary_path(path, new_token(), "partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reported_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns system errors about a place that cannot be written, also those from TensorStore, into InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # TensorStore's errors have no number, but contain the system's message.
        number = getattr(error, "errno", None) or next((n for n in REMEDIES if os.strerror(n) in str(error)), None)
        if number not in REMEDIES:
            raise
        # The system may have refused another file than the place that the caller names.
        other = getattr(error, "filename2", None) or getattr(error, "filename", None)
        where = f": {other}" if isinstance(other, str) and other != os.fspath(path) else ""
        raise InputError(
            f"{os.fspath(path)}: cannot be written ({os.strerror(number)}{where}); {REMEDIES[number]}, and give the "
            f"same command again"
        ) from error


def check_place(file: Path) -> None:
    """Creates the directory of a file that will be written much later, and tries to write there.

    Raises:
      InputError: that fails, or something other than a regular file is at `file`.
    """
    if os.path.exists(file):
        check_regular_file(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(file, new_token(), "partial")
        probe.write_bytes(b"0")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be written ({reason}); choose another place") from error
