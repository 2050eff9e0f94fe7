"""Parameters in Orbax checkpoints, saved and restored one array at a time.

What is written is an ordinary Orbax PyTree checkpoint of arrays: any Orbax restore reads it, also straight into
shardings. Orbax by itself would hold all arrays of a tree in memory at once, so a type of leaf that is read only when
its turn comes is registered with a handler of its own, which is the extension that Orbax offers for this.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from rehyat_jax.errors import InputError
from rehyat_jax.weights.streamed import StreamedArray

CHUNK_BYTES = 64 * 2**20
"""Arrays are stored in files of at most this size, which is also the unit of write buffers and of sharded reads."""


class StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves `StreamedArray`s as numpy arrays: reads, writes and drops one before it turns to the next."""

    async def serialize(
        self,
        values: Sequence[StreamedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            (write,) = await super().serialize([value.read()], [info], [arg])
            write.result()
            del write  # it holds the values
        return []


def _checkpointer() -> ocp.Checkpointer:
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, StreamedArrayHandler(deepcopy_host_arrays=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # OCDBT gathers all of an array's chunks in memory before it writes them (3.4 GB at the peak for arrays of 1.65 GB,
    # 2.3 GB without it), and trained weights don't compress (7% of float32).
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
    )


def save_params(directory: Path, params: dict[str, Any]) -> None:
    """Saves parameters as an Orbax PyTree checkpoint.

    Args:
      directory: absolute path, not existing yet.
      params: nested dict of `StreamedArray`s, numpy arrays or JAX arrays (these also sharded over processes).
    """
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with _checkpointer() as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(params, save_args=save_args))


def open_params(directory: Path) -> dict[str, StreamedArray]:
    """The saved arrays by path, keys joined by dots; each is restored to host memory when it is read.

    Raises:
      InputError: there is no Orbax checkpoint of arrays. Damaged values are found when they are read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: does not exist; the model checkpoint is incomplete, convert or train it again")
    with _checkpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(directory).item_metadata.tree
            stored = traverse_util.flatten_dict(tree, sep=".")
            return {
                path: StreamedArray(
                    tuple(array.shape), np.dtype(array.dtype), lambda path=path: _restore_array(directory, path)
                )
                for path, array in stored.items()
            }
        except _DAMAGE as error:
            raise _damaged(directory, error) from error


def _restore_array(directory: Path, path: str) -> np.ndarray:
    wanted = traverse_util.unflatten_dict({path: 0}, sep=".")
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _checkpointer() as checkpointer:
        try:
            restored = checkpointer.restore(
                directory, args=ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
            )
        except _DAMAGE as error:
            raise _damaged(directory, error) from error
    return traverse_util.flatten_dict(restored, sep=".")[path]


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OSError)
"""What Orbax and TensorStore raise on missing or damaged files."""


def _damaged(directory: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return InputError(f"{directory}: is not a complete Orbax checkpoint of arrays ({reason}); get or write it again")
