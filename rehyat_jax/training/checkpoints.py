"""Checkpoints of a run in progress: training state and position in the data, saved asynchronously by Orbax."""

from pathlib import Path
from typing import Any

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
        # One process looks for what is there: on a shared filesystem the others might not see it yet.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, single_host_load_and_broadcast=True)
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
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest_step, args=args)
        data.set_state(restored.data)
        return restored.state

    def save(self, step: int, state: State, data: Any) -> None:
        """Starts to save what is there after `step` updates; returns before it is on disk."""
        # The position is the same in all processes, however many: each reads its part of the same batches.
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data.get_state()))
        self._manager.save(step, args=args)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
