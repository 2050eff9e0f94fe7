"""A chunk's softmax window and linear state, merged: the arithmetic shared by all XLA forms."""

import jax

from rehyat_jax.attention.hybrid.parts import gated_merge, linear_part, merge, softmax_part
from rehyat_jax.attention.hybrid.state import LinearState


def attend_window(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    is_key: jax.Array,
    phi_query: jax.Array,
    linear: LinearState,
    *,
    stabilizer: str,
    branch_gate: jax.Array | None = None,
) -> jax.Array:
    """The attention of the queries of a chunk.

    Args:
      query: [..., n, heads, head_dim].
      key, value: the softmax window, [..., w, heads, head_dim].
      is_key: boolean [..., w], False for padding. Every window holds at least one key.
      phi_query: non-negative features [..., n, heads, features].
      linear: sums over the keys outside the window.
      stabilizer, branch_gate: see `hybrid_attention`.

    Returns: [..., n, heads, head_dim] in the dtype of `query`.
    """
    parts = softmax_part(query, key, value, is_key), linear_part(phi_query, linear)
    y = merge(*parts, stabilizer=stabilizer) if branch_gate is None else gated_merge(*parts, branch_gate)
    return y.astype(query.dtype)
