"""Sections "correctness*": hybrid attention on this device, compared with the float64 reference."""

from collections.abc import Iterator

from rehyat_jax.benchmarks.gpu import check, check_states
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes


def rows(sizes: Sizes, implementations: str) -> Iterator[Row]:
    """One row for every implementation, stabilizer and direction of time, then the rows of a video in two parts.

    Args:
      sizes: sizes with the names of the implementations.
      implementations: name of the field of `sizes` with the implementations to check.
    """
    yield from check(getattr(sizes, implementations))
    yield from check_states(getattr(sizes, implementations))
