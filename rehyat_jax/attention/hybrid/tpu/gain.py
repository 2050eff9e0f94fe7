"""Gains of features inside the kernels: one float32 a token, in rows along the lanes of registers."""

import jax
import jax.numpy as jnp

from rehyat_jax.attention.tpu.blocks import LANES


def gain_rows(gain: jax.Array, blocks: int, rows: int) -> jax.Array:
    """Gains [batch, tokens, heads] as [batch, heads, blocks, 1, rows] in float32, zeros after the tokens."""
    gain = jnp.moveaxis(gain, 1, 2).astype(jnp.float32)
    gain = jnp.pad(gain, ((0, 0), (0, 0), (0, blocks * rows - gain.shape[2])))
    return gain.reshape(*gain.shape[:2], blocks, 1, rows)


def gain_of_rows(rows: jax.Array, tokens: int) -> jax.Array:
    """Inverse of `gain_rows`: [batch, tokens, heads]."""
    return jnp.moveaxis(rows.reshape(*rows.shape[:2], -1)[:, :, :tokens], 1, 2)


def column(row: jax.Array) -> jax.Array:
    """[1, tokens] -> [tokens, 1]. Registers have eight rows, which are turned together."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def multiplied(phi: jax.Array, row: jax.Array) -> jax.Array:
    """Features [tokens, features] times the gains [1, tokens], in the dtype of the features."""
    return (phi.astype(jnp.float32) * column(row)).astype(phi.dtype)


def gain_gradient(d_phi: jax.Array, phi: jax.Array) -> jax.Array:
    """The gradient of the gains, [1, tokens]: the sum over features of d_phi (of the gained features) times phi."""
    terms = d_phi * phi.astype(jnp.float32)
    sums = sum(terms[:, start : start + LANES] for start in range(0, terms.shape[1], LANES))
    return sums.T.sum(axis=0, keepdims=True)
