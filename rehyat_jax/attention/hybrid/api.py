"""Hybrid attention: its definition, its arguments, and the choice of an implementation."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.hybrid.backend import Request, choose_backend
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.reference import normalised_weights
from rehyat_jax.attention.hybrid.state import HybridState, LinearState, StateForm
from rehyat_jax.attention.product import accumulation_dtype

STABILIZERS = ("row_max", "joint")

Features = jax.Array | InlineFeatures | Callable[[jax.Array], jax.Array]


def hybrid_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    phi_query: Features,
    phi_key: Features,
    *,
    tokens_per_frame: int,
    chunk_frames: int,
    overlap_frames: int,
    causal: bool = True,
    stabilizer: str = "row_max",
    anchor_frames: int = 0,
    linear_window: bool = False,
    log_decay: jax.Array | None = None,
    branch_gate: jax.Array | None = None,
    implementation: str | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
    later: LinearState | None = None,
) -> jax.Array | tuple[jax.Array, HybridState]:
    """Softmax attention inside a temporal window, linear attention outside it, one normalisation over both.

    Source: ReHyAt (arXiv 2601.04342), joint normalisation and recurrent form. The video's frames are divided into
    chunks of Tc = chunk_frames. A query of chunk t attends by softmax to the window [max(t*Tc - To, 0), (t+1)*Tc) of
    frames, where To = overlap_frames. It attends by the feature maps to every frame before the window and, unless
    causal, to every frame after it:

        aS = sum_S exp(q.k_j / sqrt(head_dim) - c) v_j      aL = phi_query(q) sum_L phi_key(k_j) v_j^T
        nS = sum_S exp(q.k_j / sqrt(head_dim) - c)          nL = phi_query(q) sum_L phi_key(k_j)
        y = (aS + aL) / (nS + nL)

    Args:
      query, key, value: [batch, tokens, heads, head_dim] of one floating dtype, tokens frame-major. Any number of
        frames: the last chunk may be ragged, or the only one.
      phi_query, phi_key: non-negative features, as one of
        - arrays [batch, tokens, heads, features] in the dtype of `query` or float32;
        - `InlineFeatures`, which "pallas_tpu" computes inside its kernels;
        - feature maps, called on `query` and `key`, or inlined if they have a method `inline` like `FeatureMap`.
      tokens_per_frame: tokens of one latent frame.
      chunk_frames: Tc, at least 1.
      overlap_frames: To, between 0 and chunk_frames.
      causal: True if linear attention reads the past only. Inside the window attention is bidirectional either way.
      stabilizer: the choice of c, a constant in both modes of differentiation. "row_max", the paper's literal reading:
        the row's largest score in the window; the linear weights are relative to it. "joint": zero (computed safely);
        full softmax attention is recovered where phi_query.phi_key = exp(q.k / sqrt(head_dim)). These are two different
        functions: never mix them between training and inference.
      anchor_frames: the video's first A frames, at most chunk_frames, are softmax keys of every chunk. They are not
        linear keys.
      linear_window: True if the frames of the window are linear keys too. A causal student can then use their features
        in place of the future that it does not see. Not with log_decay.
      log_decay: [heads], at most 0. The linear weight of a key is multiplied by exp(log_decay) for every frame between
        it and the window. None for no decay.
      branch_gate: [heads]. The two branches are normalised separately, y = (1 - gate) aS/nS + gate aL/nL, without gate
        where there are no linear keys, and `stabilizer` has no effect. None for the joint normalisation.
      implementation: one of
        - "reference": dense, the definition;
        - "scan": recurrent;
        - "xla": all chunks as a batch;
        - "cudnn": flash attention, 16 bits, for NVIDIA GPUs;
        - "pallas_tpu": fused kernels for TPUs;
        - "pallas_gpu": one fused kernel forward, cuDNN's backward, head_dim 128, for Hopper GPUs;
        - None: the best one that can do the request on the platform that the program is compiled for.
        The first three support forward mode (`jax.jvp`).
      initial_state: the state returned with the preceding chunks of the same video; None at its start.
      return_state: also return the state that continues the video. Only after complete chunks.
      later: sums over the frames after these (`hybrid_key_sums`). Bidirectional attention needs them to continue a
        video, also after its last frame, where they are zero.

    Returns: y, [batch, tokens, heads, head_dim] in the dtype of `query`; with return_state, (y, HybridState).

    Raises:
      ValueError: shapes, dtypes or arguments do not fit together, or the implementation does not support them.
    """
    request = _checked_request(
        (query, key, value),
        (phi_query, phi_key),
        tokens_per_frame=tokens_per_frame,
        chunk_frames=chunk_frames,
        overlap_frames=overlap_frames,
        causal=causal,
        stabilizer=stabilizer,
        anchor_frames=anchor_frames,
        linear_window=linear_window,
        log_decay=log_decay,
        branch_gate=branch_gate,
        initial_state=initial_state,
        return_state=return_state,
        later=later,
    )
    backend = choose_backend(request, implementation)
    backend.check(request)
    if initial_state is None and not return_state and later is None:
        return backend(request)[0]
    _check_streaming(request)
    form: StateForm | None = request.state_form
    if initial_state is not None:
        form, initial_state = initial_state.form, dataclasses.replace(initial_state, form=None)
    elif later is not None:
        initial_state = request.zero_state
    output, final_state = backend(dataclasses.replace(request, initial_state=initial_state))
    if not return_state:
        return output
    assert final_state is not None
    return output, dataclasses.replace(final_state, form=form)


def hybrid_key_sums(
    key: jax.Array,
    value: jax.Array,
    phi_key: Features,
    *,
    tokens_per_frame: int,
    implementation: str | None = None,
) -> LinearState:
    """The sums over all keys that linear attention reads: `hybrid_attention`'s `later`, added up over later frames.

    Args: see `hybrid_attention`.

    Returns: state [batch, heads, features, head_dim] and normalizer [batch, heads, features], float32 (float64 for
      float64 arrays).

    Raises:
      ValueError: see `hybrid_attention`.
    """
    request = _checked_request(
        (key, key, value),
        (phi_key, phi_key),
        tokens_per_frame=tokens_per_frame,
        chunk_frames=1,
        overlap_frames=0,
        causal=True,
        stabilizer="joint",
    )
    backend = choose_backend(request, implementation)
    backend.check(request)
    return backend.video_sums(request.phi_key, request.value, request.geometry, None)[1]


def hybrid_attention_weights(
    query: jax.Array,
    key: jax.Array,
    phi_query: Features,
    phi_key: Features,
    *,
    tokens_per_frame: int,
    chunk_frames: int,
    overlap_frames: int,
    causal: bool = True,
    stabilizer: str = "row_max",
    anchor_frames: int = 0,
    linear_window: bool = False,
    log_decay: jax.Array | None = None,
    branch_gate: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The dense weights of `hybrid_attention`, for inspection. Their memory grows with the square of the tokens.

    Args: see `hybrid_attention`.

    Returns: (softmax weights, linear weights), each [batch, heads, queries, keys] in float32 (float64 for float64
      arrays). The weights of a query, of both kinds together, sum to one.

    Raises:
      ValueError: see `hybrid_attention`; or there are more than 2**28 weights.
    """
    request = _checked_request(
        (query, key, key),
        (phi_query, phi_key),
        tokens_per_frame=tokens_per_frame,
        chunk_frames=chunk_frames,
        overlap_frames=overlap_frames,
        causal=causal,
        stabilizer=stabilizer,
        anchor_frames=anchor_frames,
        linear_window=linear_window,
        log_decay=log_decay,
        branch_gate=branch_gate,
    )
    batch, tokens, heads, _ = request.query.shape
    if (count := batch * heads * tokens**2) > _MOST_WEIGHTS:
        raise ValueError(f"expected at most {_MOST_WEIGHTS} weights, found {count} for {tokens} tokens: give fewer")
    return normalised_weights(request.with_arrays())


