"""Low-rank adapters as a file that diffusers' `WanPipeline.load_lora_weights` reads.

The file has two tensors for each adapted layer of each block, named after the layer in diffusers: lora_A [rank, in] and
lora_B [out, rank]. alpha / rank is multiplied into lora_B, because diffusers assumes alpha = rank for this model.
"""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from rehyat_jax.errors import InputError
from rehyat_jax.files.new_directory import new_directory, new_shared_directory
from rehyat_jax.files.shown import check_path
from rehyat_jax.models.lora import LoraConfig, adapted_layers
from rehyat_jax.parallel.sharding import shardings
from rehyat_jax.weights.models import spec_of
from rehyat_jax.weights.safetensors_file import create_file, read_header, read_tensor, write_tensor
from rehyat_jax.weights.table import LINEAR

ADAPTERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""

Adapters = dict[str, tuple[np.ndarray, np.ndarray]]
"""diffusers' name of an adapted weight [out, in] -> (A [rank, in], B [out, rank]), float32; it grows by B A."""


def check_adapters_replaceable(path: Path) -> None:
    """Raises InputError if something exists that `save_adapters` did not write, and that it would lose."""
    check_path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path}: expected a directory for the adapters, found a file; move it")
    if others := sorted(entry.name for entry in path.iterdir() if entry.name != ADAPTERS_FILE or not entry.is_file()):
        raise InputError(f"{path}: expected {ADAPTERS_FILE} alone, found {others[0]}, which would be lost; move it")


def adapter_tensors(config: Any, params: dict[str, Any], lora: LoraConfig) -> dict[str, np.ndarray]:
    """The float32 tensors of the file by name.

    Args:
      config: architecture of the model; its table of parameters has diffusers' names.
      params: nested dict with the adapters, which this process can read completely; other parameters are ignored.
      lora: the adapters.
    """
    spec = spec_of(config)
    names = {row.path: row.names("diffusers") for row in spec.table(config)}
    tensors = {}
    for layer, a, b in adapted_layers(params):
        for number, kernel in enumerate(names[".".join((*layer, "kernel"))]):
            name = f"{spec.part}.{kernel.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = LINEAR.to_torch(np.asarray(a[number], np.float32))
            tensors[f"{name}.lora_B.weight"] = LINEAR.to_torch(np.asarray(b[number], np.float32) * lora.scale)
    return tensors


def read_adapters(path: Path, config: Any) -> Adapters:
    """The adapters of a directory that `save_adapters` wrote, or of its file.

    Args:
      path: the directory or the file.
      config: architecture of the model.

    Raises:
      InputError: the file is missing or damaged, or its tensors are no adapters of such a model.
    """
    file = path / ADAPTERS_FILE if path.is_dir() else path
    spec, tensors = spec_of(config), read_header(file)
    shapes = {name: row.torch_shape for row in spec.table(config) for name in row.names("diffusers")}
    adapters = {}
    for name in sorted(tensors):
        layer = name.removeprefix(f"{spec.part}.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        kernel, (a, b) = f"{layer}.weight", (f"{spec.part}.{layer}.lora_{side}.weight" for side in "AB")
        if name not in (a, b) or kernel not in shapes or not {a, b} <= tensors.keys():
            raise InputError(
                f"{file}: tensor {name} is not one of a pair {spec.part}.LAYER.lora_A.weight and lora_B.weight of this "
                f"model; give the adapters of the student's own run"
            )
        rank, (out, into) = tensors[a].shape[:1], shapes[kernel]
        if (tensors[a].shape, tensors[b].shape) != ((*rank, into), (out, *rank)):
            raise InputError(
                f"{file}: {a} and {b} should have shapes [rank, {into}] and [{out}, rank], found "
                f"{list(tensors[a].shape)} and {list(tensors[b].shape)}; give the adapters of the student's own run"
            )
        adapters.setdefault(kernel, tuple(read_tensor(tensors[side]).astype(np.float32) for side in (a, b)))
    return adapters


def save_adapters(path: str | Path, config: Any, params: dict[str, Any], lora: LoraConfig) -> None:
    """Writes a directory with `ADAPTERS_FILE`, complete or not at all; replaces such a directory that is there.

    All processes of a run call it. The first one writes.

    Args:
      path: the directory; missing parents are created.
      config, params, lora: those of `adapter_tensors`; adapters may be sharded over the mesh in use.

    Raises:
      InputError: something else exists at `path`, it can't be written, or a value is NaN or infinite.
    """
    path = Path(path).absolute()
    check_adapters_replaceable(path)
    if not jax.sharding.get_abstract_mesh().empty:
        params = jax.jit(lambda tree: tree, out_shardings=shardings(PartitionSpec()))(params)
    several = jax.process_count() > 1
    make: contextlib.AbstractContextManager[Path] = (
        new_shared_directory(path, replace=True) if several else new_directory(path, replace=True)
    )
    with make as directory:
        if jax.process_index() == 0:
            tensors = adapter_tensors(config, params, lora)
            sizes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            for name, place in create_file(directory / ADAPTERS_FILE, sizes).items():
                write_tensor(place, tensors[name])
