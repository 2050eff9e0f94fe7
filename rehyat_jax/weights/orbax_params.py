"""Parameters in Orbax checkpoints, saved and restored one array at a time.

The result is an ordinary Orbax PyTree checkpoint of arrays: any Orbax restore can read it, also directly into
shardings. Orbax by itself would hold all arrays of a tree in memory at once. A leaf type that is read only when it is
written therefore has its own registered handler, which is an extension that Orbax supports.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import SMALL, check_regular_file
from rehyat_jax.files.shown import check_path
from rehyat_jax.parallel.memory import check_host_memory
from rehyat_jax.weights.streamed import StreamedArray

CHUNK_BYTES = 64 * 2**20
"""Largest size of the files that store an array, and the unit of write buffers and of sharded reads."""

CHUNK_OVERHEAD = 2**20
"""Bytes by which a compressed chunk may exceed its values, if they do not compress."""


class _OpensOneByOne:
    """Opens arrays one after another. Orbax opens all at once, and when one cannot be opened, it closes the event loop
    under the others, whose threads then print tracebacks."""

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence[Any]:
        found = []
        for info in infos:
            found += await super().metadata([info])
        return found


class _NumpyHandler(_OpensOneByOne, ocp.type_handlers.NumpyHandler):
    pass


class _ArrayHandler(_OpensOneByOne, ocp.type_handlers.ArrayHandler):
    pass


class StreamedArrayHandler(_NumpyHandler):
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


def _handler() -> ocp.PyTreeCheckpointHandler:
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, StreamedArrayHandler(deepcopy_host_arrays=False)),
        (np.ndarray, _NumpyHandler()),
        (jax.Array, _ArrayHandler()),
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
    check_path(directory)
    tree = traverse_util.unflatten_dict(params, sep=".")
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with _without_word_of_nothing_to_merge(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def save_arrays(directory: Path, params: dict[str, jax.Array]) -> None:
    """`save_params` for arrays spread over several processes: each process writes the parts that its devices hold."""
    check_path(directory)
    tree = traverse_util.unflatten_dict(params, sep=".")
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with _without_word_of_nothing_to_merge(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=save_args))


@contextlib.contextmanager
def _without_word_of_nothing_to_merge() -> Iterator[None]:
    """Silences one warning of Orbax: that a checkpoint without OCDBT has no parts that OCDBT would merge."""
    is_news = lambda record: "Skipping merge of OCDBT checkpoints" not in record.getMessage()
    logger = getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def open_params(directory: Path) -> dict[str, StreamedArray]:
    """The saved arrays by path, which is the keys of the tree joined by dots.

    Args:
      directory: absolute path.

    Raises:
      InputError: the directory is not an Orbax checkpoint of arrays. Damaged values are found when they are read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: does not exist; the model checkpoint is incomplete, convert or train it again")
    check_path(directory)
    _check_files(directory)
    with _reported_damage(directory):
        tree = _handler().metadata(epath.Path(directory)).tree
        params = {
            path: StreamedArray(
                tuple(array.shape),
                np.dtype(array.dtype),
                functools.partial(
                    _restore, directory, path, nbytes=math.prod(array.shape) * np.dtype(array.dtype).itemsize
                ),
            )
            for path, array in traverse_util.flatten_dict(tree, sep=".").items()
        }
    return params


def _check_files(directory: Path) -> None:
    """Raises InputError for files that TensorStore would wait for, or for which it would take memory without bounds."""
    for path in directory.glob("*"):
        if not path.is_dir():
            if path.name in ("manifest.ocdbt", "zarr.json"):
                raise InputError(
                    f"{path}: expected arrays in Zarr's format 2, as this program writes; write them again"
                )
            check_regular_file(path, largest_bytes=SMALL if path.name.startswith("_") else None)
        elif not path.name.startswith(".") and path.name != "array_metadatas":
            _check_array(path)


def _check_array(folder: Path) -> None:
    """Raises InputError unless the files of one array are all there and of the right size.

    TensorStore would allocate complete chunks, however large, and Orbax would read all arrays at once.
    """
    file = folder / ".zarray"
    check_regular_file(file, largest_bytes=SMALL)
    with _reported_damage(folder):
        array = ts.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}, read=True).result()
    shape, chunks = array.shape, array.chunk_layout.read_chunk.shape or ()
    if any(chunk > max(size, 1) for size, chunk in zip(shape, chunks, strict=True)):
        raise InputError(f"{file}: chunks {chunks} are larger than the array's shape {shape}; the file is damaged")
    chunk_bytes = math.prod(chunks) * array.dtype.numpy_dtype.itemsize
    found = [part for part in folder.iterdir() if not part.name.startswith(".")]
    for part in found:
        check_regular_file(part, largest_bytes=chunk_bytes + CHUNK_OVERHEAD)
    if array.codec.to_json().get("compressor") is not None:
        return
    expected = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
    if len(found) != expected:
        raise InputError(f"{folder}: expected {expected} files with the array's values, found {len(found)}")
    for part in found:
        if part.stat().st_size != chunk_bytes:
            raise InputError(f"{part}: expected {chunk_bytes} bytes, found {part.stat().st_size}; the file is damaged")


def restore_arrays(
    directory: Path, shardings: dict[str, jax.sharding.Sharding], dtypes: dict[str, Any]
) -> dict[str, jax.Array]:
    """The saved arrays by path, cast to `dtypes`. Each process reads only the parts that its devices hold.

    Raises:
      InputError: the saved arrays are damaged.
    """
    unflatten = functools.partial(traverse_util.unflatten_dict, sep=".")
    restore_args = {
        path: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, dtype=dtypes[path])
        for path, sharding in shardings.items()
    }
    args = ocp.args.PyTreeRestore(
        unflatten(dict.fromkeys(shardings, 0)), restore_args=unflatten(restore_args), partial_restore=True
    )
    with _reported_damage(directory):
        restored = _handler().restore(epath.Path(directory), args=args)
    return traverse_util.flatten_dict(restored, sep=".")


def _restore(directory: Path, path: str, nbytes: int) -> np.ndarray:
    unflatten = functools.partial(traverse_util.unflatten_dict, sep=".")
    # Restores a numpy array from a checkpoint of one process and from one of several.
    restore_args = unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray)})
    check_host_memory(nbytes, f"{directory}: {path}", "use a machine with more memory")
    with _reported_damage(directory):
        args = ocp.args.PyTreeRestore(unflatten({path: 0}), restore_args=restore_args, partial_restore=True)
        restored = _handler().restore(epath.Path(directory), args=args)
    return traverse_util.flatten_dict(restored, sep=".")[path]


@contextlib.contextmanager
def _reported_damage(directory: Path) -> Iterator[None]:
    """Turns the errors of Orbax and TensorStore for missing or damaged files into an InputError."""
    try:
        yield
    except Exception as error:
        # For a device's part of an array, Orbax raises a plain Exception in place of TensorStore's error.
        cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
        if not isinstance(cause, ValueError | KeyError | TypeError | AttributeError | OSError):
            raise
        reason = next(iter(str(cause).splitlines()), type(cause).__name__).split(" [tensorstore_spec")[0]
        raise InputError(
            f"{directory}: is not a complete Orbax checkpoint of arrays ({reason}); write it again"
        ) from error