_MOST_WEIGHTS = 2**28


def _checked_request(
    tokens: tuple[jax.Array, jax.Array, jax.Array],
    features: tuple[Features, Features],
    *,
    tokens_per_frame: int,
    chunk_frames: int,
    overlap_frames: int,
    causal: bool,
    stabilizer: str,
    anchor_frames: int = 0,
    linear_window: bool = False,
    log_decay: jax.Array | None = None,
    branch_gate: jax.Array | None = None,
    initial_state: HybridState | None = None,
    return_state: bool = False,
    later: LinearState | None = None,
) -> Request:
    """The arguments of `hybrid_attention` as a request, with feature maps called or inlined. Raises ValueError."""
    query, key, value = (x if isinstance(x, jax.Array) else jnp.asarray(x) for x in tokens)
    _check_tokens(query, key, value)
    numbers = dict(tokens_per_frame=tokens_per_frame, chunk_frames=chunk_frames, overlap_frames=overlap_frames)
    numbers |= dict(anchor_frames=anchor_frames)
    geometry = _checked_geometry(query, **{name: _integer(name, number) for name, number in numbers.items()})
    geometry = dataclasses.replace(geometry, linear_window=bool(linear_window))
    if linear_window and log_decay is not None:
        raise ValueError("linear_window and log_decay: expected one of them, found both; decay begins after the window")
    _check_choice("stabilizer", stabilizer, STABILIZERS)
    phi_query, phi_key = (
        _features(name, phi, x) for name, phi, x in zip(("phi_query", "phi_key"), features, (query, key), strict=True)
    )
    _check_features(query, phi_query, phi_key)
    log_decay, branch_gate = (
        _per_head(name, given, query) for name, given in (("log_decay", log_decay), ("branch_gate", branch_gate))
    )
    return Request(
        query,
        key,
        value,
        phi_query,
        phi_key,
        geometry,
        causal=causal,
        stabilizer=stabilizer,
        initial_state=initial_state,
        return_state=return_state,
        later=later,
        log_decay=log_decay,
        branch_gate=branch_gate,
    )


