"""Loads models from any kind of checkpoint into memory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan_vae.vae import WanVae
from rehyat_jax.parallel.memory import free_dropped_models
from rehyat_jax.parallel.sharding import check_divisible, param_specs, shardings
from rehyat_jax.weights.model_checkpoint import (
    MODEL_FILE,
    PARAMS,
    is_model_checkpoint,
    open_model_checkpoint,
    restore_sharded,
)
from rehyat_jax.weights.models import VAES, spec_of
from rehyat_jax.weights.streamed import StreamedArray, StreamedModel
from rehyat_jax.weights.torch_checkpoint import open_torch_checkpoint
from rehyat_jax.weights.torch_config import CONFIG_FILE, SIDE_CAR
from rehyat_jax.weights.torch_folder import find_tensors
from rehyat_jax.weights.wan_vae.spec import WAN_VAE

TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files in which Orbax notes when it wrote a checkpoint."""


def load_params(path: str | Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The parameters of a model checkpoint, or of a PyTorch checkpoint in either layout.

    Args:
      path: a model checkpoint's directory, or any source that `open_torch_checkpoint` takes.

    Returns:
      (config, nested dict of numpy arrays in their stored dtypes, metadata with "codec" and "text_encoder").

    Raises:
      InputError: the checkpoint does not exist, has another architecture, is incomplete, or is damaged.
    """
    model = open_checkpoint(path)
    arrays = {name: array.read() for name, array in model.params.items()}
    return model.config, traverse_util.unflatten_dict(arrays, sep="."), model.metadata


def read_model_metadata(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """(config, metadata) as from `load_params`, without reading the parameters' values."""
    model = open_checkpoint(path)
    return model.config, model.metadata


def load_wan(path: str | Path, **options: Any) -> WanTransformer:
    """The model of a checkpoint; parameters are on the default device or sharded on the mesh in use (`jax.set_mesh`).

    Args:
      path: path of a checkpoint, as for `load_params`.
      **options: keyword arguments of `WanTransformer` other than config and rngs, and of `load_module`.

    Raises:
      InputError: as in `load_params`.
      TypeError or ValueError: an option's name or value is unknown to `WanTransformer`.
    """
    return load_module(path, open_checkpoint(path), **options)


def load_vae(
    path: str | Path, *, dtype: jnp.dtype = jnp.float32, progress: Callable[[int], object] = lambda nbytes: None
) -> WanVae:
    """The VAE of Wan2.1; parameters are float32, on the default device or on every device of the mesh in use.

    Args:
      path: one of
        - a diffusers VAE's folder, with `config.json` and safetensors files;
        - a safetensors file, or an index of shards, with diffusers' names or the original ones;
        - a diffusers pipeline's folder, with such a folder `vae/`;
        - the folder of one of Wan's original repositories, with `Wan2.1_VAE.safetensors`.
      dtype: compute dtype.
      progress: called with the number of bytes of each parameter that was read.

    Returns:
      The VAE, with `encode` and `decode`.

    Raises:
      InputError: the checkpoint does not exist, is a PyTorch pickle, has another architecture, is incomplete, or is
        damaged.
    """
    path = WAN_VAE.find(Path(path))
    return WanVae(load_module(path, open_torch_checkpoint(path, specs=VAES), progress=progress, dtype=dtype))


def load_module(
    path: str | Path, model: StreamedModel, *, progress: Callable[[int], object] = lambda nbytes: None, **options: Any
) -> Any:
    """The module of an opened checkpoint, placed as in `load_wan`. One parameter at a time is in the host's memory.

    Args:
      path: path of the checkpoint.
      model: result of `open_checkpoint` or `open_torch_checkpoint`.
      progress: called with the number of bytes of each parameter that was read.
      **options: keyword arguments of the module other than config and rngs. The module declares the parameters' dtypes.

    Raises:
      InputError: the values are damaged, or the mesh does not divide a parameter.
    """
    free_dropped_models(model.nbytes)
    graphdef, state = nnx.split(abstract_module(model.config, **options))
    expected = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep=".")
    shapes = lambda arrays: {(name, array.shape) for name, array in arrays.items()}
    if different := shapes(expected) ^ shapes(model.params):
        raise ValueError(f"{path}: expected other parameters for {model.config}, these differ: {sorted(different)}")
    if not jax.sharding.get_abstract_mesh().empty:
        specs = param_specs(state)
        check_divisible(nnx.to_pure_dict(state), specs, jax.sharding.get_mesh())
        dtypes = {name: leaf.dtype for name, leaf in expected.items()}
        return nnx.merge(graphdef, load_sharded(path, model, shardings(specs), dtypes, progress))
    params = {}
    for name, leaf in expected.items():
        params[name] = jnp.asarray(model.params[name].read(), leaf.dtype)
        progress(model.params[name].nbytes)
    return nnx.merge(graphdef, traverse_util.unflatten_dict(params, sep="."))


