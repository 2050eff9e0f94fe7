"""Softmax in a window, linear attention outside of it: ReHyAt's form, and the form with two separate branches."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.base import AttentionInputs, Features, FormFlops, Learned, Sizes
from rehyat_jax.attention.forms.window import WindowedForm, window_flops
from rehyat_jax.attention.hybrid.api import STABILIZERS
from rehyat_jax.attention.hybrid.calibration import linear_mass_log_scale
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry


@dataclasses.dataclass(frozen=True)
class HybridConfig(WindowedForm):
    """Softmax in a window, linear attention outside of it, one normalisation (`rehyat_jax.attention.hybrid_attention`).

    Attributes:
      chunk_frames, overlap_frames, causal, stabilizer, anchor_frames: see `hybrid_attention`.
      feature_map: configuration of phi_query and phi_key.
      decay: True to learn, for every head, how linear weights decay with the distance from the window.
      linear_window: True if linear attention reads the frames of the window too; see `hybrid_attention`.
    """

    causal: bool = True
    stabilizer: Literal["row_max", "joint"] = "row_max"
    feature_map: FeatureMapConfig = FeatureMapConfig()
    decay: bool = False
    linear_window: bool = False

    kind: ClassVar[str] = "hybrid"

    def __post_init__(self):
        super().__post_init__()
        if self.stabilizer not in STABILIZERS:
            raise ValueError(f'stabilizer must be "row_max" or "joint", found {self.stabilizer!r}')
        if self.decay and self.linear_window:
            raise ValueError("decay and linear_window: expected one of them, found both; leave one of them False")

    @property
    def label(self) -> str:
        return super().label + ", decay" * self.decay + ", linear window" * self.linear_window

    @property
    def learned(self) -> Learned:
        return Learned(self.feature_map, decay=self.decay)

    @property
    def attends_in_parts(self) -> bool:
        # The sums over later parts are added up without decay.
        return self.causal or not self.decay

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"stabilizer": self.stabilizer, "linear_window": self.linear_window}

    def _geometry(self, num_frames: int) -> ChunkGeometry:
        return dataclasses.replace(super()._geometry(num_frames), linear_window=self.linear_window)

    def log_scale(self, inputs: AttentionInputs, features: Features) -> jax.Array:
        """See `linear_mass_log_scale`."""
        assert features is not None
        computed = (features.query.compute(), features.key.compute())
        return linear_mass_log_scale(
            *(tokens[:, : inputs.num_tokens] for tokens in (inputs.query, inputs.key, *computed)),
            tokens_per_frame=inputs.tokens_per_frame,
            # The softmax mass of the window is in its own branch already.
            key_masks=super()._geometry(inputs.num_frames).key_masks(causal=self.causal),
            stabilizer=self.stabilizer,
        )

    def flops(self, sizes: Sizes) -> FormFlops:
        return FormFlops(window_flops(self, sizes), *linear_flops(self.learned, self.keys(sizes.frames)[1], sizes))


@dataclasses.dataclass(frozen=True)
class TwoBranchForm(HybridConfig):
    """The window and the linear branch, normalised separately and joined by a learned gate of every head.

    The gate begins at zero, which is attention to the window alone. `stabilizer` only matters to the calibration of the
    feature maps.
    """

    kind: ClassVar[str] = "two_branch"

    @property
    def learned(self) -> Learned:
        return Learned(self.feature_map, decay=self.decay, branch_gate=True)


def linear_flops(learned: Learned, linear_keys: np.ndarray, sizes: Sizes) -> tuple[int, int]:
    """Operations of the sums over keys with their readout, and of the feature maps.

    Args:
      linear_keys: boolean [query frame, key frame].
    """
    # The number of tokens that read sums, plus the number that enter them.
    ends = sizes.tokens_per_frame * int(
        np.count_nonzero(linear_keys.any(axis=1)) + np.count_nonzero(linear_keys.any(axis=0))
    )
    maps = learned.feature_map
    kernels = sum(rows * columns for rows, columns in maps.kernel_shapes(sizes.head_dim))
    return (
        2 * ends * maps.features * sizes.num_heads * (sizes.head_dim + 1),
        2 * ends * sizes.num_heads * kernels,
    )
