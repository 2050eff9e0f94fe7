"""Token arrays cut and joined along their tokens, as the flat views in which a TPU holds them.

Of [batch, tokens, heads, width] a TPU would pad the heads to a multiple of eight; asked to cut or to join such arrays,
XLA therefore takes them to another layout and back, which costs more than attention itself. Views in between that
cancel cost nothing.
"""

import jax
import jax.numpy as jnp


def flat(tokens: jax.Array) -> jax.Array:
    """[batch, tokens, heads, width] -> [batch, tokens, heads * width]."""
    return tokens.reshape(*tokens.shape[:2], tokens.shape[2] * tokens.shape[3])


def with_heads(view: jax.Array, heads: int) -> jax.Array:
    """What `flat` is given."""
    return view.reshape(*view.shape[:2], heads, view.shape[2] // heads)


def cut(tokens: jax.Array, start: int | None, stop: int | None) -> jax.Array:
    """tokens[:, start:stop]."""
    return with_heads(flat(tokens)[:, start:stop], tokens.shape[2])


def joined(*parts: jax.Array) -> jax.Array:
    """One after the other."""
    return with_heads(jnp.concatenate([flat(part) for part in parts], axis=1), parts[0].shape[2])
