"""implementation="pallas_tpu": hybrid attention, feature maps included, as fused TPU kernels with their gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from rehyat_jax.attention.features.inline import InlineFeatures, as_inline, with_gain
from rehyat_jax.attention.flat_tokens import cut, flat, joined, with_heads
from rehyat_jax.attention.hybrid.backend import Backend, Request, sums_by_xla
from rehyat_jax.attention.hybrid.chunks import attend_branches
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.hybrid.tpu.arrays import (
    added,
    drop_padding,
    frame_squares,
    missing_frames,
    pad_frames,
    sum_rows,
    sums_of_rows,
    with_first,
)
from rehyat_jax.attention.hybrid.tpu.backward import readout_backward, window_backward
from rehyat_jax.attention.hybrid.tpu.decay import GIVEN, decayed_states
from rehyat_jax.attention.hybrid.tpu.forward import attend, needs_running_maximum
from rehyat_jax.attention.hybrid.tpu.linear_window import window_states
from rehyat_jax.attention.hybrid.tpu.states import (
    Walk,
    chunk_states,
    chunk_states_backward,
    first_chunk_with_past,
    state_rows,
)
from rehyat_jax.attention.hybrid.tpu.tiling import Tiling
from rehyat_jax.attention.residuals import kept
from rehyat_jax.attention.softmax.tpu.backward import attend_backward
from rehyat_jax.attention.softmax.tpu.blocks import Blocks
from rehyat_jax.attention.tpu.blocks import HeadBlocks, unview
from rehyat_jax.attention.tpu.token_dots import token_dots


def run(request: Request) -> tuple[jax.Array, HybridState | None]:
    """Hybrid attention by two kernels: one sums keys into the chunks' states, one attends to window and state.

    Inlined features never leave the chip. Differentiation runs one kernel for the readout of the states and one for
    their keys. It runs two more for the softmax window only if the gradient of a query, key or value is wanted.
    """
    if request.branch_gate is not None:
        return attend_branches(run, request)
    query, key, value, geometry = request.query, request.key, request.value, request.geometry
    initial_state, num_frames, causal = request.initial_state, request.num_frames, request.causal
    phi_query, phi_key = (as_inline(features, query.dtype) for features in (request.phi_query, request.phi_key))
    has_linear = phi_key.shape[-1] > 0
    tiling = Tiling.choose(
        geometry,
        head_dim=query.shape[-1],
        source_width=max(phi_query.source.shape[-1], phi_key.source.shape[-1]),
        dtype=query.dtype,
        continues=initial_state is not None,
    )
    pad = lambda tokens: pad_frames(tokens, geometry.tokens_per_frame, tiling.frame)
    operands: dict[str, Any] = {"query": pad(query), "key": pad(key), "value": pad(value)}
    anchors = _anchors(request)
    if anchors:
        chunk = np.arange(geometry.num_chunks) + (0 if initial_state is None else initial_state.chunks)
        frames = chunk * geometry.chunk_frames - geometry.overlap_frames
        operands["anchors"] = jnp.clip(frames, 0, geometry.anchor_frames).astype(jnp.int32)
    if initial_state is not None:
        # Anchors and the first chunk's overlap go before the keys.
        operands["state_value"] = operands["value"]
        for name in ("key", "value"):
            operands[name] = joined(pad(getattr(initial_state, f"overlap_{name}")), operands[name])
            if anchors:
                operands[name] = joined(pad(anchors[f"anchor_{name}"]), operands[name])
        operands["missing_frames"] = missing_frames(tiling.geometry, initial_state.chunks > 0, num_frames)
    functions = phi_query.function, phi_key.function
    call = _Call(tiling, query.shape[2], request.return_state, causal, request.stabilizer, *functions)
    if has_linear:
        operands |= _linear_operands(request, phi_query, phi_key, pad, tiling)
        output, past, overlap = _attention(call, _views(operands))
    else:
        operands.pop("state_value", None)
        output, past, overlap = _window(call, _views(operands)), None, None
    output = drop_padding(unview(output, call.heads), geometry.tokens_per_frame, tiling.frame)
    if not request.return_state:
        return output, None

    split = geometry.overlap_start - geometry.chunk_frames * geometry.tokens_per_frame or key.shape[1]
    final_state = HybridState(
        past=sums_of_rows(past) if has_linear else request.zero_state.past,
        overlap=sums_of_rows(overlap) if has_linear else request.zero_state.overlap,
        overlap_key=cut(key, split, None),
        overlap_value=cut(value, split, None),
        chunks=(0 if initial_state is None else initial_state.chunks) + jnp.int32(geometry.num_chunks),
        **anchors,
    )
    return output, final_state


def _linear_operands(
    request: Request,
    phi_query: InlineFeatures,
    phi_key: InlineFeatures,
    pad: Callable[[jax.Array], jax.Array],
    tiling: Tiling,
) -> dict[str, Any]:
    """The operands of the linear branch; `pad` appends zeros to frames."""
    initial_state, causal = request.initial_state, request.causal
    operands: dict[str, Any] = {
        "query_source": None if phi_query.of_own_tokens else pad(phi_query.source),
        "key_source": None if phi_key.of_own_tokens else pad(phi_key.source),
        "query_weights": phi_query.weights,
        "key_weights": phi_key.weights,
    }
    gains = {"query_gain": phi_query.gain, "key_gain": with_gain(phi_key, request.key_gain()).gain}
    if not causal and request.log_decay is not None:
        gains[_FUTURE_GAIN] = with_gain(phi_key, request.key_gain(future=True)).gain
    operands |= {name: pad(gain) for name, gain in gains.items() if gain is not None}
    if request.log_decay is not None:
        operands["log_decay"] = request.chunk_log_decay
    if initial_state is not None:
        # The sums of the overlap are in the state, so the keys, which begin with it, are no source of features.
        operands |= {
            "key_source": pad(phi_key.source),
            "past": sum_rows(initial_state.past),
            "overlap": sum_rows(initial_state.overlap),
        }
    if request.later is not None:
        operands["later"] = sum_rows(request.later)
    if request.num_frames is not None and (not causal or request.geometry.linear_window):
        operands["padding_frames"] = (tiling.geometry.num_frames - request.num_frames)[None]
    return operands


def _anchors(request: Request) -> dict[str, jax.Array]:
    """The keys and values of the anchors, as a state has them; empty without anchors."""
    count = request.geometry.anchor_frames * request.geometry.tokens_per_frame
    if not count:
        return {}
    found = {}
    for name, tokens in (("anchor_key", request.key), ("anchor_value", request.value)):
        own = cut(tokens, 0, min(count, tokens.shape[1]))
        own = jnp.pad(own, ((0, 0), (0, count - own.shape[1]), (0, 0), (0, 0)))
        before = None if request.initial_state is None else getattr(request.initial_state, name)
        found[name] = own if before is None else jnp.where(request.initial_state.chunks == 0, own, before)
    return found


def attend_to_overlap(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    linear_value: jax.Array,
    phi_query: InlineFeatures,
    phi_key: InlineFeatures,
    geometry: ChunkGeometry,
    *,
    stabilizer: str,
) -> jax.Array:
    """Attention of a video of one chunk to the keys of the overlap before it, and to sums over the chunk's own tokens.

    Args:
      query, linear_value: of the chunk, [batch, tokens, heads, head_dim]. They may be fewer tokens than it has.
      key, value: of the overlap.
      phi_query, phi_key: of the chunk, with their sources. phi_key has a gain.
      geometry: one chunk, with linear_window.

    Returns: [batch, tokens, heads, head_dim].
    """
    batch, tokens, heads, head_dim = query.shape
    widths = phi_query.source.shape[-1], phi_key.source.shape[-1]
    # Long videos get frames that the blocks of `_overlap_backward` divide.
    rows = geometry.tokens_per_frame
    if geometry.num_frames * rows > _LARGEST_GROUP:
        rows = -(-rows // _LONG_FRAME) * _LONG_FRAME
    tiling = Tiling.choose(
        dataclasses.replace(geometry, tokens_per_frame=rows),
        head_dim=head_dim,
        source_width=max(widths),
        dtype=query.dtype,
        continues=True,
        largest_group=_LARGEST_GROUP,
    )
    tiling = dataclasses.replace(tiling, tokens_per_frame=geometry.tokens_per_frame)

    def padded(array: jax.Array, frames: int) -> jax.Array:
        """Zeros at the end, which have no gain."""
        missing = frames * tiling.frame - array.shape[1]
        if array.ndim == 3:
            return jnp.pad(array, ((0, 0), (0, missing), (0, 0)))
        return with_heads(jnp.pad(flat(array), ((0, 0), (0, missing), (0, 0))), heads)

    of_overlap = {"key": key, "value": value}
    of_chunk = {
        "query": query,
        "state_value": linear_value,
        "query_source": None if phi_query.of_own_tokens else phi_query.source,
        "key_source": phi_key.source,
        "query_gain": phi_query.gain,
        "key_gain": phi_key.gain,
    }
    operands: dict[str, Any] = {"query_source": None}
    for frames, arrays in ((geometry.overlap_frames, of_overlap), (geometry.num_frames, of_chunk)):
        operands |= {name: padded(array, frames) for name, array in arrays.items() if array is not None}
    nothing = jnp.zeros((batch, heads, state_rows(head_dim), phi_key.shape[-1]), jnp.float32)
    operands |= {
        "query_weights": phi_query.weights,
        "key_weights": phi_key.weights,
        "past": nothing,
        "overlap": nothing,
        "missing_frames": jnp.zeros((2, 1), jnp.int32),
    }
    functions = phi_query.function, phi_key.function
    call = _Call(tiling, heads, False, True, stabilizer, *functions, has_own_keys=False)
    output, _, _ = _attention(call, _views(operands))
    return cut(unview(output, heads), 0, tokens)


def video_sums(
    phi_key: jax.Array | InlineFeatures, value: jax.Array, geometry: ChunkGeometry, num_frames: jax.Array | None
) -> tuple[LinearState, LinearState]:
    """Sums over the frames before the video's last overlap_frames, and over all its frames, by the same kernels."""
    phi_key = as_inline(phi_key, value.dtype)
    if not phi_key.shape[-1]:
        return sums_by_xla(phi_key, value, geometry, num_frames)
    tiling = Tiling.choose(geometry, head_dim=value.shape[-1], source_width=phi_key.source.shape[-1], dtype=value.dtype)
    # The video is treated as one chunk before another one; see `_Call.video_walk`.
    whole = dataclasses.replace(tiling.geometry, chunk_frames=tiling.geometry.num_frames, linear_window=False)
    call = _Call(
        dataclasses.replace(tiling, geometry=whole),
        value.shape[2],
        return_state=True,
        causal=True,
        stabilizer="",
        query_function=phi_key.function,
        key_function=phi_key.function,
    )
    pad = lambda tokens: pad_frames(tokens, geometry.tokens_per_frame, tiling.frame)
    operands = {"key_source": pad(phi_key.source), "value": pad(value), "key_weights": phi_key.weights}
    if phi_key.gain is not None:
        operands["key_gain"] = pad(phi_key.gain)
    if num_frames is not None:
        operands["padding_frames"] = (tiling.geometry.num_frames - num_frames)[None]
    return tuple(map(sums_of_rows, _video_sums(call, _views(operands))))


