"""Refuses paths that are not ordinary files, before anything opens them."""

import os
import stat
from pathlib import Path

from rehyat_jax.errors import InputError

SMALL = 2**26
"""Largest size in bytes, 64 MiB, of a file that is read as a whole, such as a configuration or an index."""

LARGEST_LIST = 2**32
"""Largest size in bytes of a list of captions or prompts: tens of millions of them."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_regular_file(path: Path, *, largest_bytes: int | None = None) -> None:
    """Raises InputError unless a path is a regular file, or a link to one, of at most `largest_bytes` bytes.

    The file is not opened: a pipe without a writer would wait for ever, and a device may have no end.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise InputError(f"{path}: expected a regular file, found {kind}; give the path of a file")
    if largest_bytes is not None and found.st_size > largest_bytes:
        raise InputError(
            f"{path}: expected a file of at most {largest_bytes:,} bytes, found {found.st_size:,}; it is damaged or "
            f"of another kind, get it again"
        )