@functools.cache
def abstract_module(config: Any, **options: Any) -> Any:
    """The module of a configuration with shapes in place of parameters; equal calls give the same one, to be split.

    Args:
      config: configuration of any model in `weights.models`.
      **options: keyword arguments of the module other than config and rngs.
    """
    return nnx.eval_shape(lambda: spec_of(config).model(config, rngs=nnx.Rngs(0), **options))


@functools.cache
def module_bytes(config: Any, **options: Any) -> int:
    """Bytes of the parameters of `abstract_module`."""
    leaves = jax.tree.leaves(nnx.state(abstract_module(config, **options)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def load_sharded(
    path: str | Path,
    model: StreamedModel,
    shardings: dict[str, Any],
    dtypes: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, Any]:
    """A checkpoint's parameters, sharded over the devices.

    A process reads from a model checkpoint only the parts that its devices hold. It reads PyTorch's files one parameter
    at a time.

    Args:
      path: argument of `open_checkpoint`.
      model: result of `open_checkpoint`.
      shardings: nested dict of the parameters' shardings; those of parameters that are not in the checkpoint are
        ignored.
      dtypes: dtype of every parameter by its path; None for float32.
      progress: called with the number of bytes of parameters that were read.

    Raises:
      InputError: the values are damaged.
    """
    wanted = traverse_util.flatten_dict(shardings, sep=".")
    wanted = {name: wanted[name] for name in model.params}
    dtypes = dtypes or dict.fromkeys(wanted, np.dtype(np.float32))
    params = {}
    if is_model_checkpoint(Path(path)):
        params = restore_sharded(Path(path), wanted, dtypes)
        progress(model.nbytes)
    else:
        for name, sharding in wanted.items():
            params[name] = _place(model.params[name], sharding, dtypes[name])
            progress(model.params[name].nbytes)
    return traverse_util.unflatten_dict(params, sep=".")


def _place(array: StreamedArray, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    values = array.read()
    return jax.make_array_from_callback(array.shape, sharding, lambda index: values[index].astype(dtype))


def open_checkpoint(path: str | Path) -> StreamedModel:
    """Opens a checkpoint that `load_params` takes; its values stay on disk. Raises InputError."""
    path = Path(path)
    return open_model_checkpoint(path) if is_model_checkpoint(path) else open_torch_checkpoint(path)


def checkpoint_files(path: str | Path, part: str = "transformer") -> tuple[Path, list[Path]]:
    """(folder, files in it) from which a model is read, without files that only hold times.

    Args:
      path: path of the checkpoint.
      part: the model's folder in a diffusers pipeline.

    Raises:
      InputError: the checkpoint does not exist, or a PyTorch file is damaged.
    """
    path = Path(path)
    if is_model_checkpoint(path):
        # Other hidden files are those of file systems and archives.
        is_read = lambda name: name not in TIMES and (not name.startswith(".") or name in (".zarray", ".zattrs"))
        params = (file for file in (path / PARAMS).rglob("*") if is_read(file.name) and file.is_file())
        return path, [path / MODEL_FILE, *params]
    folder, tensors = find_tensors(path, part)
    described = (folder / name for name in (CONFIG_FILE, SIDE_CAR))
    return folder, [*{tensor.file for tensor in tensors.values()}, *filter(Path.is_file, described)]
