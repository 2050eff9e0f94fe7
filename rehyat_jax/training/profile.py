"""Traces of some of a run's steps by JAX's profiler, for XProf."""

from pathlib import Path
from typing import Any

import jax


def trace_options() -> jax.profiler.ProfileOptions:
    """Options of a trace without Python's own calls, of which there are a million."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


class StepTrace:
    """Traces steps first to last of a run into a folder, on every process; use it with `contextlib.closing`.

    Args:
      steps: (first, last), counted from 1; () for no trace. A run that resumes between them traces the rest.
      folder: `plugins/profile/` is made there, which XProf reads.
    """

    def __init__(self, steps: tuple[int, ...], folder: Path):
        self._first, self._last = steps or (0, -1)
        self._folder = folder
        self._is_running = False

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """A context for the call of a step. It gives the step its number in the trace."""
        if self._first <= number <= self._last and not self._is_running:
            jax.profiler.start_trace(str(self._folder), profiler_options=trace_options())
            self._is_running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, results: Any) -> None:
        """Ends the trace if this was the last of its steps; waits for the step's results before."""
        if self._is_running and number >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace of the steps so far."""
        if self._is_running:
            self._is_running = False
            jax.profiler.stop_trace()
