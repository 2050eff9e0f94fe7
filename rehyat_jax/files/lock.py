"""Locks a directory for one process."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors

LOCK = "train.lock"
"""The file that is locked. It names its holder and stays: a removed file could be locked by two processes."""


LEASE_SECONDS = 120
"""Time for which a server may keep the lock of a host that is gone, 90 seconds by default on NFS, and a margin."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock of an existing directory until the block ends.

    The kernel releases the lock of a process that ends, however it ends. On NFS, the server holds the lock for all
    hosts, and releases the lock of a host that is gone after its lease: a holder on another host is waited for that
    long. A filesystem without locks is reported.

    Raises:
      InputError: another process holds the lock, or the directory cannot be written.
    """
    file = directory / LOCK
    with reported_write_errors(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        try:
            _lock(descriptor, directory)
        except OSError as error:
            print(f"{shown(file)}: cannot be locked ({error.strerror}); start no other training there", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    """Locks an open file. Raises InputError if another process keeps its lock, OSError if there are no locks."""
    started = time.monotonic()
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            is_elsewhere = holder and not holder.startswith(f"host {socket.gethostname()},")
            waited = time.monotonic() - started
            if not is_elsewhere or waited > LEASE_SECONDS:
                raise InputError(
                    f"{directory}: expected no other training there, found one that is still running: "
                    f"{holder or 'a process that is starting'!r}; wait until it ends, stop it, or choose another place"
                ) from error
            if waited < 1:
                print(f"{shown(directory)}: waiting for the lock of {holder!r}", file=sys.stderr, flush=True)
            time.sleep(1)
