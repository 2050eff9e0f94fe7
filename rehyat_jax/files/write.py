"""Writing files so that a reader never sees half of one, and telling why they cannot be written."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rehyat_jax.errors import InputError

REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "mount it for writing, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EIO: "check the disk",
}
"""What to do about what the system says of a place that cannot be written."""


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes the name `path` when the block ends without an exception.

    Missing parent directories are created. After an exception the temporary file is gone, and whatever was at `path`
    is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own for every call: several hosts may write the same file of a shared folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left of `written_whole` and `new_directory` in a folder that nothing else uses."""
    for kind in ("partial", "incomplete", "replaced"):
        for path in folder.glob(f".*.{kind}"):
            remove(path)


def remove(path: Path) -> None:
    """Removes a directory, file or link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def reported_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raises InputError for what the system, perhaps through TensorStore, says of a place that cannot be written."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # TensorStore's errors have no number, but the system's words.
        number = getattr(error, "errno", None) or next((n for n in REMEDIES if os.strerror(n) in str(error)), None)
        if number not in REMEDIES:
            raise
        raise InputError(
            f"{os.fspath(path)}: cannot be written ({os.strerror(number)}); {REMEDIES[number]}, and give the same "
            f"command again"
        ) from error
