"""Feature maps phi_query and phi_key: a small network per head, then powers."""

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.attention.feature_map_config import FeatureMapConfig
from rehyat_jax.attention.product import product

_HIDDEN_ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu}
_OUTPUT_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1,
}


class HeadwiseLinear(nnx.Module):
    """A linear layer of its own for every head, without bias: a 1x1 convolution with groups = heads."""

    def __init__(self, heads: int, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        # He's gain: an activation halves the second moment of its input.
        initializer = nnx.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        self.kernel = nnx.Param(initializer(rngs.params(), (heads, in_features, out_features)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, heads, in_features] -> [batch, tokens, heads, out_features], float32 (or float64)."""
        kernel = self.kernel[...].astype(x.dtype)
        return product("bnhi,hio->bnho", x, kernel)


class FeatureMap(nnx.Module):
    """phi of ReHyAt section 3: a network per head, its output cut into `degree` parts, part i raised to the power i.

    Parameters (float32): layer_0.kernel [heads, head_dim, features], layer_i.kernel [heads, features, features] and
    log_scale [heads], zero at first (see `calibration.linear_mass_log_scale`). The features are multiplied by
    exp(log_scale) / sqrt(features), so that phi_query.phi_key is a mean over features whatever their number.
    """

    def __init__(self, config: FeatureMapConfig, *, heads: int, head_dim: int, rngs: nnx.Rngs):
        self.config = config
        for i in range(config.num_layers):
            in_features = head_dim if i == 0 else config.features
            setattr(self, f"layer_{i}", HeadwiseLinear(heads, in_features, config.features, rngs=rngs))
        self.log_scale = nnx.Param(jnp.zeros(heads))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Queries or keys [batch, tokens, heads, head_dim] -> non-negative features [batch, tokens, heads, features].

        Products are in the dtype of x with float32 accumulation, everything between them in float32; the features are
        returned in the dtype of x.
        """
        config = self.config
        hidden = x
        for i in range(config.num_layers - 1):
            hidden = getattr(self, f"layer_{i}")(hidden)
            hidden = _HIDDEN_ACTIVATIONS[config.hidden_activation](hidden).astype(x.dtype)
        output = _OUTPUT_ACTIVATIONS[config.output_activation](getattr(self, f"layer_{config.num_layers - 1}")(hidden))

        parts = jnp.split(output, config.degree, axis=-1)
        powers = jnp.concatenate([part**power for power, part in enumerate(parts, start=1)], axis=-1)
        scale = jnp.exp(self.log_scale[...]) / config.features**0.5
        return (powers * scale[:, None]).astype(x.dtype)
