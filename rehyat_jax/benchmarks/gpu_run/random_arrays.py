"""Random values that replace a checkpoint and a data set."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer

_DRAWN = 1_000_003
"""Number of normal numbers with which arrays are filled repeatedly. A program that draws every number compiles for 20
seconds. It is a prime, so that no two rows of an array are equal."""


def abstract_params(config: WanConfig) -> dict[str, Any]:
    """Shapes of a transformer's parameters on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract)


def random_arrays(abstract: Any, scale: float = 0.02) -> Any:
    """Arrays with the shapes, dtypes and shardings of a tree: normal numbers times `scale`; integers are 0."""
    return _filled(abstract, lambda path, leaf, noise: scale * noise)


def random_params(abstract: Any) -> Any:
    """A transformer's parameters, all random: zeros and ones, as at the start of training, hide errors.

    Kernels preserve the size of their inputs. Scales of norms are around one, biases and modulations around zero.
    """

    def value(path: tuple, leaf: jax.ShapeDtypeStruct, noise: jax.Array) -> jax.Array:
        kind = path[-1].key
        return noise / leaf.shape[-2] ** 0.5 if kind == "kernel" else 0.2 * noise + (kind == "scale")

    return _filled(abstract, value)


def _filled(abstract: Any, value: Callable[[tuple, jax.ShapeDtypeStruct, jax.Array], jax.Array]) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)

    def fill(drawn: jax.Array, number: int, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return value(path, leaf, jnp.resize(drawn[number:], leaf.shape)).astype(leaf.dtype)

    create = lambda drawn: [fill(drawn, number, *leaf) for number, leaf in enumerate(leaves)]
    placed = jax.jit(create, out_shardings=[leaf.sharding for _, leaf in leaves])
    return treedef.unflatten(placed(jax.random.normal(jax.random.key(0), (_DRAWN,))))
