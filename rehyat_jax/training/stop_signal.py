"""Handles SIGTERM, with which schedulers announce that they take a machine away, as a request to stop."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

from rehyat_jax.errors import RunStoppedError

ALL_WAS_SAVED = "stopped by SIGTERM after everything was saved; the same command resumes the run"


class StopSignal:
    """Records whether SIGTERM has asked this run to stop. The run then stops between two steps.

    Before the first step, a thread ends the process at once: there is nothing to lose, and Python cannot interrupt a
    process that compiles. Several processes have to stop after the same step. From `jax.distributed.initialize` on,
    JAX takes the SIGTERM of any process as a preemption notice, and the processes agree on a step.

    Use it in a `with` statement. Only the main thread can handle signals; in any other thread no stop is requested.
    """

    def __init__(self):
        self._handles = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        self._lock = threading.Lock()
        self._has_begun = False
        self._is_requested = False

    def __enter__(self) -> Self:
        if self._handles:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            # Python runs handlers only when the main thread returns from C++; the wakeup byte is written at once.
            self._previous_handler = signal.signal(signal.SIGTERM, _do_nothing)
            signal.siginterrupt(signal.SIGTERM, False)
            self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles:
            signal.set_wakeup_fd(self._previous_fd)
            signal.signal(signal.SIGTERM, self._previous_handler)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)

    def is_requested(self, steps: int) -> bool:
        """True if the run should stop after this step, the `steps`-th of this process.

        All processes must call this after every step: JAX agrees on a number just above the largest one that it was
        asked about, and that number must come.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(steps)
        with self._lock:
            self._has_begun = True
            return self._is_requested

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] != signal.SIGTERM:
                continue
            with self._lock:
                self._is_requested = True
                if not self._has_begun:
                    print("stopped by SIGTERM before the first step; the same command starts the run", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(RunStoppedError.exit_code)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal does not end the process."""