def why_not(request: Request) -> str | None:
    """The reason why the kernels cannot do a request, and the remedy; None if they can."""
    return why_not_arrays(request.query, request.phi_query)


def why_not_arrays(query: jax.Array, phi_query: jax.Array | InlineFeatures) -> str | None:
    """The reason why the kernels cannot take these arrays, and the remedy; None if they can."""
    instead = 'use implementation="xla"'
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query of dtype {query.dtype}, only of bfloat16 and float32: {instead}"
    if query.shape[-1] % 64:
        return f"query of head_dim {query.shape[-1]}, only of multiples of 64: {instead}"
    if phi_query.shape[-1] % 128:  # none is right: attention to the window alone
        return f"phi_query of {phi_query.shape[-1]} features, only of multiples of 128: {instead}"
    return None


BACKEND = Backend("pallas_tpu", run, why_not, takes_inline_features=True, video_sums=video_sums)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static arguments of a call."""

    tiling: Tiling
    heads: int
    return_state: bool
    causal: bool
    stabilizer: str
    query_function: Callable[..., jax.Array]
    key_function: Callable[..., jax.Array]
    # False if all softmax keys are those of the overlap before the first chunk.
    has_own_keys: bool = True

    @property
    def num_chunks(self) -> int:
        return self.tiling.geometry.num_chunks

    @property
    def overlap_tokens(self) -> int:
        return self.tiling.geometry.overlap_frames * self.tiling.frame

    @property
    def linear_window(self) -> bool:
        return self.tiling.geometry.linear_window

    def walks(self, *, accumulates: bool = True) -> list[Walk]:
        """The orders in which keys enter the chunks' states: for the past and, unless causal, for the future.

        With linear_window the past includes the window, so that its last state holds all frames.
        """
        # The padding of the overlap is not that of the chunk's own tokens.
        whole = dataclasses.replace(self.tiling, tokens_per_frame=self.tiling.frame)
        tiling = self.tiling if self.has_own_keys else whole
        past = Walk(tiling, False, self.num_chunks + self.return_state, accumulates)
        if self.causal or self.linear_window:
            return [past]
        return [past, Walk(self.tiling, True, self.num_chunks, accumulates)]

    def overlap_walk(self) -> Walk:
        """The walk over only the last overlap, treated as a chunk before another one: state 1 holds it."""
        frames = self.tiling.geometry.overlap_frames
        geometry = ChunkGeometry(frames, self.tiling.frame, chunk_frames=frames, overlap_frames=0)
        return Walk(dataclasses.replace(self.tiling, geometry=geometry), is_future=False, num_states=2)

    def video_walk(self) -> Walk:
        """The walk over the video as one chunk.

        State 1 holds the frames before the last overlap. State 2 holds all frames; without an overlap state 1 does.
        """
        return Walk(self.tiling, is_future=False, num_states=3 if self.tiling.geometry.overlap_frames else 2)

    @property
    def read_states(self) -> Callable[..., jax.Array]:
        """(sums of the walk with linear_window, `_given` sums) -> states, a linear function."""
        return functools.partial(window_states, self.tiling.geometry, self.causal, self.return_state)

    def last_overlap(self, features: InlineFeatures, value: jax.Array) -> tuple[InlineFeatures, jax.Array]:
        """phi_key and value of the last overlap_frames."""
        last = lambda tokens: cut(tokens, -self.overlap_tokens, None)
        gain = None if features.gain is None else features.gain[:, -self.overlap_tokens :]
        return dataclasses.replace(features, source=last(features.source), gain=gain), last(value)

    def query_features(self, operands: dict[str, Any]) -> InlineFeatures:
        return self._features(operands, "query", self.query_function)

    def _features(self, operands: dict[str, Any], side: str, function: Callable[..., jax.Array]) -> InlineFeatures:
        features = InlineFeatures(operands[f"{side}_source"], operands[f"{side}_weights"], function)
        features = features.bound(operands.get(side))
        weights = tuple(weight.astype(features.source.dtype) for weight in features.weights)
        return dataclasses.replace(features, weights=weights, gain=operands.get(f"{side}_gain"))

    def key_features(self, operands: dict[str, Any], *, future: bool = False) -> InlineFeatures:
        """phi_key, with the gain of the sums of the past or of the future."""
        features = self._features(operands, "key", self.key_function)
        return dataclasses.replace(features, gain=operands.get(_FUTURE_GAIN, features.gain)) if future else features


# Queries of about a chunk. More would leave too little VMEM for keys.
_LARGEST_GROUP = 4096
_LONG_FRAME = 512

_FUTURE_GAIN = "future_key_gain"

# Token arrays are passed, kept for the backward pass and returned as the views that kernels read. A TPU would pad the
# heads of [batch, tokens, heads, head_dim] to a multiple of eight.
_TOKEN_ARRAYS = ("query", "key", "value", "query_source", "key_source", "state_value")


def _views(operands: dict[str, Any]) -> dict[str, Any]:
    views = {
        name: HeadBlocks.of(operands[name]).view(operands[name])
        for name in _TOKEN_ARRAYS
        if operands.get(name) is not None
    }
    return operands | views


def _unviews(operands: dict[str, Any], heads: int) -> dict[str, Any]:
    arrays = {name: unview(operands[name], heads) for name in _TOKEN_ARRAYS if operands.get(name) is not None}
    return operands | arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, operands: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(output, sums over the frames before the next chunk's window, sums over its overlap); token arrays are views."""
    return _forward(call, operands)[0]


