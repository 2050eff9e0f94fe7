"""The scale of the feature maps that gives the linear branch its true share of the attention."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

_LARGEST_LOG_SCALE = 60.0
# Queries whose scores are in memory at a time.
_QUERIES = 256


def linear_mass_log_scale(
    query: jax.Array,
    key: jax.Array,
    phi_query: jax.Array,
    phi_key: jax.Array,
    *,
    tokens_per_frame: int,
    key_masks: tuple[np.ndarray, np.ndarray],
    stabilizer: str,
) -> jax.Array:
    """The logarithm, for every head, of the factor of phi_query.phi_key that corrects the linear branch's mass.

    A token's linear share is the linear part of its normalisation, nL / (nS + nL) in the notation of
    `hybrid_attention`. Its true share is the same ratio for softmax attention to the same keys, in which nL is the sum
    of exp(q.k / sqrt(head_dim)) over the linear keys. The factor makes the two shares' means over tokens equal. To
    apply it, add half of the result to the `log_scale` of each of the two feature maps.

    Shares are compared because they are bounded. A few tokens with the largest masses would dominate a mean of masses.
    Tokens that hardly attend outside their window would dominate a mean of log masses. Tokens without linear keys or
    without linear mass are excluded, because no factor changes them.

    Args:
      query, key: [batch, tokens, heads, head_dim].
      phi_query, phi_key: current features [batch, tokens, heads, features].
      tokens_per_frame, stabilizer: see `hybrid_attention`.
      key_masks: the softmax keys and the linear keys of every frame, boolean [query frame, key frame].

    Returns: [heads] float32, between -60 and 60; 0 for a head whose tokens are all excluded.
    """
    softmax_keys, linear_keys = key_masks

    def frames_first(tokens: jax.Array) -> jax.Array:
        frames = tokens.astype(jnp.float32).reshape(tokens.shape[0], -1, tokens_per_frame, *tokens.shape[2:])
        return jnp.moveaxis(frames, 1, 0)

    def softmax_masses(part) -> tuple[jax.Array, jax.Array]:
        """log(true linear mass / window mass) and log nS of one part's tokens, each [batch, heads, tokens]."""
        query, softmax_keys, linear_keys = part
        scores = jnp.einsum("bqhd,tbkhd->bhqtk", query, frames_first(key)) / query.shape[-1] ** 0.5
        log_window, log_outside = (
            jax.nn.logsumexp(scores, axis=(-2, -1), where=jnp.broadcast_to(keys[:, None], scores.shape))
            for keys in (softmax_keys, linear_keys)
        )
        row_max = jnp.max(scores, axis=(-2, -1), where=softmax_keys[:, None], initial=-jnp.inf)
        return log_outside - log_window, log_window - (row_max if stabilizer == "row_max" else 0)

    # One part of a frame's queries at a time: the scores of all tokens would not fit in memory.
    rows = max(n for n in range(1, _QUERIES + 1) if tokens_per_frame % n == 0)
    parts = rearrange(query.astype(jnp.float32), "b (part n) h d -> part b n h d", n=rows)
    frame_of_part = np.arange(len(parts)) * rows // tokens_per_frame
    masses = jax.lax.map(softmax_masses, (parts, softmax_keys[frame_of_part], linear_keys[frame_of_part]))
    true_log_odds, log_softmax_mass = (
        rearrange(mass, "(t part) b h n -> t b h (part n)", part=tokens_per_frame // rows) for mass in masses
    )
    normalizer = jnp.einsum("qt,tbkhf->qbhf", linear_keys.astype(jnp.float32), frames_first(phi_key))
    linear_mass = jnp.einsum("tbqhf,tbhf->tbhq", frames_first(phi_query), normalizer)

    included = linear_mass > 0
    log_odds = jnp.log(jnp.where(included, linear_mass, 1)) - log_softmax_mass

    def mean_share(log_odds: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.sigmoid(log_odds), axis=(0, 1, 3), where=included)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        too_low = mean_share(log_odds + middle[:, None]) < mean_share(true_log_odds)
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    largest = jnp.full(query.shape[2], _LARGEST_LOG_SCALE)
    low, high = jax.lax.fori_loop(0, 40, halve, (-largest, largest))
    return jnp.where(included.any(axis=(0, 1, 3)), (low + high) / 2, 0)
