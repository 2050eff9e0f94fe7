"""Where arrays are on the mesh: parameters say it themselves, where they are declared; activations where they are made.

A parameter is declared with `axes`, the mesh axis that cuts each of its dimensions or None, as metadata. Dimensions in
front that stacking adds are not cut.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.errors import InputError
from rehyat_jax.parallel.mesh import BATCH

Axes = tuple[str | None, ...]

TOKENS: Axes = (BATCH, "context", None)
"""Activations [batch, tokens, width] between blocks."""

HIDDEN: Axes = (BATCH, "context", "tensor")
"""Activations [batch, tokens, columns] within a feed-forward layer."""


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, cut along `axes` of the mesh in use; as it is where there is no more than one device."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def param_specs(abstract: nnx.State) -> dict[str, Any]:
    """The PartitionSpec of every parameter, a nested dict like `nnx.to_pure_dict(abstract)`."""

    def spec(variable: nnx.Variable) -> PartitionSpec:
        axes = variable.get_metadata().get("axes", ())
        return PartitionSpec(*(None,) * (len(variable.shape) - len(axes)), *axes) if axes else PartitionSpec()

    return nnx.to_pure_dict(jax.tree.map(spec, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def gathered(params: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """One block's parameters, those cut along "fsdp" whole again and in the compute dtype, which halves what moves.

    Their gradients are summed and cut in one operation, a reduce-scatter.
    """
    if dict(jax.sharding.get_abstract_mesh().shape).get("fsdp", 1) == 1:
        return params

    def whole(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes", ())
        if "fsdp" not in axes:
            return variable
        return variable.replace(_gather(variable[...].astype(dtype), axes))

    return jax.tree.map(whole, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: jax.Array, axes: Axes) -> jax.Array:
    return constrain(x, tuple(None if axis == "fsdp" else axis for axis in axes))


_gather.defvjp(lambda x, axes: (_gather(x, axes), None), lambda axes, _, cotangent: (constrain(cotangent, axes),))


def check_divisible(params: Any, specs: Any, mesh: Mesh) -> None:
    """Raises InputError, naming a parameter and what would fit, if the mesh cannot cut all parameters evenly."""
    cut: dict[str, dict[str, int]] = {}
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), leaves, strict=True):
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None:
                cut.setdefault(axis, {})[jax.tree_util.keystr(path, simple=True, separator=".")] = size
    for axis, sizes in cut.items():
        for name, size in sizes.items():
            if size % mesh.shape[axis]:
                common = math.gcd(*sizes.values())
                fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0 and n <= mesh.size)
                raise InputError(
                    f"config.mesh.{axis} is {mesh.shape[axis]}, which does not divide a dimension of {size} of the "
                    f"parameter {name}; config.mesh.{axis} of {fits} would fit this model"
                )


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def like_params(optimizer: optax.GradientTransformation, opt_state: Any, specs: Any) -> Any:
    """Specs of an optimizer's state: moments are where their parameters are, anything else on every device."""
    return optax.tree_map_params(
        optimizer, lambda _, spec: spec, opt_state, specs, transform_non_params=lambda _: PartitionSpec()
    )
