"""Checkpoints of a run in progress: training state and position in the data, saved asynchronously by Orbax."""

from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from rehyat_jax.training.step import State


class RunCheckpoints:
    """Saves and restores (state, data iterator) under `workdir/checkpoints`.

    Args:
      workdir: directory of the run.
      keep: newest checkpoints to keep.
    """

    def __init__(self, workdir: Path, *, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Updates made before the newest save; None when nothing was saved."""
        return self._manager.latest_step()

    def restore(self, state: State, data: Any) -> State:
        """The newest saved state; moves `data` to the position saved with it.

        Args:
          state: a state of the right structure, shapes, dtypes and shardings; its arrays may be abstract.
          data: Grain iterator, changed in place.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(data)
        )
        return self._manager.restore(self.latest_step, args=args).state

    def save(self, step: int, state: State, data: Any) -> None:
        """Starts to save what is there after `step` updates; returns before it is on disk."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data))
        self._manager.save(step, args=args)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
