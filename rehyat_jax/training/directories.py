"""The directories of a run: one run at a time may write there."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections

from rehyat_jax.errors import InputError
from rehyat_jax.files.lock import locked
from rehyat_jax.files.temporary import remove_leftovers
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.training.trouble import processes_that
from rehyat_jax.weights.adapters import check_adapters_replaceable
from rehyat_jax.weights.model_checkpoint import check_replaceable


@contextlib.contextmanager
def run_directories(config: ml_collections.ConfigDict, workdir: Path) -> Iterator[None]:
    """Makes a run's workdir and `config.checkpoint_dir` and locks them, in its first process, until the block ends.

    All processes must enter the block. A directory in an object store is not locked.

    Raises:
      InputError: another run is writing there, or the directories cannot be written. All processes raise it.
    """
    error = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                _prepare(config, workdir, stack)
            except InputError as caught:
                error = caught
        if processes_that(error is not None):
            raise error or InputError(f"{workdir}: process 0 cannot use it; see what it says")
        yield


def _prepare(config: ml_collections.ConfigDict, workdir: Path, stack: contextlib.ExitStack) -> None:
    is_elsewhere = config.checkpoint_dir and "://" not in config.checkpoint_dir
    local = [workdir, Path(config.checkpoint_dir)] if is_elsewhere else [workdir]
    for directory in local:
        with reported_write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
    for directory in {directory.resolve(): directory for directory in local}.values():
        stack.enter_context(locked(directory))
    with reported_write_errors(workdir):
        remove_leftovers(workdir)
    check_replaceable(workdir / "model")
    if config.lora.rank:
        check_adapters_replaceable(workdir / "adapter")
