"""Reads and writes PyTorch checkpoints in either layout as streamed parameters of a model."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.parallel.memory import check_host_memory
from rehyat_jax.weights.models import MODELS, spec_of
from rehyat_jax.weights.safetensors_file import StoredTensor, read_tensor, write_tensor
from rehyat_jax.weights.spec import Inferred, ModelSpec
from rehyat_jax.weights.streamed import StreamedArray, StreamedModel
from rehyat_jax.weights.table import BLOCK, ENCODER_BLOCK, LAYOUTS, Layout, Row, torch_names
from rehyat_jax.weights.torch_config import read_torch_config, write_torch_config
from rehyat_jax.weights.torch_folder import create_files, find_tensors

MAX_SHARD_BYTES = 5 * 10**9
"""Size of the shards in the published diffusers repositories."""

REPACKAGED = ("model.diffusion_model.", "diffusion_model.", "model.")
"""Prefixes of all tensors' names in checkpoints that were repackaged, for ComfyUI for example."""

Progress = Callable[[int], object]
"""Called with the size in bytes of each tensor that was read or written."""

_BLOCK_NAMES = [
    re.compile(re.escape(prefix).replace(r"\{block\}", r"(0|[1-9]\d*)")) for prefix in (BLOCK, ENCODER_BLOCK)
]


def open_torch_checkpoint(
    source: Path, progress: Progress = lambda nbytes: None, specs: Mapping[str, ModelSpec] = MODELS
) -> StreamedModel:
    """Checks names, shapes, dtypes and configuration of a PyTorch checkpoint; its values are read on demand.

    Args:
      source: a safetensors file, an index, a folder of them or a diffusers pipeline's folder. All names of tensors may
        have one prefix of `REPACKAGED`.
      progress: called with the size in bytes of each tensor that is read.
      specs: the models that it may be of, all of the same part of a pipeline.

    Raises:
      InputError: the checkpoint does not belong to a known model, is incomplete, or is damaged. Tensors with NaN or
        infinity are found when they are read.
    """
    (part,) = {spec.part for spec in specs.values()}
    folder, tensors = find_tensors(source, part)
    tensors = _without_prefix(source, tensors)
    spec, layout = _detect(source, tensors, specs)
    _remove_copies(spec, tensors)
    config, metadata = read_torch_config(spec, folder, _infer(spec, source, tensors, layout), layout)
    table = spec.table(config)
    _check_tensors(spec, source, tensors, table, layout)
    params = {}
    for row in table:
        stack = [tensors[name] for name in row.names(layout)]
        params[row.path] = StreamedArray(row.stacked_shape, stack[0].dtype, _reader(row, stack, progress))
    return StreamedModel(config, metadata, params)


