"""Parameters in Orbax checkpoints, saved and restored one array at a time.

The result is an ordinary Orbax PyTree checkpoint of arrays: any Orbax restore can read it, also directly into
shardings. Orbax by itself would hold all arrays of a tree in memory at once. A leaf type that is read only when it is
written therefore has its own registered handler, which is an extension that Orbax supports.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from rehyat_jax.errors import InputError
from rehyat_jax.weights.streamed import StreamedArray

CHUNK_BYTES = 64 * 2**20
"""Largest size of the files that store an array, and the unit of write buffers and of sharded reads."""


class StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Saves `StreamedArray`s as numpy arrays: reads, writes and frees one before the next."""

    async def serialize(
        self,
        values: Sequence[StreamedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args, strict=True):
            (write,) = await super().serialize([value.read()], [info], [arg])
            write.result()
            del write  # it references the values
        return []

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        # In one call, the first damaged array would leave the others' threads complaining about a closed event loop.
        found = []
        for info in infos:
            found += await super().metadata([info])
        return found


def _handler() -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, StreamedArrayHandler(deepcopy_host_arrays=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    # OCDBT gathers all of an array's chunks in memory before it writes them (3.4 GB at the peak for arrays of 1.65 GB,
    # 2.3 GB without it), and trained weights hardly compress (7% of float32).
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)


def save_params(directory: Path, params: dict[str, StreamedArray]) -> None:
    """Saves parameters as an Orbax PyTree checkpoint.

    Args:
      directory: absolute path that does not exist yet.
      params: parameters by path, which is the keys of the tree joined by dots.
    """
    tree = traverse_util.unflatten_dict(params, sep=".")
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def save_arrays(directory: Path, params: dict[str, jax.Array]) -> None:
    """`save_params` for arrays spread over several processes: each process writes the parts that its devices hold."""
    tree = traverse_util.unflatten_dict(params, sep=".")
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def open_params(directory: Path) -> dict[str, StreamedArray]:
    """The saved arrays by path, which is the keys of the tree joined by dots.

    Args:
      directory: absolute path.

    Raises:
      InputError: the directory is not an Orbax checkpoint of arrays. Damaged values are found when they are read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: does not exist; the model checkpoint is incomplete, convert or train it again")
    with _reported_damage(directory):
        tree = _handler().metadata(epath.Path(directory)).tree
        return {
            path: StreamedArray(array.shape, np.dtype(array.dtype), functools.partial(_restore, directory, path))
            for path, array in traverse_util.flatten_dict(tree, sep=".").items()
        }


def restore_arrays(
    directory: Path, shardings: dict[str, jax.sharding.Sharding], dtype: np.dtype
) -> dict[str, jax.Array]:
    """The saved arrays by path, cast to `dtype`. Each process reads only the parts that its devices hold.

    Raises:
      InputError: the saved arrays are damaged.
    """
    unflatten = functools.partial(traverse_util.unflatten_dict, sep=".")
    restore_args = {
        path: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, dtype=dtype)
        for path, sharding in shardings.items()
    }
    args = ocp.args.PyTreeRestore(
        unflatten(dict.fromkeys(shardings, 0)), restore_args=unflatten(restore_args), partial_restore=True
    )
    with _reported_damage(directory):
        restored = _handler().restore(epath.Path(directory), args=args)
    return traverse_util.flatten_dict(restored, sep=".")


def _restore(directory: Path, path: str) -> np.ndarray:
    unflatten = functools.partial(traverse_util.unflatten_dict, sep=".")
    # Restores a numpy array from a checkpoint of one process and from one of several.
    restore_args = unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray)})
    with _reported_damage(directory):
        args = ocp.args.PyTreeRestore(unflatten({path: 0}), restore_args=restore_args, partial_restore=True)
        restored = _handler().restore(epath.Path(directory), args=args)
    return traverse_util.flatten_dict(restored, sep=".")[path]


@contextlib.contextmanager
def _reported_damage(directory: Path) -> Iterator[None]:
    """Turns the errors of Orbax and TensorStore for missing or damaged files into an InputError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).split(" [tensorstore_spec")[0]
        raise InputError(
            f"{directory}: is not a complete Orbax checkpoint of arrays ({reason}); write it again"
        ) from error