def _forward(call: _Call, operands: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    operands = _unviews(operands, call.heads)
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    continues = "past" in operands
    features, state_value = call.key_features(operands), operands.get("state_value", value)

    states, sums, squares = _chunk_states(call, operands)
    if continues:
        if call.has_own_keys:
            before, own = frame_squares(cut(key, None, -query.shape[1]), call.tiling.frame), squares["key"]
        else:
            before, own = _frame_squares(key, call.tiling), jnp.zeros_like(squares["query"])
        squares["key"] = jnp.concatenate([before, own], axis=-1)

    output, log_sum_exp, stabilizer = attend(
        query,
        key,
        value,
        call.query_features(operands),
        states,
        needs_running_maximum(squares["query"], squares["key"], query.shape[-1], call.tiling, continues=continues),
        call.tiling,
        causal=call.causal,
        stabilizer=call.stabilizer,
        missing_frames=operands.get("missing_frames"),
        anchors=operands.get("anchors"),
        has_own_keys=call.has_own_keys,
    )
    output = HeadBlocks.of(output).view(output)
    output, log_sum_exp, stabilizer, states = kept((output, log_sum_exp, stabilizer, states))
    past = overlap = None
    if call.return_state:
        past, overlap = states[call.num_chunks], jnp.zeros_like(states[0])
        if call.overlap_tokens:
            overlap = chunk_states(*call.last_overlap(features, state_value), call.overlap_walk())[0][1]
    return (output, past, overlap), (output, log_sum_exp, stabilizer, states, sums)


def _chunk_states(
    call: _Call, operands: dict[str, Any]
) -> tuple[jax.Array, tuple[jax.Array, ...], dict[str, jax.Array]]:
    """The states of all chunks; with decay, the sums that they are made of; the norms that `chunk_states` measures."""
    query, key = operands["query"], operands["key"]
    value, padding_frames = operands.get("state_value", operands["value"]), operands.get("padding_frames")
    measured = {"query": query}
    if call.has_own_keys:
        measured["key"] = cut(key, -query.shape[1], None)
    has_decay = "log_decay" in operands
    past_walk, *future_walks = call.walks(accumulates=not has_decay)
    if call.linear_window:
        window_sums, squares = chunk_states(
            call.key_features(operands), value, past_walk, padding_frames=padding_frames, measured=measured
        )
        return call.read_states(window_sums, _given(operands)), (), squares
    # The initial overlap leaves the window when the first chunk is done.
    seen = operands["past"] + operands["overlap"] if "past" in operands and not has_decay else None
    states, squares = chunk_states(call.key_features(operands), value, past_walk, initial=seen, measured=measured)
    later = [
        chunk_states(call.key_features(operands, future=True), value, walk, padding_frames=padding_frames)[0]
        for walk in future_walks
    ]
    if has_decay:
        sums = kept((states, *later))
        return decayed_states(call.tiling, sums, _given(operands)), sums, squares
    first = first_chunk_with_past(call.tiling)
    if seen is not None:
        states = with_first(states, first, seen).at[0].set(operands["past"])
    elif not call.causal:
        states = with_first(states, first, 0)
    for after in later:
        states = added(states, after.at[-1].set(0))
    if "later" in operands:
        states = added(states, jnp.broadcast_to(operands["later"], (call.num_chunks, *states.shape[1:])))
    return states, (), squares


def _frame_squares(tokens: jax.Array, tiling: Tiling) -> jax.Array:
    """`frame_squares` by a kernel."""
    dots = token_dots(tokens, tokens, tiling.key_block)
    return dots.reshape(*dots.shape[:2], -1, tiling.frame).max(axis=-1)


def _given(operands: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: operands[name] for name in GIVEN if name in operands}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Names of the operands whose gradients are wanted."""

    names: frozenset[str]


def _forward_rule(call: _Call, operands: dict[str, Any]):
    operands, wanted = _primals(operands)
    outputs, residuals = _forward(call, operands)
    return outputs, (operands, residuals, wanted)


def _backward_rule(call: _Call, saved: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[dict[str, Any]]:
    operands, (output, log_sum_exp, stabilizer, states, sums), wanted = saved
    operands, output = _unviews(operands, call.heads), unview(output, call.heads)
    d_output, d_past, d_overlap = map(_materialised, cotangents)
    d_output = unview(d_output, call.heads)
    query_features, key_features = call.query_features(operands), call.key_features(operands)
    state_value = operands.get("state_value", operands["value"])

    delta, d_states, d_query_weights, d_query_source, d_query_gain = readout_backward(
        d_output,
        output,
        log_sum_exp,
        stabilizer,
        query_features,
        states[: call.num_chunks],
        call.tiling,
        causal=call.causal,
        continues="past" in operands,
        source_gradient=bool(wanted.names & {"query", "query_source"}),
    )
    if call.return_state:
        d_states = jnp.concatenate([d_states, d_past[None]])
    sum_backward = functools.partial(
        chunk_states_backward, token_gradients=bool(wanted.names & {"key", "value", "key_source", "state_value"})
    )
    gradients = dict.fromkeys(operands)
    if "log_decay" in operands:
        _, pullback = jax.vjp(functools.partial(decayed_states, call.tiling), sums, _given(operands))
        d_of_walk, d_given = pullback(d_states)
        gradients |= d_given
    elif call.linear_window:
        (walk,) = call.walks()
        window_sums = jax.ShapeDtypeStruct((walk.num_states, *states.shape[1:]), states.dtype)
        d_window_sums, d_given = jax.linear_transpose(call.read_states, window_sums, _given(operands))(d_states)
        d_of_walk = [d_window_sums]
        gradients |= d_given
    else:
        d_of_walk = [d_states[: walk.num_states] for walk in call.walks()]
        if "past" in operands:
            gradients["overlap"] = d_states[1:].sum(axis=0)
            gradients["past"] = d_states[0] + gradients["overlap"]
        if "later" in operands:
            gradients["later"] = d_states[: call.num_chunks].sum(axis=0)
    by_walk = [
        sum_backward(
            d_sums,
            call.key_features(operands, future=walk.is_future),
            state_value,
            walk,
            padding_frames=operands.get("padding_frames") if walk.meets_padding else None,
        )
        for d_sums, walk in zip(d_of_walk, call.walks(accumulates="log_decay" not in operands), strict=True)
    ]
    d_key_weights, d_key_source, d_state_value = jax.tree.map(
        lambda *leaves: sum(leaves), *(found[:3] for found in by_walk)
    )
    d_gains = [found[3] for found in by_walk]
    if call.return_state and call.overlap_tokens:
        d_overlaps = jnp.stack([jnp.zeros_like(d_overlap), d_overlap])
        last = sum_backward(d_overlaps, *call.last_overlap(key_features, state_value), call.overlap_walk())
        d_key_weights = jax.tree.map(jnp.add, d_key_weights, last[0])
        if d_key_source is not None:
            d_key_source = d_key_source.at[:, -call.overlap_tokens :].add(last[1])
            d_state_value = d_state_value.at[:, -call.overlap_tokens :].add(last[2])
        if last[3] is not None:
            d_gains[0] = d_gains[0].at[:, -call.overlap_tokens :].add(last[3])

    if "query_gain" in operands:
        gradients["query_gain"] = d_query_gain
    if _FUTURE_GAIN in operands:
        gradients["key_gain"], gradients[_FUTURE_GAIN] = d_gains
    elif "key_gain" in operands:
        gradients["key_gain"] = sum(d_gains)
    for name, sums in (("query_weights", d_query_weights), ("key_weights", d_key_weights)):
        gradients[name] = _summed(sums, operands[name])

    # A separate source has a gradient of its own. Otherwise the softmax window's gradient is added to it.
    begin = {"query": d_query_source, "key": d_key_source, "value": d_state_value}
    for name, source in (("query", "query_source"), ("key", "key_source"), ("value", "state_value")):
        if operands.get(source) is not None:
            gradients[source], begin[name] = begin[name], None
    if not call.has_own_keys and wanted.names & {"query", "key", "value"}:
        names = ("query", "key", "value")
        found = _overlap_backward(call, *(operands[name] for name in names), d_output, log_sum_exp, delta)
        for name, gradient in zip(names, found, strict=True):
            gradients[name] = gradient if begin[name] is None else begin[name] + gradient
    elif wanted.names & {"query", "key", "value"}:
        begin = (jnp.zeros_like(operands[name]) if d is None else d for name, d in begin.items())
        gradients["query"], gradients["key"], gradients["value"] = window_backward(
            operands["query"],
            operands["key"],
            operands["value"],
            d_output,
            log_sum_exp,
            delta,
            tuple(begin),
            call.tiling,
            missing_frames=operands.get("missing_frames"),
            anchors=operands.get("anchors"),
        )
    return (_views(gradients),)


def _overlap_backward(
    call: _Call, query: jax.Array, key: jax.Array, value: jax.Array, *rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of the softmax part where all queries attend to the overlap before them, and to no other keys.

    Args:
      rows: the output's cotangent; log-sum-exp and delta, see `window_backward`.
    """
    count = call.tiling.tokens_per_frame
    blocks = Blocks.choose(query.shape[1], count, head_dim=query.shape[-1], dtype=query.dtype)
    assert blocks is not None  # see `attend_to_overlap`
    keys = (cut(array, 0, count) for array in (key, value))
    d_query, *found = attend_backward(query, *keys, *rows, blocks)
    padded = (pad_frames(d, count, call.tiling.frame) for d in found)
    return d_query, *padded


_attention.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _window(call: _Call, operands: dict[str, Any]) -> jax.Array:
    """Attention to the window and the anchors alone; token arrays are views."""
    return _window_forward(call, operands)[0]


def _window_forward(call: _Call, operands: dict[str, Any]) -> tuple[jax.Array, tuple[Any, ...]]:
    arrays = _unviews(operands, call.heads)
    query, key = arrays["query"], arrays["key"]
    squares = (_frame_squares(tokens, call.tiling) for tokens in (query, key))
    continues = "missing_frames" in operands
    output, log_sum_exp, _ = attend(
        query,
        key,
        arrays["value"],
        None,
        None,
        needs_running_maximum(*squares, query.shape[-1], call.tiling, continues=continues),
        call.tiling,
        causal=True,
        stabilizer="",
        missing_frames=operands.get("missing_frames"),
        anchors=operands.get("anchors"),
    )
    output, log_sum_exp = kept((HeadBlocks.of(output).view(output), log_sum_exp))
    return output, (operands, output, log_sum_exp)


def _window_backward(call: _Call, saved: tuple[Any, ...], d_output: jax.Array) -> tuple[dict[str, Any]]:
    operands, output, log_sum_exp = saved
    operands, tiling = _unviews(operands, call.heads), call.tiling
    output, d_output = unview(output, call.heads), unview(d_output, call.heads)
    names = ("query", "key", "value")
    found = window_backward(
        *(operands[name] for name in names),
        d_output,
        log_sum_exp,
        token_dots(d_output, output, tiling.backward_block),
        tuple(jnp.zeros_like(operands[name]) for name in names),
        tiling,
        missing_frames=operands.get("missing_frames"),
        anchors=operands.get("anchors"),
    )
    return (_views(dict.fromkeys(operands) | dict(zip(names, found, strict=True))),)


_window.defvjp(_window_forward, _window_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _video_sums(call: _Call, operands: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    operands, walk = _unviews(operands, call.heads), call.video_walk()
    features, padding_frames = call.key_features(operands), operands.get("padding_frames")
    states, _ = chunk_states(features, operands["value"], walk, padding_frames=padding_frames)
    geometry = call.tiling.geometry
    before_overlap = states[1] if geometry.overlap_frames < geometry.num_frames else jnp.zeros_like(states[1])
    return before_overlap, states[-1]


def _video_sums_forward_rule(call: _Call, operands: dict[str, Any]):
    operands, wanted = _primals(operands)
    return _video_sums(call, operands), (operands, wanted)


def _video_sums_backward_rule(call: _Call, saved: tuple[Any, ...], cotangents: tuple[Any, ...]):
    operands, wanted = saved
    operands, walk = _unviews(operands, call.heads), call.video_walk()
    d_before, d_total = map(_materialised, cotangents)
    d_states = [jnp.zeros_like(d_total), d_before, d_total] if walk.num_states == 3 else [d_total, d_before + d_total]
    d_weights, d_source, d_value, d_gain = chunk_states_backward(
        jnp.stack(d_states),
        call.key_features(operands),
        operands["value"],
        walk,
        padding_frames=operands.get("padding_frames"),
        token_gradients=bool(wanted.names & {"key_source", "value"}),
    )
    gradients = dict.fromkeys(operands)
    gradients |= {"key_source": d_source, "value": d_value, "key_weights": _summed(d_weights, operands["key_weights"])}
    gradients |= {} if d_gain is None else {"key_gain": d_gain}
    return (_views(gradients),)


_video_sums.defvjp(_video_sums_forward_rule, _video_sums_backward_rule, symbolic_zeros=True)


def _primals(operands: dict[str, Any]) -> tuple[dict[str, Any], _Wanted]:
    """The operands that `symbolic_zeros` gives to a forward rule, as values and the names of wanted gradients."""
    is_primal = lambda leaf: isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
    wanted = {
        name
        for name, tree in operands.items()
        if any(leaf.perturbed for leaf in jax.tree.leaves(tree, is_leaf=is_primal))
    }
    return jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=is_primal), _Wanted(frozenset(wanted))


def _materialised(cotangent: jax.Array | SymbolicZero) -> jax.Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


def _summed(gradients: tuple[jax.Array, ...], weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The gradients summed over the batch, in the weights' dtype."""
    return tuple(d.sum(axis=0).astype(weight.dtype) for d, weight in zip(gradients, weights, strict=True))
