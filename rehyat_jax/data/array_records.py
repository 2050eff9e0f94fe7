"""Starts the threads of ArrayRecord's reader, which waits for ever where the system refuses it some of them."""

import contextlib
import functools
import os
import threading

from array_record.python.array_record_module import ArrayRecordReader

from rehyat_jax.errors import InputError

THREADS = 80
"""Number of threads to try; the reader starts 64, no matter how many records it reads."""

_STARTING = threading.Lock()


def start_reader() -> None:
    """Starts the reader's threads, once in a process, before anything is read.

    Raises:
      InputError: the system refuses the threads, most likely because the memory of a process is limited.
    """
    with _STARTING:
        _start()


@functools.cache
def _start() -> None:
    end = threading.Event()
    trials = [threading.Thread(target=end.wait, daemon=True) for _ in range(THREADS)]
    started = []
    try:
        for trial in trials:
            trial.start()
            started.append(trial)
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"ArrayRecord's reader: expected room for {THREADS} threads, found room for {len(started)} ({error}); "
            f"remove the limit on memory (ulimit -v), or raise the one on threads (ulimit -u, or the container's)"
        ) from error
    finally:
        end.set()
        for trial in started:
            trial.join()
    with contextlib.suppress(RuntimeError, ValueError):
        ArrayRecordReader(os.devnull)  # is not a shard, but the threads start first, and they stay
