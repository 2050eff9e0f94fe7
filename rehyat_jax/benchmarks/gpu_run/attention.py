"""Sections "attention_*": hybrid attention of one layer, compared with full softmax attention."""

import dataclasses
from collections.abc import Iterator

from rehyat_jax.benchmarks.gpu import KINDS, measure
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes


def rows(sizes: Sizes, heads: str, implementations: str) -> Iterator[Row]:
    """One row for each `benchmarks.gpu.Measurement`.

    Args:
      sizes: the sizes to measure.
      heads, implementations: names of the fields of `sizes` with the number of heads and the hybrid implementations.
    """
    for number, frames in enumerate(sizes.frames):
        measured = measure(
            getattr(sizes, heads),
            frames,
            sizes.tokens_per_frame,
            getattr(sizes, implementations),
            full_by="cudnn" if sizes.device == "gpu" else "xla",
            repeats=sizes.repeats,
            # Compilation takes longer than the calls.
            kinds=KINDS if number == 0 else ("full", "torch", "layer"),
        )
        for row in measured:
            measured_all = row.forward_ms is not None and row.both_ms is not None
            yield dataclasses.asdict(row) | {"tokens_per_frame": sizes.tokens_per_frame, "right": measured_all}
