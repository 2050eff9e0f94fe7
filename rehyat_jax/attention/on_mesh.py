"""Attention on a mesh: every device calls the kernels on its own examples, heads and tokens.

Arrays are [batch, tokens, heads, head_dim], sharded by `TOKENS`. XLA cannot shard a kernel, so `shard_map` does it. A
video that is sharded along time is padded to complete chunks (`context_parallel.padded_frames`). No token attends to
padding, and the attention of padding is zero.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rehyat_jax.attention import softmax_attention
from rehyat_jax.attention.features.inline import InlineFeatures, identity
from rehyat_jax.attention.hybrid.api import hybrid_attention, hybrid_key_sums
from rehyat_jax.attention.hybrid.context_parallel import hybrid_attention_in_parts
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.linear import linear_attention
from rehyat_jax.attention.softmax.chunk_causal import chunk_causal_attention
from rehyat_jax.attention.strided import strided_attention
from rehyat_jax.parallel.mesh import BATCH, axis_size, is_cut

CONTEXT = "context"
TOKENS = PartitionSpec(BATCH, CONTEXT, "tensor", None)
_TEXT = PartitionSpec(BATCH, None, "tensor", None)
_PER_HEAD = PartitionSpec("tensor")
_GAINS = PartitionSpec(BATCH, CONTEXT, "tensor")
_SUMS = PartitionSpec(BATCH, "tensor")
_LINEAR_STATE = LinearState(_SUMS, _SUMS)
_STATE = HybridState(
    past=_LINEAR_STATE,
    overlap=_LINEAR_STATE,
    overlap_key=_TEXT,
    overlap_value=_TEXT,
    chunks=PartitionSpec(),
)
_PER_HEAD_OPTIONS = ("log_decay", "branch_gate")


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
      **form: the arguments of `hybrid_attention` that describe a form of attention.
    """
    if not is_cut():
        return hybrid_attention(query, key, value, phi_query, phi_key, implementation=implementation, **form)
    form, per_head = _without_arrays(form)

    def part(tokens, phis, per_head):
        options = form | per_head | {"implementation": implementation}
        if axis_size(CONTEXT) == 1:
            return hybrid_attention(*tokens, *phis, **options)
        return hybrid_attention_in_parts(*tokens, *phis, axis=CONTEXT, num_frames=num_frames, **options)

    return _on_every_device(part, (query, key, value), (phi_query, phi_key), TOKENS, (per_head, _PER_HEAD))


