"""Slicing and concatenation of tokens, in the flat views in which a TPU stores token arrays.

A TPU would pad the heads of [batch, tokens, heads, width] to a multiple of eight. To slice or concatenate such arrays,
XLA copies them to another layout and back, which costs more than attention itself. Flat views need no copy, and
reshapes between them cancel.
"""

import jax
import jax.numpy as jnp


def flat(tokens: jax.Array) -> jax.Array:
    """[batch, tokens, heads, width] -> [batch, tokens, heads * width]."""
    return tokens.reshape(*tokens.shape[:2], tokens.shape[2] * tokens.shape[3])


def with_heads(view: jax.Array, heads: int) -> jax.Array:
    """The inverse of `flat`: [batch, tokens, heads * width] -> [batch, tokens, heads, width]."""
    return view.reshape(*view.shape[:2], heads, view.shape[2] // heads)


def cut(tokens: jax.Array, start: int | None, stop: int | None) -> jax.Array:
    """tokens[:, start:stop]."""
    return with_heads(flat(tokens)[:, start:stop], tokens.shape[2])


def joined(*parts: jax.Array) -> jax.Array:
    """The parts, concatenated along their tokens."""
    return with_heads(jnp.concatenate([flat(part) for part in parts], axis=1), parts[0].shape[2])
