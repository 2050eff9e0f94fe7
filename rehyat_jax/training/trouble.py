"""Ends a run whose data cannot be read, whose logs cannot be written, or whose updates are not finite."""

import errno
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from rehyat_jax.errors import InputError, RunDivergedError
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.parallel.mesh import part_of_process
from rehyat_jax.training.run_data import RunData


def next_batch(data: RunData, step: int, trouble: InputError | None = None) -> dict[str, np.ndarray]:
    """This process's part of the batch of a step. All processes must call it.

    The processes wait for one another here to learn whether each of them has its part. A step needs all processes, and
    so does a checkpoint of the state before it.

    Args:
      trouble: what went wrong in this process since the last call, such as a full disk, and ends the run.

    Raises:
      InputError: some process cannot read its part, or has trouble. All processes raise it, and `data` is before that
        step again.
    """
    error: Exception | None = trouble
    try:
        batch = next(data)
    except (InputError, OSError, RuntimeError) as caught:
        error = error or caught
    without = processes_that(error is not None)
    if not without:
        return batch
    data.rewind(step)
    if error is None:
        raise InputError(
            f"training data: processes {without} cannot read their part of step {step}, or cannot write the run's "
            f"logs; see what they say"
        )
    if isinstance(error, InputError):
        raise error
    # A worker that writes to a full tmpfs is killed by SIGBUS, unless the system refuses the file itself.
    is_full = getattr(error, "errno", None) == errno.ENOSPC or f"exit code -{signal.SIGBUS.value}." in str(error)
    remedy = (
        "shared memory (/dev/shm) is full: make it larger (docker run --shm-size=16g), or lower config.data.workers"
        if is_full
        else "a worker that was killed had most likely too little memory: lower config.data.workers"
    )
    raise InputError(
        f"training data: cannot be read ({error}); correct that and give the same command again; {remedy}"
    ) from error


def processes_that(condition: bool) -> list[int]:
    """The processes in which a condition holds. All processes must call it."""
    return np.flatnonzero(multihost_utils.process_allgather(np.array(condition))).tolist()


def check_finite(state: Any, step: int, saved: int | None) -> None:
    """Raises RunDivergedError if the state after a step, which is about to be saved, has a NaN or an infinity.

    All processes must call it. An update is skipped if its gradient is not finite, but too large a rate can make
    parameters overflow even so.

    Args:
      saved: step of the newest checkpoint; None if there is none.
    """
    if bool(_all_finite((state["params"], state["ema"]))):
        return
    again = "there is no checkpoint; start again" if saved is None else f"the same command goes on after step {saved}"
    raise RunDivergedError(
        f"parameters are not finite after step {step}, and nothing of them was saved: lower "
        f"config.optimizer.learning_rate; {again}"
    )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def report_divergence(workdir: Path, data: RunData, step: int, skipped: int) -> None:
    """Saves the batch of the first of `skipped` steps up to `step`, and raises RunDivergedError."""
    first = step - skipped + 1
    data.rewind(first)
    batch = next_batch(data, first)
    part, parts = part_of_process(jax.sharding.get_mesh())
    name = f"skipped_step_{first}" + (f"_part_{part}_of_{parts}" if parts > 1 else "")
    file = workdir / f"{name}.safetensors"
    with reported_write_errors(file), written_whole(file) as temporary:
        save_file(batch, temporary)
    raise RunDivergedError(
        f"the last {skipped} updates were skipped: loss or gradient was not finite, or far above its usual size. "
        f"Parameters are those after step {first - 1}, and are saved; {file} is the first batch that failed. "
        f"docs/faults.md shows how to look at it and how to resume"
    )