def _without_arrays(form: dict[str, Any]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The options of a form that are constants, and those that are arrays [heads]."""
    arrays = {name: form[name] for name in _PER_HEAD_OPTIONS if form.get(name) is not None}
    return {name: value for name, value in form.items() if name not in _PER_HEAD_OPTIONS}, arrays


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

    form, per_head = _without_arrays(form)

    def part(tokens, phis, per_head, state, later=None):
        options = dict(initial_state=state, later=later, implementation=implementation, **form, **per_head)
        if is_last:
            return hybrid_attention(*tokens, *phis, **options), state
        y, state = hybrid_attention(*tokens, *phis, return_state=True, **options)
        return y, dataclasses.replace(state, form=None)

    if not is_cut():
        return part((query, key, value), (phi_query, phi_key), per_head, state, later)
    spec = _STATE if state.anchor_key is None else dataclasses.replace(_STATE, anchor_key=_TEXT, anchor_value=_TEXT)
    sums = [(state, spec)] if later is None else [(state, spec), (later, _LINEAR_STATE)]
    results = (TOKENS, spec)
    return _on_every_device(part, (query, key, value), (phi_query, phi_key), results, (per_head, _PER_HEAD), *sums)


def hybrid_key_sums_on_mesh(
    key: jax.Array, value: jax.Array, phi_key: jax.Array | InlineFeatures, **options: Any
) -> LinearState:
    """`hybrid_key_sums` over the mesh in use, which must not shard videos along time."""
    part = lambda tokens, phis: hybrid_key_sums(*tokens, *phis, **options)
    if not is_cut():
        return part((key, value), (phi_key,))
    return _on_every_device(part, (key, value), (phi_key,), _LINEAR_STATE)


def strided_attention_on_mesh(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: InlineFeatures,
    phi_key: InlineFeatures,
    *,
    num_tokens: int,
    **options: Any,
) -> jax.Array:
    """`strided_attention` over the mesh in use; `num_tokens` of the video's tokens are not padding."""
    if not is_cut():
        return strided_attention(query, key, value, phi_query, phi_key, **options)
    sharding = dict(axis=CONTEXT, num_tokens=num_tokens) if axis_size(CONTEXT) > 1 else {}
    part = lambda tokens, phis: strided_attention(*tokens, *phis, **sharding, **options)
    return _on_every_device(part, (query, key, value), (phi_query, phi_key), TOKENS)


def linear_attention_on_mesh(
    value: jax.Array,
    phi_query: InlineFeatures,
    phi_key: InlineFeatures,
    *,
    past: LinearState | None = None,
    later: LinearState | None = None,
    num_frames: int | None = None,
    **options: Any,
) -> tuple[jax.Array, LinearState]:
    """`linear_attention` over the mesh in use; `num_frames` of the video's frames are not padding."""
    if not is_cut():
        return linear_attention(value, phi_query, phi_key, past=past, later=later, **options)
    sharding = dict(axis=CONTEXT, num_frames=num_frames) if axis_size(CONTEXT) > 1 else {}
    sums = {name: tree for name, tree in (("past", past), ("later", later)) if tree is not None}
    part = lambda tokens, phis, sums: linear_attention(*tokens, *phis, **sums, **sharding, **options)
    results = (TOKENS, _LINEAR_STATE)
    # A map of its own tokens is given its source, which is not one of these.
    features = [dataclasses.replace(phi, of_own_tokens=False) for phi in (phi_query, phi_key)]
    return _on_every_device(part, (value,), features, results, (sums, dict.fromkeys(sums, _LINEAR_STATE)))


def _on_every_device(part: Callable, tokens: tuple, phis: tuple, results: Any, *sums: tuple[Any, Any]) -> Any:
    """part(tokens, phis, *sums) of every device's own examples and heads.

    Args:
      phis: features; those of the attention's own tokens have the same place as these in `tokens`.
      results: the PartitionSpecs of part's result.
      sums: trees, each with its PartitionSpecs.
    """
    features = [phi if isinstance(phi, InlineFeatures) else InlineFeatures(phi, (), identity) for phi in phis]
    sources = [None if phi.of_own_tokens else phi.source for phi in features]

    def run(tokens, sources, weights, gains, *sums):
        given = zip(sources, weights, gains, features, strict=True)
        bound = [InlineFeatures(source, matrices, phi.function, gain) for source, matrices, gain, phi in given]
        bound = [phi if phi.source is not None else phi.bound(tokens[number]) for number, phi in enumerate(bound)]
        return part(tokens, bound, *sums)

    return jax.shard_map(
        run,
        in_specs=(TOKENS, TOKENS, _PER_HEAD, _GAINS, *(spec for _, spec in sums)),
        out_specs=results,
        check_vma=False,
    )(tokens, sources, [phi.weights for phi in features], [phi.gain for phi in features], *(tree for tree, _ in sums))


def softmax_attention_on_mesh(query: jax.Array, key: jax.Array, value: jax.Array, *, num_tokens: int) -> jax.Array:
    """Softmax self-attention of a video over the mesh in use; `num_tokens` of its tokens are not padding.

    Along "context", devices exchange tokens for heads by an all-to-all, as DeepSpeed-Ulysses does (arXiv 2309.14509),
    as many together as divide the heads. Such groups of devices gather the keys and values of their heads from one
    another: a device then has the queries of its group, all keys, and its share of the heads.
    """
    if not is_cut():
        return softmax_attention(query, key, value)

    def part(query, key, value):
        devices = axis_size(CONTEXT)
        if devices == 1:
            return softmax_attention(query, key, value)
        together = math.gcd(query.shape[2], devices)
        if together == devices:
            return _with_all_tokens(softmax_attention, query, key, value, num_tokens=num_tokens)
        number = np.arange(devices).reshape(-1, together)  # groups, and places in them
        trade, trade_back = (_trade(number.tolist(), *axes) for axes in ((2, 1), (1, 2)))
        gather = functools.partial(
            jax.lax.all_gather, axis_name=CONTEXT, axis=1, tiled=True, axis_index_groups=number.T.tolist()
        )
        query, key, value = map(trade, (query, key, value))
        y = softmax_attention(query, gather(key)[:, :num_tokens], gather(value)[:, :num_tokens])
        first = jax.lax.axis_index(CONTEXT) // together * y.shape[1]
        is_token = first + jnp.arange(y.shape[1]) < num_tokens
        return trade_back(jnp.where(is_token[:, None, None], y, 0))

    return jax.shard_map(part, in_specs=(TOKENS,) * 3, out_specs=TOKENS, check_vma=False)(query, key, value)


def chunk_causal_attention_on_mesh(
    query: jax.Array, key: jax.Array, value: jax.Array, *, num_tokens: int, chunk_tokens: int
) -> jax.Array:
    """`chunk_causal_attention` of a video over the mesh in use; `num_tokens` of its tokens are not padding.

    Devices along "context" exchange tokens for heads. If the heads cannot be divided among them, each computes all
    tokens and keeps its own.
    """
    attend = functools.partial(chunk_causal_attention, chunk_tokens=chunk_tokens)
    if not is_cut():
        return attend(query, key, value)

    def part(query, key, value):
        own, devices = query.shape[1], axis_size(CONTEXT)
        if query.shape[2] % devices == 0:
            return _with_all_tokens(attend, query, key, value, num_tokens=num_tokens)
        whole = [jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True)[:, :num_tokens] for x in (query, key, value)]
        y = jnp.pad(attend(*whole), [(0, 0), (0, own * devices - num_tokens), (0, 0), (0, 0)])
        return jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index(CONTEXT) * own, own, axis=1)

    return jax.shard_map(part, in_specs=(TOKENS,) * 3, out_specs=TOKENS, check_vma=False)(query, key, value)


