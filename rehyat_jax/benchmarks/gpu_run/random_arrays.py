"""Random values in place of what a checkpoint and a data set would hold."""

from typing import Any

import jax
import jax.numpy as jnp


def filled(abstract: Any, *, scale: float = 0.02) -> Any:
    """A tree of arrays with the shapes, dtypes and shardings of `abstract`: small normal numbers, integers zero."""
    leaves, treedef = jax.tree.flatten(abstract)

    def draw(number: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        # This generator compiles and runs in a fraction of the default one's time.
        key = jax.random.fold_in(jax.random.key(0, impl="unsafe_rbg"), number)
        return scale * jax.random.normal(key, leaf.shape, leaf.dtype)

    create = lambda: [draw(number, leaf) for number, leaf in enumerate(leaves)]
    return treedef.unflatten(jax.jit(create, out_shardings=[leaf.sharding for leaf in leaves])())