def _per_head(name: str, given: Any, query: jax.Array) -> jax.Array | None:
    """One number for every head, in the dtype of sums."""
    if given is None:
        return None
    given = jnp.asarray(given, accumulation_dtype(query.dtype))
    if given.shape != query.shape[2:3]:
        raise ValueError(f"{name} must be [heads] = {list(query.shape[2:3])}, found shape {list(given.shape)}")
    return given


def _check_tokens(query, key, value):
    if query.ndim != 4:
        raise ValueError(f"query must be [batch, tokens, heads, head_dim], found shape {query.shape}")
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query must be of a floating dtype, found {query.dtype}")
    for name, array in (("key", key), ("value", value)):
        if (array.shape, array.dtype) != (query.shape, query.dtype):
            raise ValueError(
                f"{name} must have query's shape {query.shape} and dtype {query.dtype}, "
                f"found {array.shape} and {array.dtype}"
            )


def _features(name: str, features: Features, x: jax.Array) -> jax.Array | InlineFeatures:
    """Features as an array or inlined; `name` is the argument's name."""
    if features is None:
        raise ValueError(
            f"{name} must be features [batch, tokens, heads, features], InlineFeatures or a feature map, found None"
        )
    if hasattr(features, "inline"):
        features = features.inline(x, of_own_tokens=True)
    elif callable(features):
        features = features(x)
    if not isinstance(features, InlineFeatures):
        return features if isinstance(features, jax.Array) else jnp.asarray(features)
    features = features.bound(x)
    for matrix in features.weights:
        if matrix.shape[0] != x.shape[2]:
            raise ValueError(f"{name}: expected a map of {x.shape[2]} heads, as query has, found {matrix.shape[0]}")
    return features