def write_torch_checkpoint(
    folder: Path,
    model: StreamedModel,
    layout: Layout,
    *,
    progress: Progress = lambda nbytes: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model in the layout of a PyTorch library; each parameter is in memory only while it is written.

    Args:
      folder: existing empty directory.
      model: the model to write.
      layout: the library whose names and configuration are written.
      progress: called with the size in bytes of each tensor that was written.
      max_shard_bytes: size above which weights are written in shards.

    Raises:
      InputError: a parameter can't be read or holds NaN or infinity.
    """
    spec = spec_of(model.config)
    write_torch_config(spec, folder, model.config, model.metadata, layout)
    rows = spec.table(model.config)
    write_tensors(folder, spec.file_name, model, layout, rows, progress=progress, max_shard_bytes=max_shard_bytes)


def write_tensors(
    folder: Path,
    file_name: str,
    model: StreamedModel,
    layout: Layout,
    rows: list[Row],
    *,
    progress: Progress = lambda nbytes: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes some of a model's tensors. Args: as `write_torch_checkpoint`, and rows of its table. Raises InputError."""
    specs = {}
    for row in rows:
        for name in row.names(layout):
            specs[name] = (model.params[row.path].dtype, row.torch_shape)
    specs = {name: specs[name] for name in torch_names(rows, layout)}
    places = create_files(folder, specs, max_shard_bytes=max_shard_bytes, name=file_name)
    for row in rows:
        _write_parameter(model.params[row.path], row, [places[name] for name in row.names(layout)], progress)


def _block(name: str) -> re.Match | None:
    """The prefix of the name of a block's tensor, with the block's index as its only group."""
    return next(filter(None, (pattern.match(name) for pattern in _BLOCK_NAMES)), None)


def _template(name: str) -> str:
    """A tensor's name with {block} in place of the block's index, as in the table."""
    match = _block(name)
    return f"{name[: match.start(1)]}{{block}}{name[match.end(1) :]}" if match else name


def _without_prefix(source: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names without a prefix of `REPACKAGED`. Raises InputError if only some names have it."""
    prefix = next((prefix for prefix in REPACKAGED if any(name.startswith(prefix) for name in tensors)), "")
    if others := sorted(name for name in tensors if not name.startswith(prefix)):
        one = min(name for name in tensors if name.startswith(prefix))
        raise InputError(
            f"{source}: expected all names of tensors to begin with {prefix!r} or none, found {one} and {others[0]} "
            f"({len(others)} of {len(tensors)} are without it); give a file that has only the model"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _remove_copies(spec: ModelSpec, tensors: dict[str, StoredTensor]) -> None:
    """Keeps one of the tensors that some files store twice. Raises InputError if their shapes differ."""
    for copy, name in spec.copies.items():
        if (tensor := tensors.pop(copy, None)) is None:
            continue
        if tensors.setdefault(name, tensor).shape != tensor.shape:
            raise InputError(
                f"{tensor.file}: tensor {copy} should be a copy of {name} with shape {list(tensors[name].shape)}, "
                f"found {list(tensor.shape)}; the tensors belong to different checkpoints"
            )


def _detect(source: Path, tensors: dict[str, StoredTensor], specs: Mapping[str, ModelSpec]) -> tuple[ModelSpec, Layout]:
    """The model and layout with the most matching names; names that all of them share do not count."""
    found = {_template(name) for name in tensors}
    names = {
        (spec.architecture, layout): {getattr(row, layout) for row in spec.table(spec.smallest)}
        for spec in specs.values()
        for layout in LAYOUTS
    }
    for name in sorted(tensors):
        for spec in specs.values():
            for prefixes, owner in spec.foreign.items():
                if name.startswith(prefixes):
                    raise InputError(
                        f"{source}: tensor {name} belongs to {owner}; only checkpoints of {spec.description} can be "
                        f"read"
                    )
    common = set.intersection(*names.values())
    counts = {key: len(found & known - common) for key, known in names.items()}
    best, *others = sorted(counts, key=counts.get, reverse=True)
    if others and counts[best] == counts[others[0]]:
        known = ", ".join(spec.description for spec in specs.values())
        raise InputError(
            f"{source}: the tensors' names ({', '.join(sorted(tensors)[:3]) or 'none'}, ...) are those of neither "
            f"diffusers nor the original code of {known}; give its checkpoint"
        )
    return specs[best[0]], best[1]


def _infer(spec: ModelSpec, source: Path, tensors: dict[str, StoredTensor], layout: Layout) -> dict[str, Inferred]:
    """The fields of the configuration, and a transformer's "width", that tensors' names and shapes imply."""
    rows = {row.path: row for row in spec.table(spec.smallest)}

    def shape(path: str) -> tuple[tuple[int, ...], str]:
        row = rows[path]
        (name,) = row.names(layout)
        if name not in tensors:
            raise InputError(f"{source}: tensor {name} is missing; the checkpoint is incomplete, get it again")
        found = tensors[name].shape
        if len(found) != len(row.torch_shape):
            raise InputError(
                f"{source}: tensor {name} should have {len(row.torch_shape)} axes, found shape {list(found)}; "
                f"this is not a checkpoint of {spec.description}"
            )
        return row.transform.to_jax(np.broadcast_to(np.uint8(0), found)).shape, name

    inferred = spec.infer(shape, source)
    if not spec.is_transformer:
        return inferred
    blocks = {int(match[1]) for match in map(_block, tensors) if match}
    for block in range(len(blocks)):
        if block not in blocks:
            raise InputError(
                f"{source}: there are tensors of {len(blocks)} blocks up to block {max(blocks)}, but none of block "
                f"{block}; the checkpoint is incomplete, get it again"
            )
    last = next(match[0] for match in map(_block, tensors) if match and int(match[1]) == max(blocks))
    return inferred | {"num_layers": Inferred(len(blocks), f"{last}*")}


def _check_tensors(
    spec: ModelSpec, source: Path, tensors: dict[str, StoredTensor], table: list[Row], layout: Layout
) -> None:
    """Checks that exactly the table's tensors exist, with their shapes, and that stacked tensors share a dtype."""
    expected = {name: row for row in table for name in row.names(layout)}
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(
            f"{source}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are); "
            f"the checkpoint is incomplete, get it again"
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise InputError(
            f"{source}: tensor {extra[0]} is not part of {spec.description} ({len(extra)} such tensors); "
            f"{_why_extra(spec, extra[0])}"
        )
    for name, row in expected.items():
        if tensors[name].shape != row.torch_shape:
            raise InputError(
                f"{tensors[name].file}: tensor {name} should have shape {list(row.torch_shape)}, found "
                f"{list(tensors[name].shape)}; the tensors belong to different checkpoints"
            )
    for row in table:
        first, *others = (tensors[name] for name in row.names(layout))
        for other in others:
            if other.dtype != first.dtype:
                raise InputError(
                    f"{other.file}: tensor {other.name} is {other.dtype}, but {first.name} is {first.dtype}; all "
                    f"blocks are stacked in one array, so convert them to one dtype"
                )


def _why_extra(spec: ModelSpec, name: str) -> str:
    if "feature_map_" in name:
        return 'feature maps need the rehyat.json that was written next to them, with their blocks under "attention"'
    return f"remove it, or give a checkpoint of {spec.description}"


def _write_parameter(array: StreamedArray, row: Row, places: list[StoredTensor], progress: Progress) -> None:
    # A separate function, so that one parameter is freed before the next is read.
    values = array.read()
    layers = [values] if row.blocks is None else values
    for place, layer in zip(places, layers, strict=True):
        write_tensor(place, row.transform.to_torch(layer))
        progress(place.nbytes)


def _reader(row: Row, stack: list[StoredTensor], progress: Progress) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        nbytes = math.prod(row.stacked_shape) * stack[0].dtype.itemsize
        check_host_memory(nbytes, f"{stack[0].file}: {row.path}", "use a machine with more memory")
        array = np.empty(row.stacked_shape, stack[0].dtype)
        layers = [array] if row.blocks is None else array
        for layer, tensor in zip(layers, stack, strict=True):
            layer[...] = row.transform.to_jax(read_tensor(tensor))
            progress(tensor.nbytes)
        return array

    return read
