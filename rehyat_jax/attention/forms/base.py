"""The interface of a form of attention to models, distillation, planning and evaluation."""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.on_mesh import softmax_attention_on_mesh


@dataclasses.dataclass(frozen=True)
class Learned:
    """The learned parameters of a block's linear branch: blocks with equal ones share a stack of arrays.

    Attributes:
      feature_map: configuration of phi_query and phi_key.
      decay: True for a decay of every head, see `log_decay` of `hybrid_attention`.
      branch_gate: True for a gate of every head, see `branch_gate` of `hybrid_attention`.
    """

    feature_map: FeatureMapConfig
    decay: bool = False
    branch_gate: bool = False


class BlockFeatures(NamedTuple):
    """What a block's learned parameters make of its inputs.

    Attributes:
      query, key: phi_query and phi_key.
      log_decay, branch_gate: see `hybrid_attention`; None where the form has none.
    """

    query: InlineFeatures
    key: InlineFeatures
    log_decay: jax.Array | None = None
    branch_gate: jax.Array | None = None


Features = BlockFeatures | None
"""None for a form without learned parameters."""


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one block's self-attention.

    Attributes:
      query, key, value: [B, N, H, d] in the compute dtype; query and key are normalised and rotated.
      unrotated_query, unrotated_key: the same before RoPE, for feature maps that use them.
      unnormed_query, unnormed_key: the same before their norm, for feature maps that use them.
      tokens_per_frame: tokens of one latent frame.
      num_frames: frames of the video. A video that is sharded along time may have further frames of padding at its
        end. No token attends to padding, and the attention of padding is zero.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    unrotated_query: jax.Array
    unrotated_key: jax.Array
    unnormed_query: jax.Array
    unnormed_key: jax.Array
    tokens_per_frame: int
    num_frames: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.num_frames * self.tokens_per_frame

    def softmax(self) -> jax.Array:
        """Full softmax attention, [B, N, H, d]."""
        return softmax_attention_on_mesh(self.query, self.key, self.value, num_tokens=self.num_tokens)


class Sizes(NamedTuple):
    """The sizes that determine a form's FLOPs: latent frames, tokens of a frame, heads and their width."""

    frames: int
    tokens_per_frame: int
    num_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class FormFlops:
    """Floating-point operations of one block's attention to one video, forward; see `models.wan.flops`.

    Attributes:
      softmax: scores and weighted sums of values, full or within windows.
      linear: sums over keys, and their readout.
      feature_maps: phi_query and phi_key.
    """

    softmax: int
    linear: int = 0
    feature_maps: int = 0

    @property
    def total(self) -> int:
        return self.softmax + self.linear + self.feature_maps


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """A form of attention: its interface to a model, distillation, planning and evaluation.

    A subclass is a frozen dataclass. A checkpoint stores its fields.

    Attributes:
      kind: its key in `FORMS`.
      label: a few words for tables and messages.
      learned: its learned parameters; None for a form without any.
      chunk_frames: frames of a chunk. A video that is sharded along time is padded to a multiple of it.
      causal: True if linear attention reads the past only.
    """

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        return self.kind

    @property
    def learned(self) -> Learned | None:
        return None

    @property
    def chunk_frames(self) -> int:
        return 1

    @property
    def causal(self) -> bool:
        return False

    @abc.abstractmethod
    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        """The attention [B, N, H, d].

        Args:
          inputs: the block's inputs.
          features: features of its queries and keys.
          implementation: see `hybrid_attention`.
        """

    @property
    def attends_in_parts(self) -> bool:
        """True if a video's attention can be computed part by part: `zero_state`, `attend_part`, `key_sums`."""
        return False

    @property
    def streams(self) -> bool:
        """True if the attention of a part needs only the parts before."""
        return self.attends_in_parts and self.causal

    def zero_state(
        self, batch: int, tokens_per_frame: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> HybridState:
        """The state before the first part of a video of `batch` examples, whose attention computes in `dtype`."""
        raise NotImplementedError(f"{self.label} attention has no state")

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
        """`attend` for the frames that follow those in `state`.

        Args:
          inputs, features, implementation: see `attend`. Unless `is_last`, the part has complete chunks.
          state: state after the parts before.
          later: the sum of the later parts' `key_sums`; only read if the form does not stream.
          is_last: True for the last part of a video, which may end within a chunk.

        Returns:
          (attention [B, N, H, d], state after this part; unchanged after the last one).
        """
        raise NotImplementedError(f"{self.label} attention cannot be computed in parts")

    def key_sums(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> LinearState:
        """The sums over the keys of a part that the parts before it read, if the form does not stream.

        Args:
          inputs, features, implementation: see `attend`.
        """
        raise NotImplementedError(f"{self.label} attention cannot be computed in parts")

    @abc.abstractmethod
    def flops(self, sizes: Sizes) -> FormFlops:
        """Operations of one block's attention."""

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """(softmax keys, linear keys) of every frame, boolean [query frame, key frame]."""
        every = np.ones((num_frames, num_frames), bool)
        return every, ~every

    def log_scale(self, inputs: AttentionInputs, features: Features) -> jax.Array:
        """The correction [H] of the scale of the feature maps; zero where there is nothing to correct."""
        return jnp.zeros(inputs.query.shape[2])
