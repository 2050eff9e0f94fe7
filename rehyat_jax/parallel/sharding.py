"""Where arrays are on the mesh: parameters say it themselves, where they are declared; activations where they are made.

A parameter is declared with `axes`, the mesh axis that cuts each of its dimensions or None, as metadata. Dimensions in
front that stacking adds are not cut. Of a parameter "fsdp" means "context" too: devices with parts of one video would
hold the same.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.errors import InputError
from rehyat_jax.parallel.mesh import BATCH, axis_size, is_cut

Axes = tuple[str | tuple[str, ...] | None, ...]

FSDP = ("fsdp", "context")
"""What a parameter declared with "fsdp" is cut along."""

RESIDUAL: Axes = (BATCH, "context", None)
"""Activations [batch, tokens, width] between blocks."""

HIDDEN: Axes = (BATCH, "context", "tensor")
"""Activations [batch, tokens, columns] within a block: heads, or a feed-forward layer's columns."""


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, cut along `axes` of the mesh in use; as it is where there is no more than one device."""
    if not is_cut():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def param_specs(abstract: nnx.State) -> dict[str, Any]:
    """The PartitionSpec of every parameter, a nested dict like `nnx.to_pure_dict(abstract)`."""

    def spec(variable: nnx.Variable) -> PartitionSpec:
        axes = _axes(variable)
        return PartitionSpec(*(None,) * (len(variable.shape) - len(axes)), *axes) if axes else PartitionSpec()

    return nnx.to_pure_dict(jax.tree.map(spec, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def _axes(variable: nnx.Variable) -> Axes:
    return tuple(FSDP if axis == "fsdp" else axis for axis in variable.get_metadata().get("axes", ()))


def gathered(params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """One block's parameters, those cut along "fsdp" whole again and in the compute dtype, which halves what moves.

    Their gradients are summed whole and cut then. Quantised ones, of one byte, keep their dtype.
    """
    if math.prod(map(axis_size, FSDP)) == 1:
        return params

    def whole(variable: nnx.Variable) -> nnx.Variable:
        axes = _axes(variable)
        if FSDP not in axes:
            return variable
        value = variable[...]
        return variable.replace(_gather(value if value.dtype.itemsize == 1 else value.astype(dtype), axes))

    return jax.tree.map(whole, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gather(x: jax.Array, axes: Axes) -> jax.Array:
    return constrain(x, _without_fsdp(axes))


@_gather.defjvp
def _gather_jvp(axes: Axes, inputs: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # The transpose runs these constraints in reverse: a gradient is formed completely, and sharded afterwards. If only
    # the shard is asked for, XLA splits the product into slices that are too narrow for the matrix units. On v5e, a
    # step of 1.3B over 16 devices then took 7,327 million cycles; it took 6,380 with complete gradients. They send
    # twice the bytes between devices: 13 ms of links for 630 ms of compute.
    return _gather(*inputs, axes), constrain(constrain(*tangents, axes), _without_fsdp(axes))


def _without_fsdp(axes: Axes) -> Axes:
    return tuple(None if axis == FSDP else axis for axis in axes)


def check_divisible(params: Any, specs: Any, mesh: Mesh) -> None:
    """Raises InputError, naming a parameter and what would fit, if the mesh cannot cut all parameters evenly."""
    cut: dict[tuple[str, ...], dict[str, int]] = {}
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), leaves, strict=True):
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None:
                axes = axis if isinstance(axis, tuple) else (axis,)
                cut.setdefault(axes, {})[jax.tree_util.keystr(path, simple=True, separator=".")] = size
    for axes, sizes in cut.items():
        parts, shown = math.prod(mesh.shape[axis] for axis in axes), " x ".join(f"mesh.{axis}" for axis in axes)
        for name, size in sizes.items():
            if size % parts:
                common = math.gcd(*sizes.values())
                fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0 and n <= mesh.size)
                raise InputError(
                    f"{shown} is {parts}, which does not divide a dimension of {size} of the parameter {name}; "
                    f"{shown} of {fits} would fit this model"
                )


BATCHES = PartitionSpec(None, BATCH)
"""Batches [accumulation steps, batch, ...] as they reach a step."""


def shardings(specs: Any) -> Any:
    """NamedShardings on the mesh in use (`jax.set_mesh`) of a tree of PartitionSpecs."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def abstract_arrays(shapes: Any, placed: Any) -> Any:
    """Shapes with the shardings of a tree like them: arrays to restore into, or to compile for."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, placed)


def host_shardings(arrays: Any) -> Any:
    """For copies in the hosts' memory: NamedShardings of a tree of arrays on a mesh.

    What several devices hold is cut among them too, where its shape allows it, for a host to have it once.
    """

    def place(array: jax.Array) -> NamedSharding:
        sharding: Any = array.sharding
        mesh, spec = sharding.mesh, sharding.spec
        cuts = [cut if isinstance(cut, tuple) else (cut,) if cut else () for cut in spec]
        cuts += [()] * (array.ndim - len(cuts))
        for axis in mesh.axis_names:
            if any(axis in cut for cut in cuts):
                continue
            for dimension, cut in enumerate(cuts):
                parts = mesh.shape[axis] * math.prod(mesh.shape[name] for name in cut)
                if array.shape[dimension] % parts == 0:
                    cuts[dimension] = (*cut, axis)
                    break
        return NamedSharding(mesh, PartitionSpec(*cuts), memory_kind="pinned_host")

    return jax.tree.map(place, arrays)


def global_batches(part: dict[str, np.ndarray], parts: int) -> dict[str, jax.Array]:
    """Batches on the mesh in use, of which each process has one of `parts` equal parts (`mesh.part_of_process`)."""
    sharding = shardings(BATCHES)

    def place(rows: np.ndarray) -> jax.Array:
        shape = (rows.shape[0], rows.shape[1] * parts, *rows.shape[2:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(place, part)


def on_all_devices(array: np.ndarray) -> jax.Array:
    """An array that every process has, whole on every device."""
    return jax.make_array_from_callback(array.shape, shardings(PartitionSpec()), lambda index: array[index])


def like_params(opt_state: Any, params: Any, specs: Any) -> Any:
    """Specs of an optimizer's state: what has a parameter's path and shape is where it is, the rest on every device.

    (`optax.tree_map_params` would say so too, but not of an optimizer of optimizers, such as Muon with AdamW.)
    """
    keys = lambda path: tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    flat_specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    flat_params = jax.tree_util.tree_leaves_with_path(params)
    known = {keys(path): (leaf.shape, spec) for (path, leaf), spec in zip(flat_params, flat_specs, strict=True)}

    def spec(path: tuple, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        names = keys(path)
        for start in range(len(names)):
            shape, spec = known.get(names[start:], (None, None))
            if shape == leaf.shape:
                return spec
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, opt_state)
