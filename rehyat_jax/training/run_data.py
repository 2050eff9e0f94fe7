"""A run's batches: this process's part of them, their arrays on the mesh, and the count of skipped corrupt records."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rehyat_jax.data.pipeline import SKIPPED, Source, batches
from rehyat_jax.parallel.mesh import part_of_process
from rehyat_jax.parallel.sharding import global_batches


class RunData:
    """Endless iterator of this process's part of batches [accumulation_steps, B, ...], for the mesh in use.

    Args:
      source: source of the examples.
      config: batch_size and accumulation_steps (for the size of a batch), data.corrupt and data.weights are read.
      seed: seed of the shuffle.
      accumulation_steps: number of batches that come at a time.
      workers: number of processes that prepare batches ahead of time.

    Raises:
      InputError: config.data.weights does not fit the source, or `part_of_process` raises it.
    """

    def __init__(
        self,
        source: Source,
        config: ml_collections.ConfigDict,
        *,
        seed: int,
        accumulation_steps: int,
        workers: int = 0,
    ):
        part, self._parts = part_of_process(jax.sharding.get_mesh())
        self._skips = config.data.corrupt == "skip"
        self._skipped = 0
        self._batches = batches(
            source,
            batch_size=config.batch_size // config.accumulation_steps,
            seed=seed,
            accumulation_steps=accumulation_steps,
            workers=workers,
            part=part,
            parts=self._parts,
            weights=config.data.weights,
            skip_corrupt=self._skips,
        )

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def on_mesh(self, part: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch [accumulation_steps, B, ...] on the mesh; each process gives its part."""
        batch = global_batches(part, self._parts)
        if SKIPPED in batch:
            # Summed over all processes and kept on the device: nothing waits for the sum until it is read.
            self._skipped = self._skipped + jnp.sum(batch.pop(SKIPPED))
        return batch

    def metrics(self) -> dict[str, int]:
        """Number of corrupt records replaced since the run began; empty if corrupt records stop the run."""
        return {"skipped_records": int(self._skipped)} if self._skips else {}

    def get_state(self) -> dict[str, int]:
        """The state with which `set_state` resumes from here: JSON, equal in all processes."""
        return {**self._batches.get_state(), SKIPPED: int(self._skipped)}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Moves to the position of an earlier iterator of this run, perhaps of other processes."""
        self._batches.set_state(state)
        self._skipped = state[SKIPPED]

    def rewind(self, step: int) -> None:
        """Moves to the position before a step, counted from 1."""
        self._batches.seek(step - 1)

    def close(self) -> None:
        """Stops threads and workers."""
        self._batches.close()
