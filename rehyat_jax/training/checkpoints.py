"""Checkpoints of a run in progress: Orbax saves them asynchronously, and checksums reveal a damaged one.

A checkpoint has everything that a resumed run depends on. `state` is the training state. `run` is a JSON object with
the position in the data, the configuration and the version of the code.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from rehyat_jax.errors import InputError
from rehyat_jax.extras import install_command
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.parallel.sharding import host_shardings
from rehyat_jax.training.checksums import find_damage, write_checksums
from rehyat_jax.training.step import State

DAMAGED = "damaged-"
"""Prefix of the step in the name of a damaged checkpoint that was set aside."""


SAVE_SECONDS = 1200
"""Seconds after which a save counts as failed. Processes that could write wait this long for one that could not."""


class Keep(NamedTuple):
    """Which checkpoints are kept.

    Attributes:
      last: number of newest checkpoints to keep. With only one, a damaged checkpoint has no replacement.
      every: keeps the checkpoints of steps that are multiples of this number; 0 keeps none for that.
      best: number of checkpoints with the lowest loss to keep.
    """

    last: int
    every: int = 0
    best: int = 0

    def policy(self) -> AnyPreservationPolicy:
        loss = lambda metrics: metrics["loss"]
        policies = [LatestN(self.last)]
        if self.every:
            policies.append(EveryNSteps(self.every))
        if self.best:
            policies.append(
                BestN(get_metric_fn=loss, reverse=True, n=self.best, keep_checkpoints_without_metrics=False)
            )
        return AnyPreservationPolicy(policies)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its preemption check: only `StopSignal` may ask JAX at which step processes stop."""

    def reached_preemption(self, step: int) -> bool:
        return False


