"""A run's batches, from this process's part of them to arrays on the mesh, and the corrupt records left out of them."""

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
      source: of examples.
      config: batch_size and accumulation_steps (for the examples of a batch), data.corrupt and data.weights are read.
      seed: of the shuffle.
      accumulation_steps: how many batches come at a time.
      workers: processes that make them ahead of time.

    Raises:
      InputError: config.data.weights does not fit the source; or `part_of_process` raises it.
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
        """The whole batch [accumulation_steps, B, ...] on the mesh, of which each process gives its part."""
        batch = global_batches(part, self._parts)
        if SKIPPED in batch:
            # Over all processes, and left on the device: nothing waits for it until it is asked for.
            self._skipped = self._skipped + jnp.sum(batch.pop(SKIPPED))
        return batch

    def metrics(self) -> dict[str, int]:
        """How often another record took the place of a corrupt one since the run began; nothing where none may."""
        return {"skipped_records": int(self._skipped)} if self._skips else {}

    def get_state(self) -> dict[str, int]:
        """What `set_state` needs to go on from here, the same in all processes: JSON."""
        return {**self._batches.get_state(), SKIPPED: int(self._skipped)}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to where another iterator of this run was, perhaps in other processes."""
        self._batches.set_state(state)
        self._skipped = state[SKIPPED]

    def rewind(self, step: int) -> None:
        """Goes to before a step, counted from 1."""
        self._batches.seek(step - 1)

    def close(self) -> None:
        """Stops threads and workers."""
        self._batches.close()
