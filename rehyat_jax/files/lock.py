"""Locks a directory for one process."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.write import reported_write_errors

LOCK = "train.lock"
"""The file that is locked. It names its holder and stays: a removed file could be locked by two processes."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock of an existing directory until the block ends.

    The kernel releases the lock of a process that ends, however it ends. On NFS, the server holds the lock for all
    hosts, and releases the lock of a host that is gone after its lease. A filesystem without locks is reported.

    Raises:
      InputError: another process holds the lock, or the directory cannot be written.
    """
    file = directory / LOCK
    with reported_write_errors(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "a process that is starting"
            raise InputError(
                f"{directory}: expected no other training there, found one that is still running: {holder!r}; wait "
                f"until it ends, stop it, or choose another place"
            ) from error
        except OSError as error:
            print(f"{file}: cannot be locked ({error.strerror}); start no other training there", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