def _with_all_tokens(attend: Callable[..., jax.Array], *arrays: jax.Array, num_tokens: int) -> jax.Array:
    """attend(query, key, value) of all tokens by each device along "context", for its share of the heads."""
    if axis_size(CONTEXT) == 1:
        return attend(*arrays)
    whole = [_trade(None, 2, 1)(x) for x in arrays]
    y = attend(*(x[:, :num_tokens] for x in whole))
    y = jnp.pad(y, [(0, 0), (0, whole[0].shape[1] - num_tokens), (0, 0), (0, 0)])
    return _trade(None, 1, 2)(y)


def _trade(groups: list[list[int]] | None, split: int, join: int) -> Callable[[jax.Array], jax.Array]:
    """An all-to-all along "context" among the devices of each group; None for all devices together."""
    return functools.partial(
        jax.lax.all_to_all,
        axis_name=CONTEXT,
        split_axis=split,
        concat_axis=join,
        tiled=True,
        axis_index_groups=groups,
    )


def cross_attention_on_mesh(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`softmax_attention` of a video to a text. Every device along "context" holds the complete text."""
    if not is_cut():
        return softmax_attention(query, key, value)
    return jax.shard_map(softmax_attention, in_specs=(TOKENS, _TEXT, _TEXT), out_specs=TOKENS, check_vma=False)(
        query, key, value
    )
