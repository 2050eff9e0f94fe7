"""Attention on a mesh: every device calls the kernels on its own examples, heads and tokens.

Arrays are [batch, tokens, heads, head_dim], sharded by `TOKENS`. XLA cannot shard a kernel, so `shard_map` does it. A
video that is sharded along time is padded to complete chunks (`context_parallel.padded_frames`). No token attends to
padding, and the attention of padding is zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rehyat_jax.attention import softmax_attention
from rehyat_jax.attention.features.inline import InlineFeatures, identity
from rehyat_jax.attention.hybrid.api import hybrid_attention, hybrid_key_sums
from rehyat_jax.attention.hybrid.context_parallel import hybrid_attention_in_parts
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.parallel.mesh import BATCH, axis_size, is_cut

CONTEXT = "context"
TOKENS = PartitionSpec(BATCH, CONTEXT, "tensor", None)
_TEXT = PartitionSpec(BATCH, None, "tensor", None)
_PER_HEAD = PartitionSpec("tensor")
_SUMS = PartitionSpec(BATCH, "tensor")
_LINEAR_STATE = LinearState(_SUMS, _SUMS)
_STATE = HybridState(
    past=_LINEAR_STATE,
    overlap=_LINEAR_STATE,
    overlap_key=_TEXT,
    overlap_value=_TEXT,
    chunks=PartitionSpec(),
)


def hybrid_attention_on_mesh(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: jax.Array | InlineFeatures,
    phi_key: jax.Array | InlineFeatures,
    *,
    num_frames: int,
    implementation: str | None = None,
    **form: Any,
) -> jax.Array:
    """`hybrid_attention` over the mesh in use.

    Args:
      num_frames: frames of the video, without padding.
      **form: tokens_per_frame, chunk_frames, overlap_frames, causal and stabilizer.
    """
    if not is_cut():
        return hybrid_attention(query, key, value, phi_query, phi_key, implementation=implementation, **form)

    def part(tokens, phis):
        if axis_size(CONTEXT) == 1:
            return hybrid_attention(*tokens, *phis, implementation=implementation, **form)
        return hybrid_attention_in_parts(
            *tokens, *phis, axis=CONTEXT, num_frames=num_frames, implementation=implementation, **form
        )

    return _on_every_device(part, (query, key, value), (phi_query, phi_key), TOKENS)


def hybrid_attention_part_on_mesh(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: jax.Array | InlineFeatures,
    phi_key: jax.Array | InlineFeatures,
    state: HybridState,
    later: LinearState | None = None,
    *,
    is_last: bool,
    implementation: str | None = None,
    **form: Any,
) -> tuple[jax.Array, HybridState]:
    """`hybrid_attention` of the frames that follow those in `state`, over the mesh in use.

    Args:
      state: state after the frames before. It has no `form`, so that blocks of several forms can be scanned.
      later: sums over the frames after these, for bidirectional attention.
      is_last: True for the last part of a video, which may end within a chunk.
      **form: as in `hybrid_attention_on_mesh`.

    Returns:
      (attention [B, N, H, d], state after these frames; unchanged after the last part).

    The mesh must not shard videos along time.
    """

    def part(tokens, phis, state, later=None):
        options = dict(initial_state=state, later=later, implementation=implementation, **form)
        if is_last:
            return hybrid_attention(*tokens, *phis, **options), state
        y, state = hybrid_attention(*tokens, *phis, return_state=True, **options)
        return y, dataclasses.replace(state, form=None)

    if not is_cut():
        return part((query, key, value), (phi_query, phi_key), state, later)
    sums = [(state, _STATE)] if later is None else [(state, _STATE), (later, _LINEAR_STATE)]
    return _on_every_device(part, (query, key, value), (phi_query, phi_key), (TOKENS, _STATE), *sums)


def hybrid_key_sums_on_mesh(
    key: jax.Array, value: jax.Array, phi_key: jax.Array | InlineFeatures, **options: Any
) -> LinearState:
    """`hybrid_key_sums` over the mesh in use, which must not shard videos along time."""
    part = lambda tokens, phis: hybrid_key_sums(*tokens, *phis, **options)
    if not is_cut():
        return part((key, value), (phi_key,))
    return _on_every_device(part, (key, value), (phi_key,), _LINEAR_STATE)


def _on_every_device(part: Callable, tokens: tuple, phis: tuple, results: Any, *sums: tuple[Any, Any]) -> Any:
    """part(tokens, phis, *sums) of every device's own examples and heads.

    Args:
      phis: features of the first tokens, in their order.
      results: the PartitionSpecs of part's result.
      sums: trees, each with its PartitionSpecs.
    """
    features = [phi if isinstance(phi, InlineFeatures) else InlineFeatures(phi, (), identity) for phi in phis]
    sources = [None if phi.of_own_tokens else phi.source for phi in features]

    def run(tokens, sources, weights, *sums):
        bound = [
            InlineFeatures(source, matrices, phi.function).bound(x)
            for x, source, matrices, phi in zip(tokens, sources, weights, features, strict=False)
        ]
        return part(tokens, bound, *sums)

    return jax.shard_map(
        run,
        in_specs=(TOKENS, TOKENS, _PER_HEAD, *(spec for _, spec in sums)),
        out_specs=results,
        check_vma=False,
    )(tokens, sources, [phi.weights for phi in features], *(tree for tree, _ in sums))


def softmax_attention_on_mesh(query: jax.Array, key: jax.Array, value: jax.Array, *, num_tokens: int) -> jax.Array:
    """Softmax self-attention of a video over the mesh in use; `num_tokens` of its tokens are not padding.

    Along "context", devices exchange tokens for heads by an all-to-all, as DeepSpeed-Ulysses does (arXiv 2309.14509).
    If the heads cannot be divided among them, they gather keys and values instead.
    """
    if not is_cut():
        return softmax_attention(query, key, value)

    def part(query, key, value):
        devices = axis_size(CONTEXT)
        if devices == 1:
            return softmax_attention(query, key, value)
        if query.shape[2] % devices == 0:
            trade = lambda x, split, join: jax.lax.all_to_all(x, CONTEXT, split, join, tiled=True)
            whole = [trade(x, 2, 1) for x in (query, key, value)]
            y = softmax_attention(*(x[:, :num_tokens] for x in whole))
            y = jnp.pad(y, [(0, 0), (0, whole[0].shape[1] - num_tokens), (0, 0), (0, 0)])
            return trade(y, 1, 2)
        key, value = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True)[:, :num_tokens] for x in (key, value))
        token = jax.lax.axis_index(CONTEXT) * query.shape[1] + jnp.arange(query.shape[1])
        y = softmax_attention(query, key, value)
        return jnp.where((token < num_tokens)[:, None, None], y, 0)

    return jax.shard_map(part, in_specs=(TOKENS,) * 3, out_specs=TOKENS, check_vma=False)(query, key, value)


def cross_attention_on_mesh(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`softmax_attention` of a video to a text. Every device along "context" holds the complete text."""
    if not is_cut():
        return softmax_attention(query, key, value)
    return jax.shard_map(softmax_attention, in_specs=(TOKENS, _TEXT, _TEXT), out_specs=TOKENS, check_vma=False)(
        query, key, value
    )