class RunCheckpoints:
    """Saves and restores checkpoints in one directory, together in all processes of a run.

    A save is complete, with its checksums, or does not exist. Opening a directory compares the newest checkpoint with
    its checksums. A checkpoint that differs is renamed to `damaged-STEP`, and the one before it takes its place.

    Args:
      directory: local directory, or one in an object store that `etils.epath` can reach, such as gs://BUCKET/FOLDER.
      keep: which checkpoints are kept.

    Attributes:
      directory: absolute path of the directory of all checkpoints.

    Raises:
      InputError: all checkpoints are damaged, or the directory cannot be written.
    """

    def __init__(self, directory: epath.PathLike, keep: Keep):
        self.directory = _opened(os.fspath(directory))
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future | None = None
        self._copied_to_host = None
        with reported_write_errors(self.directory):
            _pass_over_damaged(self.directory)
            options = ocp.CheckpointManagerOptions(
                create=False,
                preservation_policy=keep.policy(),
                best_fn=lambda metrics: metrics["loss"],  # without it, metrics are not saved
                cleanup_tmp_directories=True,  # removes what interrupted saves left
                # One process lists the checkpoints: on a shared filesystem the others might not see them yet.
                single_host_load_and_broadcast=True,
                # Listed processes wait for each other through the coordinator. Otherwise they would use a collective.
                # Saves start in a thread, so its order relative to the loop's collectives would differ per process.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(jax.process_count()))
                ),
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=SAVE_SECONDS, post_finalization_callback=self._write_checksums
                ),
            )
            self._manager = _Manager(self.directory, options=options)
        self._newest = self.latest_step

    @property
    def latest_step(self) -> int | None:
        """Number of steps made before the newest save; None if nothing was saved."""
        return self._manager.latest_step()

    def description(self) -> dict[str, Any]:
        """The `run` object that was saved with the newest state."""
        return self._manager.restore(self.latest_step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run

    def restore(self, state: State) -> State:
        """The newest saved state.

        Args:
          state: a state with the right structure, shapes, dtypes and shardings; its arrays may be abstract.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(self.latest_step, args=args).state

    def save(self, step: int, state: State, run: dict[str, Any], loss: float | None = None) -> None:
        """Starts to save the state after `step` steps, unless it was saved; returns before it is on disk.

        The state may be donated at once. The save reads a copy in host memory, which the devices make before any work
        that is queued later.

        Args:
          run: everything else that a resumed run depends on, equal in all processes.
          loss: figure that ranks the checkpoint; without it, the checkpoint cannot be among the best.

        Raises:
          InputError: there is no room for this save, or the previous save could not be written.
        """
        if step == self._newest:
            return
        self.wait()
        with reported_write_errors(self.directory):
            self._check_space(state)
        self._newest = step
        if self._copied_to_host is None:
            self._copied_to_host = jax.jit(lambda tree: tree, out_shardings=host_shardings(state))
        args = ocp.args.Composite(state=ocp.args.StandardSave(self._copied_to_host(state)), run=ocp.args.JsonSave(run))
        self._saving = self._thread.submit(self._save, step, args, None if loss is None else {"loss": loss})

    def check(self) -> None:
        """Raises InputError if the save in progress has failed; does not wait for it."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the save in progress is on disk. Raises InputError if it fails."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with reported_write_errors(self.directory):
                saving.result()

    def close(self) -> None:
        """Waits until everything is on disk. Raises InputError if that fails, or has failed."""
        with reported_write_errors(self.directory), self._thread:
            try:
                self.wait()
            finally:
                self._manager.close()

    def _save(self, step: int, args: ocp.args.Composite, metrics: dict[str, float] | None) -> None:
        """Runs a complete save in the thread, where the errors of Orbax's own threads are raised."""
        try:
            self._manager.save(step, args=args, metrics=metrics, force=True)
            self._manager.wait_until_finished()
        except Exception as error:
            if jax.process_count() == 1:
                raise
            first = error
            while first.__context__ is not None:
                first = first.__context__
            if "DEADLINE_EXCEEDED" not in str(first):
                raise first from error
            raise InputError(
                f"{self.directory}: checkpoint {step} was not written within {SAVE_SECONDS} seconds: another process "
                f"could not write it, and says why, or the disk is too slow; give the same command again"
            ) from error

    def _check_space(self, state: State) -> None:
        """Raises InputError unless there is room: a save that fails half way is hard to clean up."""
        if "://" in str(self.directory) or jax.process_index() > 0:
            return
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if free < needed:
            raise InputError(
                f"{self.directory}: expected {needed / 1e9:.3g} GB of free space for a checkpoint, found "
                f"{free / 1e9:.3g} GB; free some space there, and give the same command again"
            )

    def _write_checksums(self) -> None:
        """Orbax's thread calls this in the first process when all files exist but the checkpoint is not final yet."""
        name = str(self._newest)
        (directory,) = (path for path in self.directory.iterdir() if path.name.partition(".")[0] == name)
        write_checksums(directory)


def _opened(directory: str) -> epath.Path:
    """The directory, which the first process creates. Raises InputError if a file cannot be written there.

    Orbax's threads would find that out late.
    """
    is_local = "://" not in directory
    try:
        path = epath.Path(os.path.abspath(directory) if is_local else directory)
        if jax.process_index() == 0:
            with reported_write_errors(directory):
                path.mkdir(parents=True, exist_ok=True)
                probe = path / "probe"
                probe.write_text("x")
                probe.unlink()
    except InputError:
        raise
    except Exception as error:
        # The libraries of object stores share no class of errors.
        if is_local:
            raise
        reason = (str(error).splitlines() or [""])[0][:300]
        raise InputError(
            f"config.checkpoint_dir: expected a directory, or gs://BUCKET/FOLDER with gcsfs installed, found "
            f"{directory}, which cannot be written ({type(error).__name__}: {reason}); install what is missing "
            f"({install_command('gcs')}), or choose another place"
        ) from error
    return path


def _pass_over_damaged(directory: epath.Path) -> None:
    """Renames damaged checkpoints, from the newest back to the first intact one.

    Raises:
      InputError: the newest cannot be read, which does not mean that it is damaged; or all are damaged.
    """
    while (step := _from_main_process(max(_steps(directory), default=-1))) >= 0:
        damage, trouble = None, None
        try:
            damage = find_damage(directory / str(step), part=jax.process_index(), parts=jax.process_count())
        except OSError as error:
            trouble = error
        if _in_any_process(trouble is not None):
            raise InputError(
                f"{directory}: checkpoint {step} cannot be read ({trouble or 'another process says why'}); repair its "
                f"permissions or the disk, then give the same command again"
            )
        if damage:
            print(f"checkpoint {step} is damaged: {shown(damage, 1000)}", file=sys.stderr, flush=True)
        if not _in_any_process(damage is not None):
            break
        if jax.process_index() == 0:
            aside = directory / f"{DAMAGED}{step}"
            number = 1
            while aside.exists():
                number += 1
                aside = directory / f"{DAMAGED}{step}.{number}"
            (directory / str(step)).rename(aside)
            print(f"it is now {aside}; going back to the checkpoint before it", file=sys.stderr, flush=True)
        _from_main_process(0)  # all processes wait until it is renamed
    else:
        damaged = directory.exists() and any(path.name.startswith(DAMAGED) for path in directory.iterdir())
        if _from_main_process(int(damaged)):
            raise InputError(
                f"{directory}: expected a complete checkpoint, found only damaged ones; start over in another workdir, "
                f"or delete them to start over in this one"
            )
    if jax.process_index() == 0:
        for step in _steps(directory):
            _remove_unreadable_metrics(directory / str(step) / "metrics" / "metrics")
    _from_main_process(0)


def _remove_unreadable_metrics(file: epath.Path) -> None:
    """Deletes metrics that would stop Orbax from opening the directory; the checkpoint is then not among the best."""
    try:
        if file.exists():
            float(json.loads(file.read_bytes())["loss"])
    except (ValueError, TypeError, KeyError):
        file.unlink()


def _steps(directory: epath.Path) -> Iterator[int]:
    """Steps of all complete checkpoints, and of those that were being deleted when the run was killed."""
    if directory.exists():
        yield from (found.step for found in ocp.path.step.standard_name_format().find_all(directory))


def _from_main_process(number: int) -> int:
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


def _in_any_process(condition: bool) -> bool:
    return bool(np.any(multihost_utils.process_allgather(np.bool_(condition))))
