"""How much memory a call takes at its peak, whichever library's arrays they are; Linux with glibc only."""

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError

_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], Any]) -> int:
    """By how much this process's resident memory rises above its present size while `run()` runs, results included.

    To be called in a `measuring_process`. In any other, memory that earlier calls have freed may still be resident, and
    its use would not show.
    """
    gc.collect()
    _CLEAR_REFS.write_text("5")  # the highest resident size so far becomes the present one
    before = _resident_bytes("VmRSS")
    result = run()
    highest = _resident_bytes("VmHWM")
    del result
    return highest - before


@contextlib.contextmanager
def measuring_process(initialize: Callable[[], Any] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A fresh Python process in which arrays of 64 KiB or more are given pages of their own, and give them back.

    `initialize`, a function that can be pickled, is called there first.

    Raises:
      InputError: on systems without Linux's records of memory.
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