def _check_features(query, phi_query, phi_key):
    dtypes = (query.dtype, accumulation_dtype(query.dtype))
    for name, array in (("phi_query", phi_query), ("phi_key", phi_key)):
        if array.ndim != 4 or array.shape[:3] != query.shape[:3] or array.shape != phi_query.shape:
            raise ValueError(
                f"phi_query and phi_key must both be [batch, tokens, heads, features] with query's "
                f"{query.shape[:3]}, found {name} of shape {array.shape}"
            )
        if array.dtype not in dtypes:
            raise ValueError(f"{name} must be of dtype {' or '.join(map(str, dtypes))}, found {array.dtype}")


def _integer(name: str, number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be an integer, found {number!r}") from None


def _checked_geometry(query, tokens_per_frame, chunk_frames, overlap_frames, anchor_frames) -> ChunkGeometry:
    tokens = query.shape[1]
    if tokens_per_frame < 1 or tokens < 1 or tokens % tokens_per_frame:
        raise ValueError(
            f"query must hold whole frames: found {tokens} tokens, not a positive multiple of "
            f"tokens_per_frame={tokens_per_frame}; its shape {query.shape} must be [batch, tokens, heads, head_dim]"
        )
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, found {chunk_frames}")
    if not 0 <= overlap_frames <= chunk_frames:
        raise ValueError(
            f"overlap_frames must be between 0 and chunk_frames={chunk_frames}, so that the overlap lies within the "
            f"preceding chunk; found {overlap_frames}"
        )
    if not 0 <= anchor_frames <= chunk_frames:
        raise ValueError(
            f"anchor_frames must be between 0 and chunk_frames={chunk_frames}, so that the first chunk holds all "
            f"anchors; found {anchor_frames}"
        )
    return ChunkGeometry(tokens // tokens_per_frame, tokens_per_frame, chunk_frames, overlap_frames, anchor_frames)


def _check_choice(name: str, found: str, allowed: tuple[str, ...]):
    if found not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, found {found!r}")


def _check_streaming(request: Request):
    geometry, initial_state, later = request.geometry, request.initial_state, request.later
    if request.causal == (later is not None):
        raise ValueError(
            f"initial_state and return_state with causal={request.causal}: expected "
            f"{'no later' if request.causal else 'later, the sums over the frames after these (hybrid_key_sums)'}, "
            f"found {'sums' if request.causal else 'None'}"
        )
    if later is not None:
        if not isinstance(later, LinearState):
            raise ValueError(f"later must be a LinearState, found {type(later).__name__}")
        _check_leaves("later", later, request.zero_state.past)
    if request.return_state and geometry.is_ragged:
        raise ValueError(
            f"return_state needs whole chunks: found {geometry.num_frames} frames, not a multiple of "
            f"chunk_frames={geometry.chunk_frames}; give the last, ragged chunk without return_state"
        )
    if initial_state is None:
        return
    if not isinstance(initial_state, HybridState):
        raise ValueError(f"initial_state must be a HybridState, found {type(initial_state).__name__}")
    if initial_state.form not in (None, request.state_form):
        for name, found, expected in zip(StateForm._fields, initial_state.form, request.state_form, strict=True):
            if found != expected:
                raise ValueError(
                    f"initial_state is of {name}={found!r}, found {name}={expected!r}: a video continues in the form "
                    f"that it began with"
                )
    _check_leaves("initial_state", initial_state, request.zero_state)


def _check_leaves(name: str, found: Any, expected: Any):
    leaves = (jax.tree_util.tree_leaves_with_path(tree) for tree in (expected, found))
    for (path, expected), (_, found) in zip(*leaves, strict=True):
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must be {expected.dtype}{list(expected.shape)}, "
                f"found {found.dtype}{list(found.shape)}: it comes from another video, geometry or dtype"
            )
