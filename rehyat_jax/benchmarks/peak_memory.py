"""Measures the peak memory of a call, with arrays of any library; only for Linux with glibc."""

import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rehyat_jax.cli import not_a_command
from rehyat_jax.errors import InputError

_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], Any]) -> int:
    """Largest increase of this process's resident memory while `run()` runs, including the results.

    Call it in a `measuring_process`. In any other process, memory that earlier calls freed may still be resident, and
    its reuse would not be measured.
    """
    gc.collect()
    _CLEAR_REFS.write_text("5")  # resets the highest resident size to the present one
    before = _resident_bytes("VmRSS")
    result = run()
    highest = _resident_bytes("VmHWM")
    del result
    return highest - before


@contextlib.contextmanager
def measuring_process(initialize: Callable[[], Any] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A new Python process in which arrays of 64 KiB or more get separate pages and return them when freed.

    `initialize`, a function that can be pickled, is called there first.

    Raises:
      InputError: the system lacks Linux's records of memory.
    """
    if not _CLEAR_REFS.exists():
        raise InputError(f"memory is measured by Linux's {_CLEAR_REFS}, which this system lacks: run this on Linux")
    variable = "MALLOC_MMAP_THRESHOLD_"  # glibc reads it when a process starts
    before = os.environ.get(variable)
    os.environ[variable] = str(2**16)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=initialize) as process:
            process.submit(os.getpid).result()  # it has started
            yield process
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.cpu"))
