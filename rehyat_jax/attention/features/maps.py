"""Feature maps phi_query and phi_key as modules."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.features.inline import InlineFeatures

# A decay of 0.98 a frame: half of the weight after 38 frames.
_FIRST_DECAY = -4.0


class HeadwiseLinear(nnx.Module):
    """A matrix of its own for every head, without bias: a 1x1 convolution with groups = heads."""

    def __init__(
        self,
        heads: int,
        shape: tuple[int, int],
        initializer: nnx.Initializer,
        *,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kernel = initializer(rngs.params(), (heads, *shape), param_dtype)
        self.kernel = nnx.Param(kernel, axes=("tensor", None, "fsdp"))  # of the mesh, see `parallel.sharding`


@dataclasses.dataclass(frozen=True)
class FeatureFunction:
    """The feature map of one head, which kernels apply to tiles of tokens."""

    config: FeatureMapConfig

    def __call__(self, x: jax.Array, scale: jax.Array, *matrices: jax.Array) -> jax.Array:
        """x [tokens, head_dim] -> non-negative features [tokens, features].

        Products are in the dtype of x with float32 accumulation, everything between them in float32; the features are
        returned in the dtype of x.

        Args:
          scale: [1, 1].
          matrices: the gate [1, head_dim] if the configuration has one, then the kernels [in, out].
        """
        kernels = list(matrices)
        if self.config.gate:
            gate = kernels.pop(0)
            dtype = scale.dtype if scale.dtype.itemsize > 2 else jnp.float32
            score = jnp.sum(x.astype(dtype) * gate.astype(dtype), axis=-1, keepdims=True)
            scale = scale.astype(dtype) * (2 * jax.nn.sigmoid(score))
        features = self.config.row.apply(self.config, x, *(kernel.astype(x.dtype) for kernel in kernels))
        return (features * scale.astype(features.dtype)).astype(x.dtype)


class FeatureMap(nnx.Module):
    """phi_query or phi_key: a `FeatureFunction` with weights of its own for every head.

    Parameters: layer_i.kernel [heads, rows, columns], of the shapes that the kind states, in `param_dtype`; log_scale
    [heads], float32, zero at first (see `calibration.linear_mass_log_scale`); and, if the configuration has a gate,
    gate [heads, head_dim], float32, zero at first. The features are multiplied by exp(log_scale), by 2 sigmoid(gate.x),
    and divided by the kind's `divisor`.
    """

    def __init__(
        self,
        config: FeatureMapConfig,
        *,
        heads: int,
        head_dim: int,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.num_kernels = len(shapes := config.kernel_shapes(head_dim))
        for i, shape in enumerate(shapes):
            setattr(
                self,
                f"layer_{i}",
                HeadwiseLinear(heads, shape, config.row.initializer, param_dtype=param_dtype, rngs=rngs),
            )
        self.log_scale = nnx.Param(jnp.zeros(heads), axes=("tensor",))
        if config.gate:
            self.gate = nnx.Param(jnp.zeros((heads, head_dim)), axes=("tensor", None))

    def inline(self, x: jax.Array | None = None, *, of_own_tokens: bool = False) -> InlineFeatures:
        """The features of x [batch, tokens, heads, head_dim], to be computed where they are needed.

        Args:
          x: None stands for the query or key of the attention that they are given to.
          of_own_tokens: True if x is that query or key.
        """
        scale = jnp.exp(self.log_scale[...]) / self.config.row.divisor(self.config)
        kernels = (getattr(self, f"layer_{i}").kernel[...] for i in range(self.num_kernels))
        gate = [self.gate[...][:, None]] if self.config.gate else []
        weights = (scale[:, None, None], *gate, *kernels)
        return InlineFeatures(x, weights, FeatureFunction(self.config), of_own_tokens=of_own_tokens)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Queries or keys [batch, tokens, heads, head_dim] -> features [batch, tokens, heads, features]."""
        return self.inline(x).compute()


class LinearBranch(nnx.Module):
    """The learned parameters of one block's linear branch.

    Parameters: the feature maps `query` and `key`; optionally `decay` [heads], where log_decay = -softplus(decay), and
    `branch_gate` [heads], zero at first. Both are float32; see `hybrid_attention`.
    """

    def __init__(
        self,
        config: FeatureMapConfig,
        *,
        decay: bool = False,
        branch_gate: bool = False,
        heads: int,
        head_dim: int,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.query, self.key = (
            FeatureMap(config, heads=heads, head_dim=head_dim, param_dtype=param_dtype, rngs=rngs) for _ in range(2)
        )
        if decay:
            self.decay = nnx.Param(jnp.full(heads, _FIRST_DECAY), axes=("tensor",))
        if branch_gate:
            self.branch_gate = nnx.Param(jnp.zeros(heads), axes=("tensor",))

    def log_decay(self) -> jax.Array | None:
        """[heads], at most 0; None without decay."""
        return -jax.nn.softplus(self.decay[...]) if hasattr(self, "decay") else None

    def gate(self) -> jax.Array | None:
        """[heads]; None without a gate."""
        return self.branch_gate[...] if hasattr(self, "branch_gate") else None
