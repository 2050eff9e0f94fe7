"""Softmax attention that is causal by chunks, as a form: what causality costs without any approximation."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from rehyat_jax.attention.forms.base import AttentionInputs, Features, Form, FormFlops, Sizes
from rehyat_jax.attention.on_mesh import chunk_causal_attention_on_mesh


@dataclasses.dataclass(frozen=True)
class CausalSoftmaxForm(Form):
    """Softmax to all frames up to the end of the chunk; see `rehyat_jax.attention.softmax.chunk_causal`.

    A causal hybrid form approximates it, and its cost is quadratic. It has no state of constant size, so it cannot be
    computed part by part.

    Attributes:
      chunk_frames: latent frames of a chunk.
    """

    chunk_frames: int = 3

    kind: ClassVar[str] = "causal_softmax"

    def __post_init__(self):
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, found {self.chunk_frames}")

    @property
    def label(self) -> str:
        return f"causal softmax {self.chunk_frames}"

    @property
    def causal(self) -> bool:
        return True

    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        del features, implementation
        return chunk_causal_attention_on_mesh(
            inputs.query,
            inputs.key,
            inputs.value,
            num_tokens=inputs.num_tokens,
            chunk_tokens=self.chunk_frames * inputs.tokens_per_frame,
        )

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        chunk = np.arange(num_frames) // self.chunk_frames
        softmax = chunk[:, None] >= chunk
        return softmax, np.zeros_like(softmax)

    def flops(self, sizes: Sizes) -> FormFlops:
        pairs = int(self.keys(sizes.frames)[0].sum()) * sizes.tokens_per_frame**2
        return FormFlops(softmax=4 * pairs * sizes.num_heads * sizes.head_dim)
