"""Times a program's kernels with JAX's profiler."""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

MOST = 15
"""Number of kernels with separate rows. One more row sums the others."""


def kernel_times(run: Callable[[], Any], hlo: str) -> Iterator[dict[str, Any]]:
    """Rows of the kernels that take longest in one call.

    Args:
      run: the call, which waits for its results.
      hlo: the compiled program's text, which has the source of each operation.

    Yields:
      {"kernel", "operation" (its name in `hlo`), "source" (in the traced program), "calls", "milliseconds"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = list(Path(folder).rglob("*.xplane.pb"))
        times = _times(jax.profiler.ProfileData.from_file(str(files[0]))) if files else {}
    longest = sorted(times.items(), key=lambda item: -item[1][1])
    for (kernel, operation), (calls, nanoseconds) in longest[:MOST]:
        yield _row(kernel, operation, _source(operation, hlo), calls, nanoseconds)
    if rest := [total for _, total in longest[MOST:]]:
        yield _row("all others", "", "", sum(calls for calls, _ in rest), sum(time for _, time in rest))


def _row(kernel: str, operation: str, source: str, calls: int, nanoseconds: float) -> dict[str, Any]:
    return dict(kernel=kernel[:120], operation=operation, source=source, calls=calls, milliseconds=nanoseconds / 1e6)


def _times(profile: jax.profiler.ProfileData) -> dict[tuple[str, str], tuple[int, float]]:
    """(calls, nanoseconds) by kernel and operation."""
    times: dict[tuple[str, str], tuple[int, float]] = {}
    planes = list(profile.planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_gpu or planes:
        for line in plane.lines:
            # The other lines of a GPU's plane repeat the streams' events.
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is None and not on_gpu:
                    continue
                key = event.name, str(operation or "")
                calls, total = times.get(key, (0, 0.0))
                times[key] = calls + 1, total + event.duration_ns
    return times


def _source(operation: str, hlo: str) -> str:
    """The end of the path of JAX operations that were compiled to this one."""
    found = re.search(rf'%{re.escape(operation)} = .*op_name="([^"]*)"', hlo) if operation else None
    return found[1][-160:] if found else ""
