"""The cases that `tpu_static` compiles: one complete attention layer from (q, k, v) to y, forward and backward.

`tpu_compile` calls every case in a separate process, with JSON-ready keywords. A case returns a function and the
abstract arguments for which to compile it.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.features.maps import FeatureMap, LinearBranch
from rehyat_jax.attention.form import make_form
from rehyat_jax.attention.forms.base import AttentionInputs, BlockFeatures
from rehyat_jax.attention.hybrid.api import hybrid_attention
from rehyat_jax.cli import not_a_command

CHUNK_FRAMES, OVERLAP_FRAMES = 3, 1

Case = tuple[Callable, tuple[Any, ...]]


def hybrid(
    heads: int, head_dim: int, frames: int, tokens_per_frame: int, *, implementation: str, direction: str
) -> Case:
    """Hybrid attention with feature maps of the default configuration.

    Queries, keys, values and y have the model's layout: bfloat16 [1, tokens, heads * head_dim]. `direction` is:

      - "forward"
      - "backward": gradients of q, k, v and the feature maps
      - "phi_backward": gradients of only the feature maps, which distilling one block needs

    Backward is only the pullback: the forward pass's residuals are its arguments.
    """
    make_map = lambda: FeatureMap(FeatureMapConfig(), heads=heads, head_dim=head_dim, rngs=nnx.Rngs(0))
    graphdef, weights = nnx.split(nnx.eval_shape(make_map))
    x = jax.ShapeDtypeStruct((1, frames * tokens_per_frame, heads * head_dim), jnp.bfloat16)

    def layer(weights, *qkv):
        split = lambda x: x.reshape(*x.shape[:2], heads, head_dim)
        map_query, map_key = (nnx.merge(graphdef, weight) for weight in weights)
        y = hybrid_attention(
            *map(split, qkv),
            map_query,
            map_key,
            tokens_per_frame=tokens_per_frame,
            chunk_frames=CHUNK_FRAMES,
            overlap_frames=OVERLAP_FRAMES,
            implementation=implementation,
        )
        return y.reshape(x.shape)

    arguments = ((weights, weights), x, x, x)
    if direction == "forward":
        return layer, arguments
    return _pullback(layer, arguments, differentiated=1 if direction == "phi_backward" else len(arguments), cotangent=x)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "hybrid": ("hybrid", {}),
    "hybrid, overlap of 2 frames": ("hybrid", {"overlap_frames": 2}),
    "hybrid, 1 anchor": ("hybrid", {"anchor_frames": 1}),
    "hybrid, decay": ("hybrid", {"decay": True}),
    "hybrid, gate": ("hybrid", {"feature_map": {"gate": True}}),
    "hybrid, bidirectional": ("hybrid", {"causal": False}),
    "hybrid, linear window": ("hybrid", {"linear_window": True}),
    "hybrid, bidirectional, linear window": ("hybrid", {"causal": False, "linear_window": True}),
    "two branches": ("two_branch", {}),
    "window": ("window", {}),
    "window, 1 anchor": ("window", {"anchor_frames": 1}),
    "linear": ("linear", {"chunk_frames": 3}),
    "strided, R = 2": ("strided", {"stride": 2}),
    "strided, R = 4": ("strided", {"stride": 4}),
    "strided, R = 8": ("strided", {"stride": 8}),
}
"""(kind, fields that are no defaults) of the forms of attention that are compared."""


def form(heads: int, head_dim: int, frames: int, tokens_per_frame: int, *, name: str, direction: str) -> Case:
    """A block's attention in one of `FORMS`, as `form_of`."""
    kind, fields = FORMS[name]
    return form_of(heads, head_dim, frames, tokens_per_frame, kind=kind, fields=fields, direction=direction)


def form_of(
    heads: int,
    head_dim: int,
    frames: int,
    tokens_per_frame: int,
    *,
    kind: str,
    fields: dict[str, Any],
    direction: str,
) -> Case:
    """A block's attention in the form of `make_form`, from queries, keys and values to y, as `hybrid`."""
    attention = make_form(kind, fields)
    learned = attention.learned
    x = jax.ShapeDtypeStruct((1, frames * tokens_per_frame, heads * head_dim), jnp.bfloat16)
    graphdef: Any = None
    weights: Any = {}
    if learned is not None:
        make = lambda: LinearBranch(
            learned.feature_map,
            decay=learned.decay,
            branch_gate=learned.branch_gate,
            heads=heads,
            head_dim=head_dim,
            rngs=nnx.Rngs(0),
        )
        graphdef, weights = nnx.split(nnx.eval_shape(make))

    def layer(weights, *qkv):
        query, key, value = (x.reshape(*x.shape[:2], heads, head_dim) for x in qkv)
        inputs = AttentionInputs(query, key, value, query, key, query, key, tokens_per_frame, frames)
        features = None
        if learned is not None:
            branch = nnx.merge(graphdef, weights)
            phis = (getattr(branch, side).inline(x, of_own_tokens=True) for side, x in (("query", query), ("key", key)))
            features = BlockFeatures(*phis, branch.log_decay(), branch.gate())
        return attention.attend(inputs, features, implementation=None).reshape(x.shape)

    arguments = (weights, x, x, x)
    if direction == "forward":
        return layer, arguments
    return _pullback(layer, arguments, differentiated=len(arguments), cotangent=x)


def full_softmax(
    heads: int,
    head_dim: int,
    frames: int,
    tokens_per_frame: int,
    *,
    direction: str,
    blocks: dict[str, int],
    is_fused: bool = False,
) -> Case:
    """Full softmax attention by JAX's splash attention kernels with the given block sizes.

    The conditions favour splash attention. It gets queries (scaled), keys and values in its own layout, [heads, tokens,
    head_dim], padded to complete blocks, and no mask on the padding. `direction` is "forward" or "backward". `is_fused`
    selects one backward kernel instead of two; it writes partial gradients of the queries for every block of keys.
    """
    tokens = frames * tokens_per_frame
    blocks = {name: min(size, max(128, 1 << (tokens - 1).bit_length())) for name, size in blocks.items()}
    block = math.lcm(*blocks.values())
    tokens = -(-tokens // block) * block
    x = jax.ShapeDtypeStruct((heads, tokens, head_dim), jnp.bfloat16)
    mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
    sizes = splash.BlockSizes(**{"block_q": 128, "block_kv": 128} | blocks, use_fused_bwd_kernel=is_fused)

    def attend(q, k, v):
        return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)(q, k, v)

    if direction == "forward":
        return attend, (x, x, x)
    return _pullback(attend, (x, x, x), differentiated=3, cotangent=x)


def _pullback(function: Callable, arguments: tuple[Any, ...], *, differentiated: int, cotangent: Any) -> Case:
    """Only the backward pass for the first `differentiated` arguments; it takes residuals and cotangent."""

    def residuals(*arguments):
        head, tail = arguments[:differentiated], arguments[differentiated:]
        return jax.vjp(lambda *head: function(*head, *tail), *head)[1]

    return (lambda pullback, cotangent: pullback(cotangent)), (jax.eval_shape(residuals, *arguments), cotangent)


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.tpu_static"))
