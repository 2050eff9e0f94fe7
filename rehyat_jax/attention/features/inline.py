"""Features that are not computed yet, so that a kernel can compute them where it needs them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("source", "weights", "gain"),
    meta_fields=("function", "of_own_tokens"),
)
@dataclasses.dataclass(frozen=True)
class InlineFeatures:
    """phi_query or phi_key as a recipe: `function`, applied head by head to the tokens of `source`.

    Written to memory, 256 features of a token are twice its query; a kernel that has the query at hand computes them
    in place. Any map will do that is a function of one token and of matrices of its head.

    Attributes:
      source: [batch, tokens, heads, width], what the map is applied to, such as queries before their rotation. None
        stands for the attention's own query (for phi_query) or key (for phi_key), see `bound`.
      weights: arrays [heads, rows, columns], of any number.
      function: (tokens [tokens, width], *matrices [rows, columns]) -> features [tokens, features] in the tokens' dtype,
        of one head. Made of jax operations that Pallas can lower; compared by `==`, so give it value semantics.
      gain: [batch, tokens, heads], float32 (float64 for float64 tokens), what the features are multiplied by; None for
        nothing.
      of_own_tokens: whether the source is the attention's own query or key, as `bound` sets it. A kernel then holds one
        copy of these tokens, and one gradient.
    """

    source: jax.Array | None
    weights: tuple[jax.Array, ...]
    function: Callable[..., jax.Array]
    gain: jax.Array | None = None
    of_own_tokens: bool = False

    def bound(self, tokens: jax.Array) -> "InlineFeatures":
        """The features with a source: `tokens`, the attention's query or key, if there is no other."""
        return self if self.source is not None else dataclasses.replace(self, source=tokens, of_own_tokens=True)

    def compute(self) -> jax.Array:
        """The features, [batch, tokens, heads, features]."""
        # Heads first: the products then have them first too, and XLA moves no axes between them.
        all_videos = jax.vmap(self.function, in_axes=(0, *(None for _ in self.weights)))
        all_heads = jax.vmap(all_videos, in_axes=(2, *(0 for _ in self.weights)), out_axes=2)
        return multiplied(all_heads(self.source, *self.weights), self.gain)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._computed.shape

    @property
    def dtype(self) -> jax.numpy.dtype:
        return self._computed.dtype

    @functools.cached_property
    def _computed(self) -> jax.ShapeDtypeStruct:
        """Found once: a seventh of the time in which a model is traced would go to finding it again."""
        return jax.eval_shape(self.compute)


def multiplied(features: jax.Array, gain: jax.Array | None) -> jax.Array:
    """Features [..., tokens, heads, features] times gain [..., tokens, heads], in the dtype of the features."""
    return features if gain is None else (features * gain[..., None]).astype(features.dtype)


def with_gain(features: jax.Array | InlineFeatures, gain: jax.Array | None) -> jax.Array | InlineFeatures:
    """Features that are multiplied by `gain` [tokens, heads] too."""
    if gain is None:
        return features
    if not isinstance(features, InlineFeatures):
        return multiplied(features, gain)
    gain = jnp.broadcast_to(gain, features.shape[:3]) if features.gain is None else features.gain * gain
    return dataclasses.replace(features, gain=gain)


def identity(features: jax.Array) -> jax.Array:
    return features


def as_inline(features: jax.Array | InlineFeatures, dtype: jax.typing.DTypeLike) -> InlineFeatures:
    """Features given as an array are their own source, in `dtype`."""
    return features if isinstance(features, InlineFeatures) else InlineFeatures(features.astype(dtype), (), identity)


def as_array(features: jax.Array | InlineFeatures) -> jax.Array:
    return features.compute() if isinstance(features, InlineFeatures) else features
