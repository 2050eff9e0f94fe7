"""Linear attention alone, as in SANA-Video."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.base import AttentionInputs, Features, Form, FormFlops, Learned, Sizes
from rehyat_jax.attention.forms.hybrid import linear_flops
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.on_mesh import hybrid_key_sums_on_mesh, linear_attention_on_mesh


@dataclasses.dataclass(frozen=True)
class LinearForm(Form):
    """Linear attention to all frames, or to all frames up to the end of the query's chunk. XLA computes it.

    Attributes:
      chunk_frames: frames of a chunk, whose tokens attend to one another in both directions.
      causal: False to attend to all frames.
      feature_map: configuration of phi_query and phi_key.
    """

    chunk_frames: int = 1
    causal: bool = True
    feature_map: FeatureMapConfig = FeatureMapConfig()

    kind: ClassVar[str] = "linear"

    def __post_init__(self):
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, found {self.chunk_frames}")

    @property
    def label(self) -> str:
        return f"linear {self.chunk_frames}"

    @property
    def learned(self) -> Learned:
        return Learned(self.feature_map)

    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        assert features is not None
        _check(implementation)
        return linear_attention_on_mesh(
            inputs.value,
            features.query,
            features.key,
            tokens_per_frame=inputs.tokens_per_frame,
            chunk_frames=self.chunk_frames,
            causal=self.causal,
            num_frames=inputs.num_frames,
        )[0]

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
            self.feature_map.features,
            tokens_per_frame=tokens_per_frame,
            overlap_frames=0,
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
        assert features is not None
        _check(implementation)
        y, past = linear_attention_on_mesh(
            inputs.value,
            features.query,
            features.key,
            tokens_per_frame=inputs.tokens_per_frame,
            chunk_frames=self.chunk_frames,
            causal=self.causal,
            past=state.past,
            later=None if self.causal else later,
        )
        return y, state if is_last else dataclasses.replace(state, past=past)

    def key_sums(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> LinearState:
        assert features is not None
        tokens = dict(tokens_per_frame=inputs.tokens_per_frame)
        return hybrid_key_sums_on_mesh(inputs.key, inputs.value, features.key, implementation=implementation, **tokens)

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        frame = np.arange(num_frames)
        is_read = frame < (frame[:, None] // self.chunk_frames + 1) * self.chunk_frames
        return np.zeros((num_frames, num_frames), bool), is_read if self.causal else np.ones_like(is_read)

    def flops(self, sizes: Sizes) -> FormFlops:
        return FormFlops(0, *linear_flops(self.learned, self.keys(sizes.frames)[1], sizes))


def _check(implementation: str | None) -> None:
    """Raises ValueError for an implementation that is only one of hybrid attention."""
    if implementation not in (None, "xla", "scan"):
        raise ValueError(f'implementation "{implementation}" cannot do linear attention alone: use "xla"')
