"""Feature maps phi_query and phi_key: a small network per head, then powers."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.feature_map_config import FeatureMapConfig
from rehyat_jax.attention.inline_features import InlineFeatures

_HIDDEN_ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}
_OUTPUT_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1,
}


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """As `product.product`, but free of what Pallas cannot lower."""
    return jnp.dot(left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


class HeadwiseLinear(nnx.Module):
    """A linear layer of its own for every head, without bias: a 1x1 convolution with groups = heads."""

    def __init__(self, heads: int, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        # He's gain: an activation halves the second moment of its input.
        initializer = nnx.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        kernel = initializer(rngs.params(), (heads, in_features, out_features))
        self.kernel = nnx.Param(kernel, axes=("tensor", None, "fsdp"))  # of the mesh, see `parallel.sharding`


@dataclasses.dataclass(frozen=True)
class FeatureFunction:
    """phi of one head (ReHyAt section 3): a network, its output cut into `degree` parts, part i to the power i."""

    config: FeatureMapConfig

    def __call__(self, x: jax.Array, scale: jax.Array, *kernels: jax.Array) -> jax.Array:
        """x [tokens, head_dim], scale [1, 1], kernels [in, out] -> non-negative features [tokens, features].

        Products are in the dtype of x with float32 accumulation, everything between them in float32; the features are
        returned in the dtype of x.
        """
        config = self.config
        hidden = x
        for kernel in kernels[:-1]:
            hidden = _product(hidden, kernel.astype(x.dtype))
            hidden = _HIDDEN_ACTIVATIONS[config.hidden_activation](hidden).astype(x.dtype)
        output = _product(hidden, kernels[-1].astype(x.dtype))
        parts = jnp.split(_OUTPUT_ACTIVATIONS[config.output_activation](output), config.degree, axis=-1)
        powers = jnp.concatenate([part**power for power, part in enumerate(parts, start=1)], axis=-1)
        return (powers * scale.astype(powers.dtype)).astype(x.dtype)


class FeatureMap(nnx.Module):
    """phi_query or phi_key: a `FeatureFunction` with weights of its own for every head.

    Parameters (float32): layer_0.kernel [heads, head_dim, features], layer_i.kernel [heads, features, features] and
    log_scale [heads], zero at first (see `calibration.linear_mass_log_scale`). The features are multiplied by
    exp(log_scale) / sqrt(features), so that phi_query.phi_key is a mean over features whatever their number.
    """

    def __init__(self, config: FeatureMapConfig, *, heads: int, head_dim: int, rngs: nnx.Rngs):
        self.config = config
        for i in range(config.num_layers):
            in_features = head_dim if i == 0 else config.features
            setattr(self, f"layer_{i}", HeadwiseLinear(heads, in_features, config.features, rngs=rngs))
        self.log_scale = nnx.Param(jnp.zeros(heads), axes=("tensor",))

    def inline(self, x: jax.Array) -> InlineFeatures:
        """The features of queries or keys [batch, tokens, heads, head_dim], to be computed by who needs them."""
        scale = jnp.exp(self.log_scale[...]) / self.config.features**0.5
        kernels = (getattr(self, f"layer_{i}").kernel[...] for i in range(self.config.num_layers))
        return InlineFeatures(x, (scale[:, None, None], *kernels), FeatureFunction(self.config))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Queries or keys [batch, tokens, heads, head_dim] -> features [batch, tokens, heads, features]."""
        return self.inline(x).compute()
