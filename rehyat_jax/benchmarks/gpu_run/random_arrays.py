"""Random values in place of what a checkpoint and a data set would hold."""

from typing import Any

import jax
import jax.numpy as jnp

_DRAWN = 1_000_003
"""Normal numbers that arrays are filled from, over and over. A program that draws every number compiles for 20 seconds.
A prime, so that no two rows of an array are equal."""


def filled(abstract: Any, *, scale: float = 0.02) -> Any:
    """A tree of arrays with the shapes, dtypes and shardings of `abstract`: small normal numbers, integers zero."""
    leaves, treedef = jax.tree.flatten(abstract)

    def values(drawn: jax.Array, number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return scale * jnp.resize(drawn[number:], leaf.shape).astype(leaf.dtype)

    def create(drawn: jax.Array) -> list[jax.Array]:
        return [values(drawn, number, leaf) for number, leaf in enumerate(leaves)]

    placed = jax.jit(create, out_shardings=[leaf.sharding for leaf in leaves])
    return treedef.unflatten(placed(jax.random.normal(jax.random.key(0), (_DRAWN,))))
