"""Low-rank adapters of linear layers (LoRA, Hu et al., arXiv 2106.09685): y = x W + alpha / rank (x A) B + bias.

W stays frozen. A starts at random and B at zero, so an adapted model starts as its base. An adapter is stored next to
the kernel that it adapts, stacked over blocks and sharded like it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

LORA_TARGETS = ("query", "key", "value", "output", "up", "down")
"""The layers of a block that may have adapters: four of self-attention and of cross-attention, two of feed-forward."""

Path = tuple[str, ...]
"""Keys of a parameter in a nested dict."""

_NAME = "lora"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapters of a model. They are no part of its architecture, because saved models are merged.

    Attributes:
      rank: columns of A and rows of B.
      alpha: the adapters' product is multiplied by alpha / rank.
      targets: the layers that have adapters, in every block; some of `LORA_TARGETS`.

    Raises:
      ValueError: a value is not allowed.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, found {self.alpha}")
        if not self.targets or not set(self.targets) <= set(LORA_TARGETS):
            raise ValueError(f"targets must be some of {LORA_TARGETS}, found {self.targets}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def on(self, layer: str) -> "LoraConfig | None":
        """These adapters if a block's layer of this name has one, else None."""
        return self if layer in self.targets else None


class Lora(nnx.Module):
    """The product (x A) B alpha / rank, which a `linear.Linear` adds to x W.

    Args:
      config: rank and alpha.
      in_features, out_features: those of the layer.
      axes: the mesh axes that shard its kernel.
      param_dtype: dtype of A [in, rank] and B [rank, out].
      precision: of the products.
      rngs: initialisation of A. It is uniform within 1 / sqrt(in), as in the PEFT library.
    """

    def __init__(
        self,
        config: LoraConfig,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        param_dtype: jnp.dtype,
        precision: jax.lax.Precision | None,
        rngs: nnx.Rngs,
    ):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.a = nnx.Param(uniform(rngs.params(), (in_features, config.rank), param_dtype), axes=(axes[0], None))
        self.b = nnx.Param(jnp.zeros((config.rank, out_features), param_dtype), axes=(None, axes[1]))
        self.scale = config.scale
        self.precision = precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] in the compute dtype -> [..., out] in the same dtype."""
        product = lambda x, matrix: jnp.dot(x, matrix[...].astype(x.dtype), precision=self.precision)
        return product(product(x, self.a) * self.scale, self.b)


def without_adapters(model: nnx.Module) -> nnx.Module:
    """Removes the adapters of a model, in place, and returns it."""
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(getattr(module, _NAME, None), Lora):
            delattr(module, _NAME)
    return model


# ------------------------------------------------------------------------------------------------- trees of parameters


def is_adapter(path: Path) -> bool:
    """True if a parameter is part of an adapter."""
    return _NAME in path


def split_tree(tree: dict[str, Any], is_chosen: Callable[[Path], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a nested dict into (the leaves whose paths are chosen, the others)."""
    flat = traverse_util.flatten_dict(tree)
    parts = ({path: leaf for path, leaf in flat.items() if is_chosen(path) == chosen} for chosen in (True, False))
    chosen, others = map(traverse_util.unflatten_dict, parts)
    return chosen, others


def joined(*trees: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `split_tree`. A leaf that several nested dicts have is that of the last one."""
    flat: dict[Path, Any] = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(flat)


def adapted_layers(params: dict[str, Any]) -> Iterator[tuple[Path, jax.Array, jax.Array]]:
    """(path of the layer, A [..., in, rank], B [..., rank, out]) of every adapter in a nested dict of parameters."""
    flat = traverse_util.flatten_dict(params)
    for path, a in flat.items():
        if path[-2:] == (_NAME, "a"):
            yield path[:-2], a, flat[*path[:-1], "b"]


def merged(params: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The parameters of the same model without adapters: W + alpha / rank A B, computed in W's dtype.

    Other parameters are the same arrays.
    """
    adapters, base = split_tree(params, is_adapter)
    add = jax.jit(lambda kernel, a, b: kernel + lora.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    kernels = {}
    for layer, a, b in adapted_layers(adapters):
        node = base
        for name in layer:
            node = node[name]
        kernels[*layer, "kernel"] = add(node["kernel"], a, b)
    return joined(base, traverse_util.unflatten_dict(kernels))
