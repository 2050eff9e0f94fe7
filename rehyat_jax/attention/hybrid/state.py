"""The state that the recurrent form keeps of the frames it has seen."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rehyat_jax.attention.product import accumulation_dtype, product


class LinearState(NamedTuple):
    """Sums over a set of keys j: all that linear attention needs of them.

    Attributes:
      state: s = sum_j phi_key(k_j) v_j^T, [..., heads, features, head_dim].
      normalizer: z = sum_j phi_key(k_j), [..., heads, features].
    """

    state: jax.Array
    normalizer: jax.Array

    def __repr__(self) -> str:
        return f"LinearState(state={_summary(self.state)}, normalizer={_summary(self.normalizer)})"

    @classmethod
    def of(cls, phi_key: jax.Array, value: jax.Array) -> "LinearState":
        """Sums over the tokens of phi_key [..., tokens, heads, features] and value [..., tokens, heads, head_dim]."""
        dtype = accumulation_dtype(value.dtype)
        if phi_key.shape[-3] == 0:
            # Then nothing is kept for the gradient: jaxlib 0.11.2 crashes if a shard_map keeps arrays without elements.
            return cls(
                state=jnp.zeros((*phi_key.shape[:-3], *phi_key.shape[-2:], value.shape[-1]), dtype),
                normalizer=jnp.zeros((*phi_key.shape[:-3], *phi_key.shape[-2:]), dtype),
            )
        return cls(
            state=product("...nhf,...nhd->...hfd", phi_key, value),
            normalizer=jnp.sum(phi_key, axis=-3, dtype=dtype),
        )

    @classmethod
    def sum(cls, *states: "LinearState") -> "LinearState":
        """The sums over the union of disjoint sets of keys."""
        return cls(*(sum(leaves) for leaves in zip(*states, strict=True)))

    def scaled(self, log_factor: jax.Array | None) -> "LinearState":
        """The sums times exp(log_factor), [heads]; None for zero."""
        if log_factor is None:
            return self
        factor = jnp.exp(log_factor)
        return LinearState(self.state * factor[:, None, None], self.normalizer * factor[:, None])


def _summary(leaf: Any) -> str:
    """dtype[shape] of an array; anything else in full."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else repr(leaf)


class StateForm(NamedTuple):
    """The form of attention that a state belongs to: a video cannot continue in another one."""

    tokens_per_frame: int
    chunk_frames: int
    overlap_frames: int
    stabilizer: str
    anchor_frames: int = 0
    linear_window: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("past", "overlap", "overlap_key", "overlap_value", "chunks", "anchor_key", "anchor_value"),
    meta_fields=("form",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class HybridState:
    """The state of a causal video: all that later chunks need of the chunks already seen.

    Its structure and shapes never change, so it can be a scan carry or an argument of a jitted function. Its size does
    not depend on the length of the video. Sums are float32 (float64 for float64 inputs). A token enters `past` only
    when it leaves the next chunk's softmax window; until then the overlap holds its key and value. Because
    overlap_frames <= chunk_frames, the complete overlap leaves at once, so `overlap` keeps its sums ready.

    Attributes:
      past: sums over the frames before the next chunk's window; state [batch, heads, features, head_dim], normalizer
        [batch, heads, features].
      overlap: sums over the frames of the overlap, same shapes.
      overlap_key, overlap_value: [batch, overlap_frames * tokens_per_frame, heads, head_dim], in the inputs' dtype.
      chunks: number of chunks seen, int32 scalar. At 0 the overlap and the anchors hold no frames, only zeros.
      anchor_key, anchor_value: [batch, anchor_frames * tokens_per_frame, heads, head_dim], the video's first frames;
        None without anchors.
      form: form of attention, checked when the video continues; None fits any form. It is part of the structure, not an
        array.
    """

    past: LinearState
    overlap: LinearState
    overlap_key: jax.Array
    overlap_value: jax.Array
    chunks: jax.Array
    anchor_key: jax.Array | None = None
    anchor_value: jax.Array | None = None
    form: StateForm | None = None

    def __repr__(self) -> str:
        is_number = isinstance(self.chunks, jax.Array) and not isinstance(self.chunks, jax.core.Tracer)
        chunks = int(self.chunks) if is_number and not self.chunks.ndim else _summary(self.chunks)
        overlap = f"overlap_key={_summary(self.overlap_key)}, overlap_value={_summary(self.overlap_value)}"
        if self.anchor_key is not None:
            overlap += f", anchor_key={_summary(self.anchor_key)}, anchor_value={_summary(self.anchor_value)}"
        form = f", form={tuple(self.form)}" if self.form else ""
        return f"HybridState(chunks={chunks}, past={self.past}, overlap={self.overlap}, {overlap}{form})"

    def without_sums(self) -> "HybridState":
        """The state for attention to the window alone: sums of no features."""
        none = lambda sums: LinearState(sums.state[..., :0, :], sums.normalizer[..., :0])
        return dataclasses.replace(self, past=none(self.past), overlap=none(self.overlap))

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        head_dim: int,
        features: int,
        *,
        tokens_per_frame: int,
        overlap_frames: int,
        anchor_frames: int = 0,
        linear_window: bool = False,
        chunk_frames: int | None = None,
        stabilizer: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "HybridState":
        """The state before the first chunk of a video. `dtype` is that of the queries, keys and values.

        With chunk_frames and stabilizer the state records its form.
        """
        sums = LinearState(
            state=jnp.zeros((batch, heads, features, head_dim), accumulation_dtype(dtype)),
            normalizer=jnp.zeros((batch, heads, features), accumulation_dtype(dtype)),
        )
        overlap = jnp.zeros((batch, overlap_frames * tokens_per_frame, heads, head_dim), dtype)
        form = None
        if chunk_frames is not None and stabilizer is not None:
            form = StateForm(tokens_per_frame, chunk_frames, overlap_frames, stabilizer, anchor_frames, linear_window)
        anchors = jnp.zeros((batch, anchor_frames * tokens_per_frame, heads, head_dim), dtype)
        return cls(
            past=sums,
            overlap=sums,
            overlap_key=overlap,
            overlap_value=overlap,
            chunks=jnp.zeros((), jnp.int32),
            anchor_key=anchors if anchor_frames else None,
            anchor_value=anchors if anchor_frames else None,
            form=form,
        )
