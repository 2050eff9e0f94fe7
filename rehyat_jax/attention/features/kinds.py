"""The kinds of feature maps: the one table of them.

A kind is a file with an object `KIND`. Everything that depends on the kind reads this table: the module, the kernels,
the weights' names, FLOPs. `pytorch/rehyat_torch.py` has its own twin of each kind, because it is one self-contained
file; a test holds the two together.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from rehyat_jax.attention.features import hedgehog, mlp, silu_l2


@dataclasses.dataclass(frozen=True)
class FeatureMapKind:
    """What differs between kinds. `config` is always a `FeatureMapConfig` of this kind.

    Attributes:
      fields: the fields that it reads next to `features` and `input`.
      problem: config -> the field with a wrong value and what was expected; None if all are right.
      kernel_shapes: (config, head_dim) -> (rows, columns) of the matrices of one head.
      initializer: of matrices [heads, rows, columns].
      divisor: config -> the number that divides the features.
      apply: (config, x [tokens, width], *matrices [rows, columns]) -> non-negative features [tokens, features],
        float32. Products are in the dtype of x with float32 accumulation. Pallas must be able to lower it.
    """

    fields: tuple[str, ...]
    problem: Callable[[Any], str | None]
    kernel_shapes: Callable[[Any, int], list[tuple[int, int]]]
    initializer: nnx.Initializer
    divisor: Callable[[Any], float]
    apply: Callable[..., jax.Array]


FEATURE_MAPS = {
    "mlp": FeatureMapKind(
        fields=("num_layers", "degree", "hidden_activation", "output_activation"),
        problem=mlp.problem,
        kernel_shapes=mlp.kernel_shapes,
        initializer=mlp.INITIALIZER,
        divisor=mlp.divisor,
        apply=mlp.apply,
    ),
    "hedgehog": FeatureMapKind(
        fields=(),
        problem=hedgehog.problem,
        kernel_shapes=hedgehog.kernel_shapes,
        initializer=hedgehog.initializer,
        divisor=hedgehog.divisor,
        apply=hedgehog.apply,
    ),
    "silu_l2": FeatureMapKind(
        fields=(),
        problem=silu_l2.problem,
        kernel_shapes=silu_l2.kernel_shapes,
        initializer=silu_l2.INITIALIZER,
        divisor=silu_l2.divisor,
        apply=silu_l2.apply,
    ),
}
"""By `FeatureMapConfig.kind`."""
