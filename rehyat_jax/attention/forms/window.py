"""Forms with a softmax window: what they share, and the window alone."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.inline import as_inline
from rehyat_jax.attention.forms.base import AttentionInputs, BlockFeatures, Features, Form, FormFlops, Sizes
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.on_mesh import (
    hybrid_attention_on_mesh,
    hybrid_attention_part_on_mesh,
    hybrid_key_sums_on_mesh,
)


@dataclasses.dataclass(frozen=True)
class WindowedForm(Form):
    """A form that `rehyat_jax.attention.hybrid_attention` computes.

    Attributes:
      chunk_frames, overlap_frames, anchor_frames: see `hybrid_attention`.
    """

    chunk_frames: int = 3
    overlap_frames: int = 1
    anchor_frames: int = 0

    def __post_init__(self):
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, found {self.chunk_frames}")
        for name in ("overlap_frames", "anchor_frames"):
            if not 0 <= getattr(self, name) <= self.chunk_frames:
                raise ValueError(
                    f"{name} must be between 0 and chunk_frames ({self.chunk_frames}), found {getattr(self, name)}"
                )

    @property
    def label(self) -> str:
        anchors = f", {self.anchor_frames} anchors" * bool(self.anchor_frames)
        return f"{self.kind} {self.chunk_frames}+{self.overlap_frames}{anchors}"

    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        phi_query, phi_key, arguments = self._arguments(inputs, features)
        return hybrid_attention_on_mesh(
            inputs.query,
            inputs.key,
            inputs.value,
            phi_query,
            phi_key,
            num_frames=inputs.num_frames,
            implementation=implementation,
            **arguments,
        )

    @property
    def attends_in_parts(self) -> bool:
        return True

    def zero_state(
        self, batch: int, tokens_per_frame: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> HybridState:
        return HybridState.zeros(
            batch,
            num_heads,
            head_dim,
            0 if self.learned is None else self.learned.feature_map.features,
            tokens_per_frame=tokens_per_frame,
            overlap_frames=self.overlap_frames,
            anchor_frames=self.anchor_frames,
            dtype=dtype,
        )

    def attend_part(
        self,
        inputs: AttentionInputs,
        features: Features,
        state: HybridState,
        *,
        later: LinearState | None = None,
        is_last: bool,
        implementation: str | None,
    ) -> tuple[jax.Array, HybridState]:
        phi_query, phi_key, arguments = self._arguments(inputs, features)
        return hybrid_attention_part_on_mesh(
            inputs.query,
            inputs.key,
            inputs.value,
            phi_query,
            phi_key,
            state,
            None if self.causal else later,
            is_last=is_last,
            implementation=implementation,
            **arguments,
        )

    def key_sums(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> LinearState:
        _, phi_key, arguments = self._arguments(inputs, features)
        return hybrid_key_sums_on_mesh(
            inputs.key,
            inputs.value,
            phi_key,
            tokens_per_frame=arguments["tokens_per_frame"],
            implementation=implementation,
        )

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        return self._geometry(num_frames).key_masks(causal=self.causal)

    def _geometry(self, num_frames: int) -> ChunkGeometry:
        """That of a video with one token a frame."""
        return ChunkGeometry(num_frames, 1, self.chunk_frames, self.overlap_frames, self.anchor_frames)

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of `hybrid_attention` that are constants."""
        names = ("chunk_frames", "overlap_frames", "causal", "anchor_frames")
        return {name: getattr(self, name) for name in names}

    def _arguments(self, inputs: AttentionInputs, features: Features) -> tuple[Any, Any, dict[str, Any]]:
        """phi_query, phi_key and the keyword arguments of `hybrid_attention`."""
        if features is None:
            nothing = as_inline(jnp.zeros((*inputs.query.shape[:3], 0), inputs.query.dtype), inputs.query.dtype)
            features = BlockFeatures(nothing, nothing)
        arrays = {"log_decay": features.log_decay, "branch_gate": features.branch_gate}
        return features.query, features.key, self._options() | arrays | {"tokens_per_frame": inputs.tokens_per_frame}


@dataclasses.dataclass(frozen=True)
class WindowForm(WindowedForm):
    """Softmax in a window, and nothing outside of it. It has no parameters to train.

    Attributes:
      chunk_frames, overlap_frames, anchor_frames: see `hybrid_attention`.
    """

    kind: ClassVar[str] = "window"
    causal: ClassVar[bool] = True

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        softmax, linear = super().keys(num_frames)
        return softmax, np.zeros_like(linear)

    def flops(self, sizes: Sizes) -> FormFlops:
        return FormFlops(softmax=window_flops(self, sizes))


def window_flops(form: Form, sizes: Sizes) -> int:
    """Operations of scores and weighted sums of values within the softmax keys of a form."""
    softmax, _ = form.keys(sizes.frames)
    return 4 * sizes.num_heads * sizes.head_dim * sizes.tokens_per_frame**2 * int(softmax.sum())
