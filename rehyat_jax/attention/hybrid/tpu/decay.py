"""The states of chunks whose sums decay from chunk to chunk, from the kernel's sums of the single chunks."""

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.hybrid.tpu.states import first_chunk_with_past
from rehyat_jax.attention.hybrid.tpu.tiling import Tiling

GIVEN = ("log_decay", "past", "overlap", "later")
"""The operands, by name, that `decayed_states` reads in addition to the sums."""


def decayed_states(tiling: Tiling, sums: tuple[jax.Array, ...], given: dict[str, jax.Array]) -> jax.Array:
    """The states that the chunks' queries read, float32 [states, batch, heads, rows, features].

    Args:
      sums: for the past and, unless causal, for the future: what each state holds in addition to the one before it,
        in the layout of the states; undefined where that is nothing.
      given: of `GIVEN`, log_decay [heads], and optionally sums [batch, heads, rows, features]: over the frames before
        the first chunk's window, over its overlap, and over the frames after the last chunk.
    """
    factor = jnp.exp(given["log_decay"])[:, None, None]
    step = lambda state, added: (state * factor + added,) * 2
    past_sums, *future_sums = sums
    count = len(past_sums)
    zero = jnp.zeros_like(past_sums[0])

    first = given.get("past", zero)
    added = _where(np.arange(count) >= first_chunk_with_past(tiling), past_sums)[1:]
    if "overlap" in given and count > 1:
        added = added.at[0].add(given["overlap"])
    states = jnp.concatenate([first[None], jax.lax.scan(step, first, added)[1]])
    for later_sums in future_sums:
        last = given.get("later", zero)
        # The last state of this direction has no frames.
        added = later_sums[:-1]
        before = jax.lax.scan(step, last, added, reverse=True)[1]
        future = jnp.concatenate([before, last[None]])
        # A state after the last chunk holds only the past.
        states = states + jnp.pad(future, [(0, count - len(future))] + [(0, 0)] * 4)
    return states


def _where(is_defined: np.ndarray, sums: jax.Array) -> jax.Array:
    return jnp.where(is_defined[:, None, None, None, None], sums, 0)
